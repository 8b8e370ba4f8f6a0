"""The probe `drift`: what training on one thing did to models on general data."""
