"""GEM: gradient `sum_v q_v w_v (grad z_v - grad z_label)`, with q = softmax(z / beta) and w = h' (arXiv 2408.16673).

- h linear: w = 1. The gradient is that of `-beta log q_label`.
- h logsigmoid, which the authors' scripts use: w_v = sigmoid(s d_v) with d_v = z_v - z_label and s = 0.01. Since s d is
  small, sigmoid(s d) is `1/2 + s d / 4`, and the gradient is that of

      -beta sg[1/2 + beta (-H - log q_label) s / 4] log q_label - beta^2 H s / 4,    H the entropy of q,

  so that nothing beyond the fused head's two outputs is needed. The weights are exact to |s d|^3 / 48: 2e-5 at a logit
  difference of 10, 6e-4 at 30, beside a weight of about 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.own_passes import causal_lm
from trl_ext_objectives.backbone import refuse_rescaled_logits
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.tempered_head import TemperedHead

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_ext.records import RunDescription, SetupContext, TokenRecord

SLOPE = 0.01 / 4
"""s / 4: the slope at 0 of the authors' weight `sigmoid(0.01 d)`."""


def linear_gem(log_q: Tensor, beta: float) -> Tensor:
    """`-beta log q`, any shape and float dtype; its gradient is GEM's with a linear h (arXiv 2408.16673)."""
    return -beta * log_q


def logsigmoid_gem(log_q: Tensor, entropy: Tensor, beta: float) -> Tensor:
    """A loss whose gradient is GEM's with h = logsigmoid to first order in s (arXiv 2408.16673).

    Args:
        log_q: (...) float, log-probabilities of the labels at temperature beta.
        entropy: (...) float, differentiable: entropy of the same distributions in nats.
        beta: Temperature.
    """
    mean_difference = beta * (-entropy - log_q)  # of the logits to the label's, under q
    weight = (0.5 + SLOPE * mean_difference).detach()
    return -beta * weight * log_q - beta**2 * SLOPE * entropy


@dataclass(eq=False)
class GEM(Objective):
    """Learn from what the distribution at temperature beta still misses, which leaves it open where NLL closes it.

    In training, `nll`, `entropy` and the loss are those of the tempered distribution; in evaluation all three, and the
    loss, which is plain NLL there, are at temperature 1. The value of the training loss is not the paper's; its
    gradient is.

    Args:
        beta: Temperature; the paper's is 0.7. 1 with `h=linear` is NLL.
        h: "logsigmoid" is that of the authors' scripts. Its weights are near 1/2, so that its gradient is about half as
            long as with "linear", whose weights are 1.
    """

    citation: ClassVar[str] = "Preserving Diversity in Supervised Fine-Tuning (GEM), arXiv 2408.16673"
    cost: ClassVar[str] = "about 4 % more memory; its time has not been measured"
    trainers = ("sft",)
    alone = "it changes the temperature of the model's head"

    beta: Annotated[float, Range(gt=0, le=1)] = 0.7
    h: Literal["logsigmoid", "linear"] = "logsigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tempered: nn.Module | None = None

    @property
    def head_temperature(self) -> float:
        """beta."""
        return self.beta

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats; in training `log_probs` and `entropy` are at temperature beta (arXiv 2408.16673).

        The core's denominator is all label tokens of the window.
        """
        if not tokens.training:
            return -tokens.log_probs
        if self.h == "linear":
            return linear_gem(tokens.log_probs, self.beta)
        return logsigmoid_gem(tokens.log_probs, tokens.entropy, self.beta)

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse auxiliary streams, whose gradients other plugins compare with plain ones."""
        if run.streams:
            raise ValueError("gem changes the temperature of the model's head for streams too; take the streams out")

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Temper the head, once per model."""
        refuse_rescaled_logits(context.model, "gem")
        if causal_lm(context.model).get_output_embeddings().bias is not None:
            raise ValueError("gem does not support an LM head with a bias; take another model")
        if self._tempered is not context.model:
            TemperedHead(context.model, self.beta)
            self._tempered = context.model
