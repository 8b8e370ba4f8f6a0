"""The probe `capability`: how likely base models find a data set's responses, and which objective that suggests."""
