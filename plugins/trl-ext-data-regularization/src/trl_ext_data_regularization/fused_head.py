"""The LM head under TRL's fused log-probabilities, where logits exist only tile by tile and no module is called.

TRL's kernel gives the head's weight gradient as one sum over all tokens. Scaling the gradients of the log-probabilities
by w_i on the way in, and the gradient of the hidden states by 1 / w_i on the way out, weighs the samples in that sum
and nowhere else, at the cost of two elementwise products. Scores need the gradient of the logits, which is recomputed
in tiles: once per step, one matmul more.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.gradients import whole_tensor
from trl_ext.own_passes import causal_lm
from trl_ext_data_regularization.layers import ANY_LAYER, Batch, Use
from trl_ext_data_regularization.visitors import Visitor

_TILE = 512  # tokens
# Stands for a weight of 0: it must be undone by a division. A power of two, so that undoing it is exact; next to a kept
# sample's gradient, 2^-60 of a dropped one is lost in fp32's rounding.
_NOTHING = 2.0**-60


class HeadTap:
    """Hooks on the model that let each forward pass of the fused head be scored and weighed.

    Args:
        current: gives the visitor and the micro-batch of a forward made now, or None where it is not to be tapped.
        model: the unwrapped model, perhaps under PEFT.
        use: the head.
        temperature: what the fused head divides the logits by.
    """

    def __init__(
        self,
        current: Callable[[], tuple[Visitor, Batch] | None],
        model: nn.Module,
        use: Use,
        temperature: float,
    ) -> None:
        self._current = current
        self.use = use
        self.temperature = temperature
        self.base = causal_lm(model)
        self._pass: _Pass | None = None
        self._checked = False
        backbone: Any = self.base.base_model
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._hidden),
            model.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current = self._current()
        if current is None:
            return
        if not kwargs.get("fused_lm_head"):
            raise RuntimeError(
                f"the head '{self.use.name}' is scored under TRL's fused log-probabilities alone, and the model was "
                "called without them; freeze the head"
            )
        visitor, batch = current
        self._pass = _Pass(self, visitor, batch, kwargs["labels"][:, 1:])
        if not visitor.weighing:
            # The kernel would compute the weight's gradient for nothing, and leave it in `.grad`.
            # Detached when it is read: FSDP2 gathers the weights only then.
            self.base.get_output_embeddings = lambda: SimpleNamespace(**_detached(self.use.module))

    def _hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            if self._pass.visitor.scoring:
                self._pass.hidden = output.last_hidden_state.detach()[:, :-1]
            output.last_hidden_state = _Undo.apply(output.last_hidden_state, self._pass)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        vars(self.base).pop("get_output_embeddings", None)
        current, self._pass = self._pass, None
        if current is not None:
            if current.visitor.scoring:
                current.log_probs = output.log_probs.detach().float()
            output.log_probs, output.entropy = _Scale.apply(output.log_probs, output.entropy, current)


class _Pass:
    """One forward and backward of the head."""

    def __init__(self, tap: HeadTap, visitor: Visitor, batch: Batch, labels: Tensor) -> None:
        self.tap = tap
        self.visitor = visitor
        self.batch = batch
        self.index = batch.index[:, :-1]
        self.labels = labels
        self.hidden: Tensor
        self.log_probs: Tensor
        self.undo: Tensor | None = None
        self.differentiated = False
        """Whether the backward pass has come through the head's log-probabilities."""

    def head(self) -> tuple[Tensor, Tensor | None]:
        """(V, H) and (V,) in the hidden states' dtype. Collective where FSDP2 has not gathered them, or no longer."""
        weight, bias = (
            None if part is None else whole_tensor(part).to(self.hidden.dtype)
            for part in _detached(self.tap.use.module).values()
        )
        assert weight is not None
        return weight, bias

    def logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(len(rows), V) float of the label positions `rows`, counted over the flattened batch."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
        return nn.functional.linear(hidden, weight, bias).float().div_(self.tap.temperature)

    def _check(self, labelled: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Refuse a head that does more than a product, at the first labels: its scores would be wrong."""
        rows = labelled[:8]
        if self.tap._checked or not len(rows):
            return
        labels = self.labels.flatten()[rows].unsqueeze(1)
        mine = torch.log_softmax(self.logits(rows, weight, bias), -1).gather(1, labels).squeeze(1)
        theirs = self.log_probs.flatten()[rows]
        # bf16 logits differ by about 2^-8 of their size between two orders of summation.
        if not torch.allclose(mine, theirs, rtol=0.05, atol=0.05):
            raise RuntimeError(
                f"the head '{self.tap.use.name}' scales or caps its logits, which scores by layer do not follow; "
                f"{ANY_LAYER}"
            )
        self.tap._checked = True

    def score(self, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> None:
        """Show the head's tokens to the visitor, tile by tile."""
        nothing, head = torch.zeros((), device=self.labels.device), self.head()
        labelled = (self.labels != -100).flatten().nonzero().flatten()
        self._check(labelled, *head)
        for rows in labelled.split(_TILE):
            v = nothing if grad_log_probs is None else grad_log_probs.flatten()[rows].float().unsqueeze(1)
            log_p = self._log_softmax(rows, *head)
            if grad_entropy is None:
                # In place: a tile of logits is large, and every pass over it costs.
                go = log_p.exp_().mul_(-v / self.tap.temperature)
            else:
                p = log_p.exp()
                entropy = -(p * log_p).sum(-1, keepdim=True)
                ve = grad_entropy.flatten()[rows].float().unsqueeze(1)
                go = (log_p + entropy).mul_(-ve).sub_(v).mul_(p).div_(self.tap.temperature)
            if grad_log_probs is not None:
                go.scatter_add_(1, self.labels.flatten()[rows].unsqueeze(1), v / self.tap.temperature)
            hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
            self.visitor.score(self.tap.use, hidden, go.to(hidden.dtype), self.index.flatten()[rows], self.batch)
        del self.hidden, self.log_probs  # the kernel's backward pass, which follows, is where memory is scarcest

    def _log_softmax(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(len(rows), V) float."""
        logits = self.logits(rows, weight, bias)
        if self.hidden.dtype == torch.float32:
            # The kernel has given the labels' log-probabilities, which say what to subtract.
            label = logits.gather(1, self.labels.flatten()[rows].unsqueeze(1))
            return logits.sub_(label - self.log_probs.flatten()[rows].unsqueeze(1))
        # In lower precision its logits and these are rounded apart, and p would not sum to one.
        return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _detached(head: Any) -> dict[str, Tensor | None]:
    """Weight and bias of a head, as they are at the moment: shards or whole ones under FSDP2."""
    return {"weight": head.weight.detach(), "bias": None if head.bias is None else head.bias.detach()}


class _Scale(torch.autograd.Function):
    """The identity; its backward pass scores the head, and scales by the samples' weights."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, entropy: Tensor | None, current: _Pass) -> tuple[Tensor, Tensor | None]:
        ctx.current = current
        ctx.set_materialize_grads(False)
        return log_probs.view_as(log_probs), None if entropy is None else entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, ve: Tensor | None) -> tuple[Tensor | None, ...]:
        current: _Pass = ctx.current
        current.differentiated = True
        if current.visitor.scoring:
            current.score(v, ve)
        choice = current.visitor.choice(current.tap.use, current.batch)
        if choice is None:
            return v, ve, None
        weights = choice.weights
        floor = weights.abs().max().clamp(min=1) * _NOTHING
        rows = torch.where(weights.abs() < floor, floor, weights).float()[current.index]
        current.undo = rows
        return None if v is None else v * rows, None if ve is None else ve * rows, None


class _Undo(torch.autograd.Function):
    """The identity; its backward pass takes the weights off again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, current: _Pass) -> Tensor:
        ctx.current = current
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        current: _Pass = ctx.current
        if not current.differentiated:
            raise RuntimeError(
                f"the head '{current.tap.use.name}' is scored under TRL's fused log-probabilities alone, and the loss "
                f"goes past them to the hidden states, as that of asft does; {ANY_LAYER}"
            )
        undo = current.undo
        if undo is None:
            return grad, None
        last = torch.ones_like(undo[:, :1])  # the last position predicts nothing
        return (grad.float() / torch.cat([undo, last], 1).unsqueeze(-1)).to(grad.dtype), None
