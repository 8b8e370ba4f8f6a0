"""`gradient-surgery`: combine the target's gradient and the mean general one, so that they do not oppose each other.

    u = a t + b g,    (a, b) = weighting([[<t, t>, <t, g>], [<t, g>, <g, g>]])

t and g are the gradients of the target's and of the general data's token-mean loss (in GRPO, of TRL's loss for the
trainer's own data), over all parameters or in each parameter tensor. Half-space is A-GEM (arXiv:1812.00420, equation
11), `pcgrad` arXiv:2001.06782, algorithm 1; the weightings are in `weightings`. It costs the second stream's forward
and backward, and a few inner products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.records import StreamGradient, StreamRequest
from trl_ext_data_regularization.preconditioner import preconditioned, refuse_without_second_moments
from trl_ext_data_regularization.relations import COMBINED_TWICE, COMBINES_TARGET
from trl_ext_data_regularization.weightings import weighting


@dataclass(eq=False)
class GradientSurgery:
    """u = a t + b g from the Gram matrix of the target's gradient t and the mean general gradient g.

    Args:
        method: "half-space": t, without what points against g (A-GEM); "pcgrad": both, each without what points against
            the other; the rest are torchjd's weightings.
        scope: "global": one Gram matrix; "layer": one for every parameter tensor.
        general: which data are general: the "stream" of that name, with the trainer's own data as target; or "train",
            with a stream "target".
        stream_batch_size: samples of the stream per rank and step.
        stream_max_length: longest sample of the stream in tokens; the trainer's `max_length` where None.
        precondition: Gram matrix of what Adam would make of the gradients.
    """

    method: Literal["half-space", "pcgrad", "upgrad", "mgda", "dualproj", "imtl-g", "aligned-mtl", "mean", "sum"] = (
        "half-space"
    )
    scope: Literal["global", "layer"] = "global"
    general: Literal["stream", "train"] = "stream"
    stream_batch_size: Annotated[int, Range(ge=1)] = 8
    stream_max_length: Annotated[int, Range(ge=1)] | None = None
    precondition: bool = False

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    provides: ClassVar[tuple[str, ...]] = (COMBINES_TARGET,)
    conflicts: ClassVar[Mapping[str, str]] = {COMBINES_TARGET: COMBINED_TWICE}
    citation: ClassVar[str] = "Chaudhry et al., Efficient lifelong learning with A-GEM, arXiv:1812.00420"
    cost: ClassVar[str] = "a forward and a backward of the target batch"

    def __post_init__(self) -> None:
        self._weighting = weighting(self.method)
        self._optimizer: torch.optim.Optimizer | None = None
        self._cosines: list[Tensor] = []

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        role = "general" if self.general == "stream" else "target"
        return [StreamRequest(role, self.stream_batch_size, "after", max_length=self.stream_max_length)]

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.precondition:
            refuse_without_second_moments(optimizer)
        self._optimizer = optimizer  # only read: its second moments
        return optimizer

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        own, other = (0, 1) if self.general == "stream" else (1, 0)
        stream = streams["general" if self.general == "stream" else "target"].gradients
        gram = self._gram((gradients, stream) if own == 0 else (stream, gradients))
        self._cosines.append(_cosine(gram))
        # To the host, once a step: with plain numbers the sum needs no scaled copy of a gradient.
        weights = self._weighting(gram).tolist()
        if self.scope == "layer":
            _scale(gradients, [pair[own] for pair in weights])
            gradients.axpy_(1.0, _scaled(stream, [pair[other] for pair in weights]))
            return
        if weights[own] != 1:
            gradients.mul_(weights[own])
        if weights[other] != 0:
            gradients.axpy_(weights[other], stream)

    def _gram(self, views: tuple[GradientView, GradientView]) -> Tensor:
        """(2, 2) over all parameters, or (P, 2, 2) per parameter; fp32."""
        if self.precondition:
            assert self._optimizer is not None
            t, g = (
                GradientView(v.names, v.parameters, preconditioned(self._optimizer, v.parameters, v.tensors))
                for v in views
            )
        else:
            t, g = views
        by_parameter = t.grams(g)
        return by_parameter.sum(0) if self.scope == "global" else by_parameter

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        if mode != "train" or not self._cosines:
            return {}
        cosines = torch.stack(self._cosines)
        cosines, self._cosines = cosines[torch.isfinite(cosines)], []
        if not len(cosines):  # nothing but steps that `nonfinite` leaves out
            return {}
        return {"cosine": float(cosines.mean()), "conflicts": float((cosines < 0).float().mean())}


def _cosine(gram: Tensor) -> Tensor:
    """() the cosine of t and g over all parameters; 0 where one of the two is zero."""
    tt, tg, gg = (gram[..., i, j].sum() for i, j in ((0, 0), (0, 1), (1, 1)))
    lengths = tt.sqrt() * gg.sqrt()  # of the roots: the product of small squares would be 0 in fp32
    return tg / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)


def _scale(view: GradientView, factors: list[float]) -> None:
    present = [(g, f) for g, f in zip(view.tensors, factors, strict=True) if g is not None]
    if present:
        torch._foreach_mul_([g for g, _ in present], [f for _, f in present])


def _scaled(view: GradientView, factors: list[float]) -> GradientView:
    tensors = [None if g is None else g * f for g, f in zip(view.tensors, factors, strict=True)]
    return GradientView(view.names, view.parameters, tensors)
