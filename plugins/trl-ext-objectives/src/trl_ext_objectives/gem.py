"""GEM, linear form: its gradient is that of beta x NLL at temperature beta, which keeps the distribution open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.head import causal_lm, refuse_rescaled_logits
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import Range

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


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
        lm.base_model.register_forward_hook(self._temper)  # type: ignore[union-attr]

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


@dataclass(eq=False)
class GEM(Objective):
    """NLL at temperature beta, times beta.

    In training, `nll`, `entropy` and the loss are those of the tempered distribution; in evaluation all three, and the
    loss, which is plain NLL there, are at temperature 1.

    Args:
        beta: Temperature in (0, 1]; 1 is NLL.
    """

    citation: ClassVar[str] = "Preserving Diversity in Supervised Fine-Tuning (GEM), arXiv 2408.16673"
    trainers = ("sft",)
    ranges = {"beta": Range(0, 1, open_low=True)}
    mixable = False

    beta: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tempered: nn.Module | None = None

    @property
    def head_temperature(self) -> float:
        """beta."""
        return self.beta

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse auxiliary streams, whose gradients other plugins compare with plain ones."""
        if run.streams:
            raise ValueError("gem changes the temperature of the model's head for streams too; take the streams out")

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Temper the head, once per model."""
        refuse_rescaled_logits(context.model, "gem")
        if causal_lm(context.model).get_output_embeddings().bias is not None:  # type: ignore[operator]
            raise ValueError("gem does not support an LM head with a bias; take another model")
        if self._tempered is not context.model:
            TemperedHead(context.model, self.beta)
            self._tempered = context.model

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T); `log_probs` are at temperature beta in training."""
        return -tokens.log_probs * (self.beta if tokens.training else 1.0)
