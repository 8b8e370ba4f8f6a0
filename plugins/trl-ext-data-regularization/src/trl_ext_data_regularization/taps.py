"""Modules whose backward pass asks, layer by layer, how much each sample's gradient counts.

The forward pass is that of the module. In the backward pass the gradient of the input is left as it is, so that the
layers below see what they would see in plain training, and only the rows that make up the parameters' gradient are
scaled, or left out: at most one ordinary weight-gradient matmul, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_ext_data_regularization.fused_head import HeadTap
from trl_ext_data_regularization.layers import ANY_LAYER, Batch, Use
from trl_ext_data_regularization.visitors import Choice, Visitor


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
                head = HeadTap(self.current, model, use, temperature)
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

    def current(self) -> tuple[Visitor, Batch] | None:
        """What the backward pass of a forward made now asks, and its micro-batch; None where it is not to be tapped."""
        if self.visitor is None or self.batch is None or not torch.is_grad_enabled():
            return None
        return self.visitor, self.batch

    def _replace(self, use: Use) -> None:
        module, original = use.module, use.module.forward
        had_own = "forward" in vars(module)
        tapped = {"linear": _linear, "embedding": _embedding, "scale": _scale}[use.kind]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            current = self.current()
            return original(x, *args, **kwargs) if current is None else tapped(_Visit(use, *current), original, x)

        def undo() -> None:
            if had_own:
                module.forward = original
            else:
                del module.forward

        module.forward = forward
        self._undo.append(undo)


@dataclass(frozen=True)
class _Rows:
    """The tokens that make up a parameter's gradient: those of the samples kept, so that dropped ones cost nothing."""

    samples: Tensor | None
    """(k,) long: rows of the micro-batch; None for all."""
    weights: Tensor | None
    """(N,) weights of the tokens left, between -1 and 1; None where all are 1."""
    size: Tensor
    """() the factor that goes with them. The two apart keep a 0/1 choice exact in low precision."""

    def pick(self, values: Tensor) -> Tensor:
        """(N, D) the tokens left of (..., D)."""
        return self.pick_ids(values).reshape(-1, values.shape[-1])

    def pick_ids(self, values: Tensor) -> Tensor:
        """The rows left of (B, ...)."""
        return values if self.samples is None else values[self.samples]

    def weigh(self, values: Tensor) -> Tensor:
        """Tokens (N, D) times their weights."""
        return values if self.weights is None else values * self.weights.unsqueeze(1)


def _kept(choice: Choice) -> Tensor | None:
    """(k,) the samples whose weight is not zero; None where finding out would wait for the device."""
    if choice.count is not None:
        return choice.weights.abs().topk(choice.count).indices.sort().values
    return choice.weights.nonzero().flatten() if choice.weights.device.type == "cpu" else None


@dataclass(frozen=True)
class _Visit:
    """One use of one layer by one micro-batch."""

    use: Use
    visitor: Visitor
    batch: Batch

    def rows(self, x: Tensor | None, go: Tensor) -> _Rows | None:
        """Show the tokens to the visitor, and give those that make up the parameters' gradient.

        Args:
            x: (..., I) input, (...) ids, or None for a scale.
            go: (..., O) gradient of the output.

        Returns:
            The tokens that count, and how much; None for no parameter gradient.
        """
        index = self._index(go)
        if self.visitor.scoring:
            flat = None if x is None else x.reshape(index.numel(), -1) if x.is_floating_point() else x.reshape(-1)
            self.visitor.score(self.use, flat, go.reshape(index.numel(), -1), index, self.batch)
        choice = self.visitor.choice(self.use, self.batch)
        if choice is None:
            return None
        size = choice.weights.abs().max()
        relative = choice.weights / size.clamp(min=torch.finfo(choice.weights.dtype).tiny)
        kept = _kept(choice) if self.batch.by_row and len(go) == self.batch.samples else None
        if kept is None:
            return _Rows(None, relative.to(go.dtype)[index], size)
        samples = None if len(kept) == self.batch.samples else kept
        if choice.equal:
            return _Rows(samples, None, size)
        per_token = relative[kept].to(go.dtype).repeat_interleave(index.numel() // self.batch.samples)
        return _Rows(samples, per_token, size)

    def _index(self, go: Tensor) -> Tensor:
        """(N,) the sample of each row of go, where N counts heads too if there are any."""
        index, shape = self.batch.index, go.shape[:-1]
        if shape.numel() == index.numel():
            return index.reshape(-1)
        if shape[: index.dim()] == index.shape:  # (B, T, heads, O)
            return index.reshape(*index.shape, *[1] * (len(shape) - index.dim())).expand(shape).reshape(-1)
        raise RuntimeError(
            f"layer {self.use.name} sees tokens of shape {tuple(shape)} where the batch has {tuple(index.shape)}, so "
            f"its samples cannot be told apart; {ANY_LAYER}"
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
        rows = ctx.visit.rows(x, go)
        if rows is None:
            return grad_x, None, None, None
        picked, inputs = rows.pick(go), rows.pick(x)
        weighed = rows.weigh(picked) if ctx.needs_input_grad[2] or picked.shape[1] <= inputs.shape[1] else None
        grad_weight, grad_bias = None, None
        if ctx.needs_input_grad[1]:
            # The narrower side carries the weights.
            product = picked.t() @ rows.weigh(inputs) if weighed is None else weighed.t() @ inputs
            grad_weight = product.to(weight.dtype).mul_(rows.size)
        if ctx.needs_input_grad[2]:
            assert weighed is not None
            grad_bias = weighed.sum(0).to(ctx.bias_dtype).mul_(rows.size)
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
        rows = ctx.visit.rows(ids, go)
        if rows is None:
            return None, None, None, None
        ids, scaled = rows.pick_ids(ids).reshape(-1), rows.weigh(rows.pick(go))
        grad = torch.ops.aten.embedding_dense_backward(scaled, ids, ctx.rows, ctx.padding_idx, False)
        return grad.mul_(rows.size), None, None, None


class _Expand(torch.autograd.Function):
    """A vector of parameters, one copy per token: the gradient arrives token by token."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: torch.Size, visit: _Visit) -> Tensor:
        ctx.visit, ctx.dtype = visit, weight.dtype
        return weight.expand(shape)

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.visit.rows(None, go)
        if rows is None:
            return None, None, None
        return rows.weigh(rows.pick(go)).sum(0).to(ctx.dtype).mul_(rows.size), None, None


def _linear(visit: _Visit, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    module = visit.use.module
    return _Linear.apply(x, module.weight, module.bias, visit)


def _embedding(visit: _Visit, original: Callable[..., Tensor], ids: Tensor) -> Tensor:
    module = visit.use.module
    padding_idx = module.padding_idx if module.padding_idx is not None else -1
    return _Embedding.apply(module.weight, ids, padding_idx, visit)


def _scale(visit: _Visit, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    module = visit.use.module
    if type(module).forward is nn.RMSNorm.forward:
        # torch's fused kernels take a vector only, so the scale is applied to what they give without one.
        return F.rms_norm(x, module.normalized_shape, None, module.eps) * _Expand.apply(module.weight, x.shape, visit)
    if type(module).forward is nn.LayerNorm.forward:
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
