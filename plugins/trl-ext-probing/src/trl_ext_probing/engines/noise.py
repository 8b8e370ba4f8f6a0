"""Gumbel noise that is a function of a draw's key, the position and the token, in any batch and on any device.

The generator is SplitMix64's output function (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", OOPSLA) of a counter instead of a state: nothing is carried from one draw to the next.
"""

from __future__ import annotations

import torch

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the odd increment of SplitMix64, as a signed integer
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def mix(state: torch.Tensor) -> torch.Tensor:
    """Bijective hash of 64 bits, elementwise: the next output of SplitMix64 in this state; int64, any shape."""
    z = state + _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(factor)  # integers wrap around in torch
    return z.bitwise_xor_(_shifted(z, 31))


def gumbel(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, (B, vocab_size), float32.

    With it, argmax(logits + noise) is a draw from softmax(logits).

    Args:
        keys: (B,), int64, of each row's draw.
        positions: (B,), int64, of the token that is drawn, from 0.
        vocab_size: Number of tokens.
    """
    tokens = mix(torch.arange(vocab_size, device=keys.device))
    bits = mix(mix(keys + mix(positions))[:, None] ^ tokens)
    # The upper 53 bits, in the middle of their interval. Small values keep float32's relative precision, so that the
    # exponential is exact where it is small, which decides whether an improbable token wins.
    uniform = _shifted(bits, 11).to(torch.float32).add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right with zeros; torch would fill in the sign."""
    return z.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)
