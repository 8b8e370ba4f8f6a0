"""Losses and gradients written out on full logits, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mixing_runs import Vector
from torch import Tensor
from torch.nn.functional import cross_entropy

from trl_ext.testing import tiny_llama, tiny_tokenizer


def model_at(weights: Vector) -> Any:
    model = tiny_llama(hidden=16).double()
    for p, w in zip(model.parameters(), weights, strict=True):
        p.data.copy_(w)
    return model


def token_log_probs(model: Any, head: str, tail: list[int]) -> Tensor:
    ids = tiny_tokenizer()(head)["input_ids"]
    logits = model(torch.tensor([ids + tail])).logits[0, len(ids) - 1 : -1]
    return -cross_entropy(logits, torch.tensor(tail), reduction="none")


def demonstration_nll(model: Any, rows: Sequence[Any]) -> Tensor:
    """Mean over label tokens, one row at a time."""
    tokenizer = tiny_tokenizer()
    parts = [
        token_log_probs(model, r["prompt"], tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id])
        for r in rows
    ]
    return -torch.cat(parts).mean()


def gradient(model: Any, loss: Tensor) -> Vector:
    return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))]


def fp32_error(gradient: Vector) -> float:
    """How far a gradient may be off whose head works in fp32: each of its entries is made of sums of at most as many
    terms as a hidden state and the vocabulary have, and each term is rounded by 2^-24 of the largest entry or less."""
    terms = tiny_llama(hidden=16).config.vocab_size + 16
    return terms * 2**-24 * max(float(g.abs().max()) for g in gradient)


def combine(a: Vector, b: Vector, x: float, y: float) -> Vector:
    return [x * s + y * t for s, t in zip(a, b, strict=True)]


def rl_gradient(model: Any, rolled: Sequence[tuple[str, list[int], float]], per_token: bool = True) -> Vector:
    """Of GRPO's loss on policy over these completions alone: a ratio of one, and no clipping.

    Args:
        rolled: prompt, completion ids and advantage of each completion.
        per_token: a mean over all tokens; otherwise over completions, each a mean over its tokens.
    """
    if not rolled:
        return [torch.zeros_like(p) for p in model.parameters()]
    size = sum(len(ids) for _, ids, _ in rolled) if per_token else len(rolled)
    terms = [
        advantage * (logps.sum() if per_token else logps.mean())
        for logps, advantage in ((token_log_probs(model, prompt, ids), advantage) for prompt, ids, advantage in rolled)
    ]
    return gradient(model, -torch.stack(terms).sum() / size)


def completions(rollouts: Any, advantages: Tensor) -> list[tuple[str, list[int], float]]:
    """Prompt, completion ids without padding, and advantage of each completion of a generation batch."""
    ids = [row[mask.bool()].tolist() for row, mask in zip(rollouts.completion_ids, rollouts.mask, strict=True)]
    return list(zip(rollouts.prompts, ids, advantages.tolist(), strict=True))
