"""Conflict tokens of a group (arXiv 2508.03772): those that right and wrong completions share at the same position.

A token is in conflict if the same one stands at the same position in a completion with a positive and in one with a
negative advantage, position counted from the start or from the end, and if this holds for all positions from there to
it: shared prefixes and suffixes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_prefixes(ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """(G, T) bool: the unbroken run of conflict tokens at the start of each completion; arguments as below."""
    same = (ids.unsqueeze(1) == ids.unsqueeze(0)) & mask.unsqueeze(1) & mask.unsqueeze(0)  # (G, G, T)
    shared = same[:, advantages > 0].any(dim=1) & same[:, advantages < 0].any(dim=1)
    return shared.cumprod(dim=1).bool()


def conflict_weights(ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """(G, T) float: lambda, 2 on conflict tokens of completions with a positive advantage, 0 on those of negative ones.

    Everywhere else it is 1, also where prefix and suffix do not reach.

    Args:
        ids: (G, T) long: the completions of a group, padded on the right.
        mask: (G, T) bool: the tokens that the loss sees; another one ends a run.
        advantages: (G,) float.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (mask * (places + 1)).amax(dim=1, keepdim=True) - 1
    inside, mirrored = last >= places, (last - places).clamp(min=0)  # last token first; applied once more, back again
    suffixes = shared_prefixes(ids.gather(1, mirrored), mask.gather(1, mirrored) & inside, advantages)
    conflict = shared_prefixes(ids, mask, advantages) | (suffixes.gather(1, mirrored) & inside)
    return torch.where(conflict, 1 + advantages.sign().unsqueeze(1), 1)
