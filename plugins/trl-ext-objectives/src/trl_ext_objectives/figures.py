"""Pictures: an objective's loss and gradient weight next to NLL's."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl_ext_probing.plots import COLOURS, figure, save

from trl_ext.records import TokenRecord

VOCABULARY = 1000
REFERENCE_P = 0.5
MOMENTS = {"at the start": 0.0, "in the middle": 0.5, "at the end": 1.0}

Loss = Callable[[TokenRecord], Tensor]
"""From a record to the loss (B, T) of its label tokens."""


def curves(loss: Loss, p: Tensor, *, temperature: float = 1.0, progress: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss f(p) and the weight W(p) = -dL/dz_label of one label token at each probability.

    Taken from the loss itself by autograd through a softmax over `VOCABULARY` tokens, the mass 1 - p spread evenly over
    the others; a reference gives every label 1/2; what an objective takes from the batch, it takes from this grid.

    Args:
        loss: Of the objective.
        p: (n,) float64 in (0, 1).
        temperature: At which the loss wants its log-probabilities.
        progress: Share of the training that is done, for options that follow a schedule.

    Returns:
        (n,) float64 each.
    """
    logits = torch.zeros(len(p), VOCABULARY, dtype=torch.float64)
    logits[:, 0] = torch.logit(p) + math.log(VOCABULARY - 1)
    logits.requires_grad_()
    log_softmax = (logits / temperature).log_softmax(-1)
    values = loss(_record(log_softmax, progress))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach()[0], -gradient[:, 0]


class HeadOutputs(dict[str, Tensor]):
    """What the fused head gives beside log-probabilities and entropy, made of the whole distributions when asked for.

    Args:
        log_softmax: (B, T, V) float, without gradient.
    """

    def __init__(self, log_softmax: Tensor) -> None:
        super().__init__(log_sum_sq_probs=torch.logsumexp(2 * log_softmax, -1))
        self._log_softmax = log_softmax

    def __missing__(self, name: str) -> Tensor:
        count = int(name.removeprefix("top").removesuffix("_log_probs"))
        return self._log_softmax.topk(min(count, self._log_softmax.shape[-1])).values


def _record(log_softmax: Tensor, progress: float) -> TokenRecord:
    """One row of label tokens, each the first of the vocabulary."""
    count = len(log_softmax)
    return TokenRecord(
        log_probs=log_softmax[None, :, 0],
        entropy=-(log_softmax.exp() * log_softmax).sum(-1)[None],
        mask=torch.ones(1, count, dtype=torch.bool),
        training=True,
        denominator=torch.tensor(float(count)),
        accumulation_steps=1,
        progress=progress,
        extras=HeadOutputs(log_softmax.detach()[None]),
        reference_log_probs=torch.full((1, count), math.log(REFERENCE_P), dtype=torch.float64),
    )


def objective_figure(loss: Loss, name: str, *, temperature: float = 1.0, moves: bool = False) -> Any:
    """A matplotlib figure with the `curves` of an objective and of NLL.

    Args:
        loss: Of the objective.
        name: Of the objective, for the legend.
        temperature: At which the loss wants its log-probabilities.
        moves: Whether the loss changes over the training; there are three curves then, one for each of `MOMENTS`.
    """
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    whole, (left, right) = figure(2, size=(9, 3.6))
    drawn = {"NLL": (curves(lambda tokens: -tokens.log_probs, p), {"color": "0.6", "linestyle": "--"})}
    for index, (moment, progress) in enumerate(MOMENTS.items() if moves else {"": 0.0}.items()):
        label = f"{name} {moment}".strip()
        drawn[label] = curves(loss, p, temperature=temperature, progress=progress), {"color": COLOURS[index]}
    for label, ((values, weights), style) in drawn.items():
        left.plot(p, values, label=label, **style)
        right.plot(p, weights, label=label, **style)
    left.set(xlabel="p of the label", ylabel="loss", ylim=(None, 5))
    right.set(xlabel="p of the label", ylabel="W(p), gradient on the label's logit")
    left.legend(fontsize=8)
    return whole


def draw_objective(
    loss: Loss, path: str | PathLike[str], name: str, *, temperature: float = 1.0, moves: bool = False
) -> None:
    """Write `objective_figure` into an image file; needs matplotlib."""
    save(objective_figure(loss, name, temperature=temperature, moves=moves), Path(path))
