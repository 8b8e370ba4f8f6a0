"""The probe `excursions`: recipes from each of several checkpoints of one base, measured by `passk` and `drift`."""
