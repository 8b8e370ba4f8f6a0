"""TRL's fused head at a temperature of its own while the model trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trl_ext.own_passes import causal_lm

if TYPE_CHECKING:
    from torch import nn


class TemperedHead:
    """Makes a model's fused head give its log-probabilities at a temperature while it trains.

    `softmax(W h / beta)` is `softmax(W (h / beta))`, so the backbone's output is divided on its way to the fused head;
    evaluation and generation stay at temperature 1. This leaves mixed precision and PEFT, which wrap the model before
    plugins see it, as they are; TRL's own `temperature` would have to be set before that.

    Args:
        model: the model, with or without PEFT's wrapper.
        temperature: beta.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        lm = causal_lm(model)
        self._temperature = temperature
        self._on = False
        self._forward: Callable[..., Any] = lm.forward
        lm.base_model.register_forward_hook(self._temper)

        @functools.wraps(self._forward)
        def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            self._on = fused_lm_head and lm.training
            try:
                return self._forward(*args, fused_lm_head=fused_lm_head, **kwargs)
            finally:
                self._on = False

        lm.forward = forward

    def _temper(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._on:
            return None
        return replace(output, last_hidden_state=output.last_hidden_state / self._temperature)
