"""The next token of each row: the most probable one, or a draw with the noise of its key."""

from __future__ import annotations

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from trl_ext_probing.engines.interface import SamplingSettings
from trl_ext_probing.engines.noise import gumbel


def choose_tokens(
    logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, settings: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,), int64, and their log-probabilities (B,), float32, in nats.

    Args:
        logits: (B, V), float32, of the next token.
        keys: (B,), int64, of the noise of each row.
        positions: (B,), int64, of the next token among those drawn, from 0.
        settings: Temperature, top-k and top-p, in this order and with the meaning of transformers' `generate`.
    """
    if settings.temperature and settings.temperature != 1:
        logits = logits / settings.temperature
    log_probs = logits.log_softmax(-1)
    scores = logits
    if settings.temperature:
        scores = _cut(log_probs, settings) + gumbel(keys, positions, logits.shape[-1])
    tokens = scores.argmax(-1)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _cut(log_probs: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Minus infinity for tokens that top-k and top-p exclude."""
    if settings.top_k:
        log_probs = TopKLogitsWarper(settings.top_k)(None, log_probs)
    if settings.top_p < 1:
        log_probs = TopPLogitsWarper(settings.top_p)(None, log_probs)
    return log_probs
