"""Measure language models: engines that sample, judges, scores, journals, and the probes built on them."""
