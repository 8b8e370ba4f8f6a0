"""Pictures: an objective's loss and gradient weight next to NLL's, and a model's place on the continuum."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_ext.records import TokenRecord

if TYPE_CHECKING:
    from trl_ext_objectives.capability import Capability
    from trl_ext_objectives.objective import Objective

VOCABULARY = 1000
REFERENCE_P = 0.5


def curves(objective: Objective, p: Tensor) -> tuple[Tensor, Tensor]:
    """The loss f(p) and the weight W(p) = -dL/dz_label of one label token at each probability.

    Taken from the plugin itself by autograd through a softmax over `VOCABULARY` tokens, the mass 1 - p spread evenly
    over the others; a reference gives every label 1/2; what an objective takes from the batch, it takes from this grid.

    Args:
        p: (n,) float64 in (0, 1).
    """
    logits = torch.zeros(len(p), VOCABULARY, dtype=torch.float64)
    logits[:, 0] = torch.logit(p) + math.log(VOCABULARY - 1)
    logits.requires_grad_()
    log_softmax = (logits / objective.head_temperature).log_softmax(-1)
    probabilities = log_softmax.exp()
    record = TokenRecord(
        log_probs=log_softmax[None, :, 0],
        entropy=-(probabilities * log_softmax).sum(-1)[None],
        mask=torch.ones(1, len(p), dtype=torch.bool),
        training=True,
        denominator=torch.tensor(float(len(p))),
        accumulation_steps=1,
        progress=0.0,
        extras={"log_sum_sq_probs": torch.logsumexp(2 * log_softmax.detach(), -1)[None]},
        reference_log_probs=torch.full((1, len(p)), math.log(REFERENCE_P), dtype=torch.float64),
    )
    loss = objective.per_token_loss(record)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach()[0], -gradient[:, 0]


def draw(objective: Objective, path: str | PathLike[str]) -> None:
    """Draw `curves` of an objective and of NLL into an image file; needs matplotlib."""
    from trl_ext_objectives.nll import NLL

    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    figure, (left, right) = _subplots(1, 2, (9, 3.6))
    for which, style in ((NLL(), {"color": "0.6", "linestyle": "--"}), (objective, {"color": "C0"})):
        loss, weight = curves(which, p)
        label = "NLL" if isinstance(which, NLL) else repr(which)
        left.plot(p, loss, label=label, **style)
        right.plot(p, weight, label=label, **style)
    left.set(xlabel="p of the label", ylabel="loss", ylim=(None, 5))
    right.set(xlabel="p of the label", ylabel="W(p), gradient on the label's logit")
    left.legend(fontsize=8)
    _save(figure, path)


def draw_capability(capability: Capability, path: str | PathLike[str]) -> None:
    """Draw the distribution of p, and the mean on the continuum with the paper's settings; needs matplotlib."""
    from trl_ext_objectives.capability import OBSERVED

    figure, (left, right) = _subplots(1, 2, (10, 3.2))
    levels = torch.linspace(0, 1, len(capability.quantiles))
    left.plot(capability.quantiles, levels, label="response tokens")
    left.plot(capability.example_quantiles, levels, label="examples (mean p)")
    left.axvline(capability.mean_p, color="0.3", linestyle=":", label=f"mean p = {capability.mean_p:.3f}")
    left.set(xlabel="p", ylabel="share below", xlim=(0, 1), ylim=(0, 1))
    left.legend(fontsize=8)
    for color, region in zip(("C3", "0.7", "C2"), OBSERVED, strict=True):
        right.axvspan(region.low, region.high, color=color, alpha=0.5)
        right.text((region.low + region.high) / 2, 0.85, region.name, ha="center", fontsize=8)
    error = 2 * capability.standard_error
    right.errorbar([capability.mean_p], [0.4], xerr=[error], fmt="ok", capsize=3)
    right.set(xlabel="mean p; coloured: the settings of arXiv 2510.00526", xlim=(0, 1), ylim=(0, 1), yticks=[])
    _save(figure, path)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, path: str | PathLike[str]) -> None:
    # Without metadata, which holds the library's version, the same curves give the same file.
    metadata = {"Software": None} if str(path).endswith(".png") else None
    figure.savefig(path, dpi=150, metadata=metadata)
