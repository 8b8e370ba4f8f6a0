"""Supervised objectives beyond log-likelihood: one file per objective, each a pure formula and the plugin around it."""
