"""One pass over the LM heads of a model and of a reference: each token's loss and its gradient, a tile at a time.

    loss_i = a_i NLL_i + b KL(p_ref || p)_i,    d loss_i / d logits = (a_i + b) p - b p_ref - a_i onehot(label)

A tile is of a few tokens and the whole vocabulary, so its gradient is known while it is there. Projecting it a second
time in the backward pass, as TRL's kernels do to save memory, is needed only where the backward pass weighs the tokens
apart: the gradient of the hidden states follows any weights of tokens, and that of the head one weight of them all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_AS_THEY_ARE = {
    "s_scale": 1.0, "s_softcap": 1.0, "t_scale": 1.0, "t_softcap": 1.0, "inv_t": 1.0,
    "S_HAS_SOFTCAP": False, "T_HAS_SOFTCAP": False,
}  # fmt: skip
"""What TRL's kernels may do to logits before they take the softmax."""


class Head(NamedTuple):
    """Hidden states, and the LM head that they go through."""

    hidden: Tensor
    """(N, H)."""
    weight: Tensor
    """(V, H)."""
    bias: Tensor | None
    """(V,)."""


def nll_and_kl(model: Head, reference: Head, labels: Tensor, nll_weights: Tensor, kl_weight: float) -> Tensor:
    """`nll_weights NLL + kl_weight KL(p_ref || p)` in nats, in the precision of the surrounding autocast.

    Args:
        model: what the gradient flows to.
        reference: of the same vocabulary; gets no gradient.
        labels: (N,) long.
        nll_weights: (N,) float, at least 0; gets no gradient.
        kl_weight: at least 0.

    Returns:
        (N,) float32.
    """
    loss = _NLLAndKL.apply(*model, reference, labels, nll_weights, kl_weight, torch.is_grad_enabled())
    return cast("Tensor", loss)


