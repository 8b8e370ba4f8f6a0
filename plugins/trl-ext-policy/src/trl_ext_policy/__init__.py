"""Policy-gradient methods for TRL's GRPOTrainer that users asked TRL for, one file each."""
