"""Completions that do not depend on how rows are spread over micro-batches and ranks, nor on the run's random state."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor


def sample_by_row(trainer: Any) -> None:
    """Let a trainer draw each completion with a random state of its row's own, in place of `model.generate`.

    A row's completion follows from the weights, the prompt, how many rows of the same prompt are before it, and the
    optimiser steps done. So a run on two ranks draws what one rank draws, and a resumed run what it would have drawn.
    It draws `max_new_tokens` tokens, whatever comes first; TRL cuts at the end of the text.
    """
    model = trainer.ext_base_model()

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **others: Any) -> Tensor:
        draws = _draws(input_ids, attention_mask, trainer.state.global_step)
        ids, mask = input_ids, attention_mask
        for _ in range(generation_config.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
            cumulated = (logits.double() / generation_config.temperature).softmax(-1).cumsum(-1)
            points = torch.tensor([[draw.random()] for draw in draws], dtype=cumulated.dtype)
            chosen = torch.searchsorted(cumulated, points).clamp(max=logits.shape[-1] - 1)
            ids = torch.cat([ids, chosen], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return ids

    model.generate = generate


def _draws(input_ids: Tensor, mask: Tensor, step: int) -> list[random.Random]:
    """A source of random numbers for each row."""
    seen: Counter[tuple[int, ...]] = Counter()
    draws = []
    for ids, kept in zip(input_ids, mask.bool(), strict=True):
        prompt = tuple(ids[kept].tolist())
        draws.append(random.Random(f"{prompt} {seen[prompt]} {step}"))
        seen[prompt] += 1
    return draws
