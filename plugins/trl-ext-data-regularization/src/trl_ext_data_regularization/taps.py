"""Modules whose backward pass asks, layer by layer, how much each sample's gradient counts.

The forward pass is that of the module. In the backward pass the gradient of the input is left as it is, so that the
layers below see what they would see in plain training, and only the rows that make up the parameters' gradient are
scaled: one ordinary weight-gradient matmul, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_ext_data_regularization.head import HeadTap
from trl_ext_data_regularization.layers import Batch, Use


class Visitor(Protocol):
    """What the backward pass asks."""

    @property
    def scoring(self) -> bool:
        """Whether `score` wants to be called."""

    @property
    def weighing(self) -> bool:
        """Whether `weights` gives any, so that the parameters get a gradient."""

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        """Take note of a module's tokens: input x (N, I) or ids (N,), gradient of the output go (N, O), sample (N,)."""

    def weights(self, use: Use, batch: Batch) -> Tensor | None:
        """(samples,) weights of the batch's samples in this layer, or None for no parameter gradient at all."""


class Taps:
    """The tapped modules of a model. Outside of `active` they are what they were.

    Args:
        model: the unwrapped model.
        uses: its modules to tap.
        temperature: that of the fused head.
    """

    def __init__(self, model: nn.Module, uses: Sequence[Use], temperature: float = 1.0) -> None:
        self.visitor: Visitor | None = None
        self.batch: Batch | None = None
        self._active = False
        self._undo: list[Callable[[], None]] = []
        for use in uses:
            if use.kind == "head":
                head = HeadTap(self, model, use, temperature)
                self._undo.append(head.remove)
            else:
                self._replace(use)

    def remove(self) -> None:
        """Put the modules' own forward back."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    @contextmanager
    def active(self, visitor: Visitor, batch: Batch) -> Iterator[None]:
        """Let forward passes inside the block belong to a batch, and their backward pass ask a visitor."""
        self.visitor, self.batch, self._active = visitor, batch, True
        try:
            yield
        finally:
            self.visitor, self.batch, self._active = None, None, False

    @property
    def scoring(self) -> bool:
        """Whether a block of `active` is open."""
        return self._active

    @property
    def listening(self) -> bool:
        """Whether a forward pass made now is to be tapped."""
        return self.visitor is not None and self.batch is not None and torch.is_grad_enabled()

    def _replace(self, use: Use) -> None:
        module, original = use.module, use.module.forward
        had_own = "forward" in vars(module)
        tapped = {"linear": _linear, "embedding": _embedding, "scale": _scale}[use.kind]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.listening:
                return original(x, *args, **kwargs)
            assert self.visitor is not None
            assert self.batch is not None
            return tapped(_Visit(use, self.visitor, self.batch), original, x)

        def undo() -> None:
            if had_own:
                module.forward = original
            else:
                del module.forward

        module.forward = forward
        self._undo.append(undo)


@dataclass(frozen=True)
class _Visit:
    """One use of one layer by one micro-batch."""

    use: Use
    visitor: Visitor
    batch: Batch

    def rows(self, x: Tensor | None, go: Tensor) -> tuple[Tensor, Tensor] | None:
        """Show the tokens to the visitor, and give each one's weight.

        Args:
            x: (..., I) input, (...) ids, or None for a scale.
            go: (..., O) gradient of the output.

        Returns:
            (N,) weights between -1 and 1, and the () factor that goes with them; None for no parameter gradient. The
            two apart keep a 0/1 choice exact in low precision.
        """
        index = self._index(go)
        flat = None if x is None else x.reshape(index.numel(), -1) if x.is_floating_point() else x.reshape(-1)
        if self.visitor.scoring:
            self.visitor.score(self.use, flat, go.reshape(index.numel(), -1), index, self.batch)
        weights = self.visitor.weights(self.use, self.batch)
        if weights is None:
            return None
        size = weights.abs().max()
        relative = weights / size.clamp(min=torch.finfo(weights.dtype).tiny)
        return relative.to(go.dtype)[index], size

    def _index(self, go: Tensor) -> Tensor:
        """(N,) the sample of each row of go, where N counts heads too if there are any."""
        index, shape = self.batch.index, go.shape[:-1]
        if shape.numel() == index.numel():
            return index.reshape(-1)
        if shape[: index.dim()] == index.shape:  # (B, T, heads, O)
            return index.reshape(*index.shape, *[1] * (len(shape) - index.dim())).expand(shape).reshape(-1)
        raise RuntimeError(
            f"layer {self.use.name} sees tokens of shape {tuple(shape)} where the batch has {tuple(index.shape)}, so "
            "its samples cannot be told apart; use scope=global,engine=derivative"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, visit: _Visit) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.visit, ctx.bias_dtype = visit, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Under autocast go is in the compute dtype, and the forward cast the other two likewise.
        x = x.to(go.dtype)
        grad_x = go @ weight.to(go.dtype) if ctx.needs_input_grad[0] else None
        chosen = ctx.visit.rows(x, go)
        if chosen is None:
            return grad_x, None, None, None
        rows, size = chosen
        flat = go.reshape(-1, go.shape[-1]) * rows.unsqueeze(1)
        grad_weight = (
            (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype).mul_(size) if ctx.needs_input_grad[1] else None
        )
        grad_bias = flat.sum(0).to(ctx.bias_dtype).mul_(size) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int, visit: _Visit) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.visit, ctx.rows, ctx.padding_idx = visit, weight.shape[0], padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx >= 0:
            go = go.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        chosen = ctx.visit.rows(ids, go)
        if chosen is None:
            return None, None, None, None
        rows, size = chosen
        scaled = go * rows.view(ids.shape).unsqueeze(-1)
        grad = torch.ops.aten.embedding_dense_backward(scaled, ids, ctx.rows, ctx.padding_idx, False)
        return grad.mul_(size), None, None, None


class _Expand(torch.autograd.Function):
    """A vector of parameters, one copy per token: the gradient arrives token by token."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: torch.Size, visit: _Visit) -> Tensor:
        ctx.visit, ctx.dtype = visit, weight.dtype
        return weight.expand(shape)

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        chosen = ctx.visit.rows(None, go)
        if chosen is None:
            return None, None, None
        rows, size = chosen
        return (go.reshape(-1, go.shape[-1]) * rows.unsqueeze(1)).sum(0).to(ctx.dtype).mul_(size), None, None


def _linear(visit: _Visit, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    module = visit.use.module
    return _Linear.apply(x, module.weight, module.bias, visit)


def _embedding(visit: _Visit, original: Callable[..., Tensor], ids: Tensor) -> Tensor:
    module = visit.use.module
    padding_idx = module.padding_idx if module.padding_idx is not None else -1
    return _Embedding.apply(module.weight, ids, padding_idx, visit)


def _scale(visit: _Visit, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    module = visit.use.module
    if isinstance(module, nn.RMSNorm):
        # torch's fused kernels take a vector only, so the scale is applied to what they give without one.
        return F.rms_norm(x, module.normalized_shape, None, module.eps) * _Expand.apply(module.weight, x.shape, visit)
    if isinstance(module, nn.LayerNorm):
        out = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        out = out * _Expand.apply(module.weight, x.shape, visit)
        if visit.use.bias is None:
            return out if module.bias is None else out + module.bias
        return out + _Expand.apply(module.bias, x.shape, replace(visit, use=visit.use.bias))
    weight = module.weight
    module._parameters["weight"] = _Expand.apply(weight, x.shape, visit)
    try:
        return original(x)
    finally:
        module._parameters["weight"] = weight
