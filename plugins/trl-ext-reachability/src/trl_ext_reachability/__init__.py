"""What RL can reach from a base model: process rewards, policy-gradient variants and a probe (arXiv 2603.06957)."""
