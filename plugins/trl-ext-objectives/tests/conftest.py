"""Records made from full logits, so that every objective can be compared with autograd through a whole softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_ext_objectives.figures import HeadOutputs

from trl_ext.records import TokenRecord


def make_record(logits: Tensor, labels: Tensor, mask: Tensor | None = None, **fields: Any) -> TokenRecord:
    """What the core makes of logits (B, T, V) and labels (B, T): zeros where the mask is False."""
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    log_softmax = logits.log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return TokenRecord(
        **{
            "log_probs": log_softmax.gather(-1, labels[..., None])[..., 0].masked_fill(~mask, 0),
            "entropy": entropy.masked_fill(~mask, 0),
            "mask": mask,
            "training": True,
            "denominator": mask.sum().clamp(min=1).to(logits.dtype),
            "accumulation_steps": 1,
            "progress": 0.0,
            "extras": HeadOutputs(log_softmax.detach()),
        }
        | fields
    )


@pytest.fixture(scope="session")
def record() -> Callable[..., TokenRecord]:
    return make_record
