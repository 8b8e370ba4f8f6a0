"""The from-scratch control: what of a fine-tuning run's result comes from pre-training (arXiv 2606.07527)."""