class _NLLAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Head,
        labels: Tensor,
        nll_weights: Tensor,
        kl_weight: float,
        training: bool,
    ) -> Tensor:
        from trl.kernels.chunked_divergence import _compute_dtype

        ctx.save_for_backward(hidden, weight, bias)
        dtype = _compute_dtype(hidden)
        ctx.again = partial(_pass, reference, labels, nll_weights.detach().float(), float(kl_weight), dtype)
        wanted = ctx.needs_input_grad[:3] if training else (False, False, False)
        with torch.autocast(hidden.device.type, enabled=False):  # it would round the terms of the divergence, too
            loss, ctx.gradients = ctx.again(Head(hidden, weight, bias), wanted)
        return cast("Tensor", loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        model, wanted = Head(*ctx.saved_tensors), ctx.needs_input_grad[:3]
        gradients, ctx.gradients = ctx.gradients, None  # the backward pass of the backbone needs the memory
        if any(wanted[1:]) and not bool((upstream == upstream[:1]).all()):
            gradients = None  # before the pass below, which makes tensors as large
        if gradients is None:
            _, gradients = ctx.again(model, wanted, upstream)
        else:
            common = upstream[:1].sum()  # 0 where there is no token
            factors = upstream.unsqueeze(1), common, common
            gradients = [None if g is None else g.mul_(f) for g, f in zip(gradients, factors, strict=True)]
        given = [
            g.to(x.dtype) if g is not None and x is not None else None for g, x in zip(gradients, model, strict=True)
        ]
        return (*given, *(None,) * 5)


def _pass(
    reference: Head,
    labels: Tensor,
    nll_weights: Tensor,
    kl_weight: float,
    dtype: torch.dtype,
    model: Head,
    wanted: tuple[bool, bool, bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss (N,), and the wanted fp32 gradients of its sum by parts of `model`, tokens weighted by `upstream`."""
    from trl.kernels.chunked_divergence import _project
    from trl.kernels.chunked_logprob import _addmm_fp32, _use_triton

    device, tokens, vocabulary = model.hidden.device, len(model.hidden), len(model.weight)
    # Rounded once; on CPU the products are in fp32, as TRL's are.
    rounded = [None if x is None else x.detach().to(dtype) for x in (*model, *reference)]
    operands = rounded if device.type == "cuda" else [None if x is None else x.float() for x in rounded]
    own, other = Head(*operands[:3]), Head(*operands[3:])  # type: ignore[arg-type]
    gradients = [
        torch.zeros_like(x, dtype=torch.float32) if x is not None and want else None
        for x, want in zip(own, wanted, strict=True)
    ]
    losses = torch.empty(tokens, device=device)
    rows = min(tokens, _rows(device, vocabulary))
    buffers = torch.empty(2, rows, vocabulary, device=device)
    fold = _kernel_tile if _use_triton(device) else _torch_tile
    for start in range(0, tokens, max(rows, 1)):
        here = slice(start, min(start + rows, tokens))
        logits, ref_logits = buffers[:, : here.stop - start]
        for tile, head in ((logits, own), (ref_logits, other)):
            _project(tile, head.hidden[here], head.weight, head.bias, 0, vocabulary, head.weight.dtype)
        losses[here], gradient = fold(logits, ref_logits, labels[here], nll_weights[here], kl_weight)
        if not any(wanted):
            continue
        if upstream is not None:
            gradient.mul_(upstream[here].unsqueeze(1))
        for_hidden, for_weight, for_bias = gradients
        product = gradient.to(own.weight.dtype)
        if for_hidden is not None:
            _addmm_fp32(for_hidden[here], product, own.weight)
        if for_weight is not None:
            _addmm_fp32(for_weight, product.t(), own.hidden[here])
        if for_bias is not None:
            for_bias += gradient.sum(0)
    return losses, gradients


def _rows(device: torch.device, vocabulary: int) -> int:
    """Tokens of a tile: on CPU as few as keep products fast and a tile in the cache, else two tiles of half a GiB."""
    return 256 if device.type == "cpu" else max(256, (1 << 27) // vocabulary)


def _torch_tile(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, nll_weights: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss (n,) of the tokens of a tile, and its gradient (n, V) by their logits; both (n, V) tiles are used up."""
    places, weights = labels.unsqueeze(1), nll_weights.unsqueeze(1)
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    q = torch.exp(log_q, out=ref_logits)
    nll = -log_p.gather(1, places).squeeze(1)
    kl = torch.linalg.vecdot(q, log_q.sub_(log_p))
    gradient = log_p.exp_().mul_(weights + kl_weight).sub_(q, alpha=kl_weight).scatter_add_(1, places, -weights)
    return nll_weights * nll + kl_weight * kl, gradient


def _kernel_tile(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, nll_weights: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """As `_torch_tile`, by TRL's Triton kernels, which go through both tiles once for each of the two.

    They give `p - p_ref`; with `log(a + b)` and `log b` in the logarithms of the sums it is `(a + b) p - b p_ref`.
    """
    from trl.kernels.chunked_divergence import _backward_kernel, _backward_tile, _stats_kernel, _stats_tile
    from trl.kernels.chunked_logprob import _BLOCK_SIZE, _use_triton

    n, vocabulary = logits.shape
    triton = _use_triton(logits.device)  # else what TRL has in their place
    statistics = _stats_kernel[(n,)] if triton else _stats_tile
    backward = _backward_kernel[(n, -(-vocabulary // _BLOCK_SIZE))] if triton else _backward_tile
    tiles = logits, logits.stride(0), ref_logits, ref_logits.stride(0)
    how = {"BLOCK_SIZE": _BLOCK_SIZE, **_AS_THEY_ARE}

    folded = logits.new_zeros(7, n)
    largest, total, _, ref_largest, ref_total, gap, _ = folded
    largest.fill_(-torch.inf)
    ref_largest.fill_(-torch.inf)
    statistics(*tiles, *folded, vocabulary, **how)
    log_z, ref_log_z = largest + total.log(), ref_largest + ref_total.log()
    kl = gap / ref_total - ref_log_z + log_z
    places = labels.unsqueeze(1)
    nll = log_z - logits.gather(1, places).squeeze(1)

    weighted, ref_weighted = log_z - (nll_weights + kl_weight).log(), ref_log_z - torch.full_like(kl, kl_weight).log()
    backward(*tiles, weighted, ref_weighted, kl, torch.ones_like(kl), vocabulary, 0.0, MODE=0, **how)
    gradient = logits.scatter_add_(1, places, -nll_weights.unsqueeze(1))
    return nll_weights * nll + kl_weight * kl, gradient
