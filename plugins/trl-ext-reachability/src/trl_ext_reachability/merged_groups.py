"""Which completions form a group where several groups of one prompt are taken as one large group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_labels(prompts: Sequence[int], merged: Sequence[bool], num_generations: int) -> Tensor:
    """(N,) long: which group each completion's advantage is taken in, all groups of a merged prompt being one.

    Args:
        prompts: (N,) number of each completion's prompt, in groups.
        merged: (N,) whether groups of this prompt are one.
        num_generations: completions of a group as it was drawn.
    """
    first: dict[int, int] = {}
    return torch.tensor(
        [
            first.setdefault(prompt, i // num_generations) if one else i // num_generations
            for i, (prompt, one) in enumerate(zip(prompts, merged, strict=True))
        ]
    )
