"""TRL's fused LM head, with outputs that TRL's own does not have: the label's rank and the largest log-probabilities.

The head projects a tile of logits at a time, tokens by vocabulary, and folds each into running statistics by a function
of `trl.kernels.chunked_logprob`. While a forward with outputs of ours runs, that function is followed by one that folds
the same tile into ours. So there is no second projection, and no more logits at once than TRL's tile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

_head: Any = import_module("trl.trainer.utils")
_kernels: Any = import_module("trl.kernels.chunked_logprob")

OF_TRL = ("log_sum_sq_probs", "mean_logits", "is_top1")
"""What a plugin may ask of TRL's own head, beside the log-probabilities and the entropy."""
RANK = "label_rank"
_TOP = re.compile(r"top([1-9]\d{0,3})_log_probs")
OFFERED = f"{', '.join(OF_TRL)}, {RANK} and topK_log_probs, such as top8_log_probs,"


def is_offered(output: str) -> bool:
    """Whether the head has an output of this name."""
    return output in (*OF_TRL, RANK) or _TOP.fullmatch(output) is not None


@dataclass
class HeadOutput(FusedCausalLMOutput):
    """What the head gives where some of it is ours."""

    extras: dict[str, Tensor] | None = None
    """Our outputs: `label_rank` (B, T) long, `topK_log_probs` (B, T, K) float; 0 where there is no label."""


def head_outputs(outputs: FusedCausalLMOutput, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of the head's outputs that are named, TRL's and ours."""
    ours = outputs.get("extras", {})
    return {name: ours[name] if name in ours else outputs[name] for name in names}


def add_head(model: nn.Module, outputs: Sequence[str], cast_to_fp32: bool = False) -> None:
    """Give `model` TRL's fused LM head, in place of the one it may have, with outputs of TRL and of ours.

    Args:
        model: The bare model, without PEFT's wrapper.
        outputs: Names of TRL's fields, and of those in `HeadOutput.extras`.
        cast_to_fp32: As TRL's `cast_lm_head_to_fp32`.
    """
    ours = [name for name in dict.fromkeys(outputs) if name == RANK or _TOP.fullmatch(name)]
    of_trl = tuple(name for name in dict.fromkeys(outputs) if name not in ours)
    add_fused_lm_head(model, cast_lm_head_to_fp32=cast_to_fp32, outputs=of_trl)
    if not ours:
        return
    head: Any = model.forward
    trl_forward = head.__func__  # accelerate and copies of the model bind it to another instance

    @wraps(trl_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return trl_forward(self, *args, **kwargs)
        statistics = TileStatistics(ours)
        with statistics.folded():
            result = trl_forward(self, *args, **kwargs)
        return HeadOutput(**result, extras=statistics.extras(result.label_mask))

    model.forward = MethodType(forward, model)


class TileStatistics:
    """What is folded of the tiles of one forward.

    A tile that comes before the label's needs the label's logit beforehand, so each is computed once from hidden state
    and weight (a product of vectors), and replaced by the tile's own when that comes. In a vocabulary of several tiles
    the two may differ by rounding, and so a token whose logit is that near to the label's may be counted or not.

    Args:
        outputs: Names of ours.
    """

    def __init__(self, outputs: Sequence[str]) -> None:
        self.outputs = outputs
        self.top = max((_top(name) for name in outputs), default=0)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the tiles that TRL's head goes through inside of the block."""
        function, tile, kernel = _head._ChunkedLogProbFunction, _kernels._forward_tile, _kernels._forward_kernel
        _head._ChunkedLogProbFunction = SimpleNamespace(apply=partial(self._apply, function.apply))
        _kernels._forward_tile = partial(self._fold, tile)
        _kernels._forward_kernel = _Launched(kernel, self._fold)
        try:
            yield
        finally:
            _head._ChunkedLogProbFunction = function
            _kernels._forward_tile, _kernels._forward_kernel = tile, kernel

    def extras(self, mask: Tensor) -> dict[str, Tensor]:
        """The outputs by name, 0 where `mask` (B, T) bool is False; collected after the forward."""
        values = {RANK: self._rank} if RANK in self.outputs else {}
        values |= {name: self._top_log_probs[:, : _top(name)] for name in self.outputs if _top(name)}
        return {name: _at(mask, value) for name, value in values.items()}

    def _apply(self, apply: Callable[..., Any], hidden: Tensor, weight: Tensor, bias: Any, *others: Any) -> Any:
        """TRL's `ChunkedLogProbFunction.apply`: (N, H) hidden states, (V, H) and (V,) head, (N,) targets and more."""
        self._hidden, self._weight, self._bias = hidden.detach(), weight.detach(), bias
        if self.top > len(weight):
            raise ValueError(f"fused_outputs: top{self.top}_log_probs of a vocabulary of {len(weight)} tokens")
        self._seen = 0  # tokens whose tiles have begun to come
        tokens, new = len(hidden), partial(torch.zeros, device=hidden.device)
        self._rank = new(tokens, dtype=torch.long)
        self._top_log_probs = new(tokens, self.top)
        outputs = apply(hidden, weight, bias, *others)
        del self._hidden, self._weight, self._bias
        return outputs

    def _fold(self, fold: Callable[..., None], tile: Tensor, *arguments: Any, **options: Any) -> None:
        """TRL's fold of a tile, and ours: (n, C) logits of n tokens, not scaled yet, from `start` in the vocabulary."""
        fold(tile, *arguments, **options)
        _, targets, running_max, sum_exp, *_, start, _ = arguments
        if start == 0:
            self._rows = slice(self._seen, self._seen + len(tile))
            self._seen = self._rows.stop
            self._largest = tile.new_full((len(tile), self.top), -torch.inf)
        if RANK in self.outputs:
            if start == 0:
                self._label = self._label_logits(targets, tile.dtype)
            local = targets - start
            here = (local >= 0) & (local < tile.shape[1])
            own = tile.gather(1, local.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)
            self._label = torch.where(here, own, self._label)
            self._rank[self._rows] += (tile > self._label.unsqueeze(1)).sum(1)
        if self.top:
            candidates = torch.cat([self._largest, tile.topk(min(self.top, tile.shape[1])).values], dim=1)
            self._largest = candidates.topk(self.top).values
            scaling = {k: v for k, v in options.items() if k in ("logit_scale", "softcap", "inv_t", "HAS_SOFTCAP")}
            log_z = running_max + sum_exp.log()  # of the tiles so far; of all, after the last
            scaled = _kernels._torch_transform(self._largest.float(), **scaling)
            self._top_log_probs[self._rows] = scaled - log_z.unsqueeze(1)

    def _label_logits(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """(n,) the labels' logits, rounded as the tile's are."""
        hidden, weight = self._hidden[self._rows].to(dtype), self._weight[targets].to(dtype)
        logits = torch.bmm(hidden.unsqueeze(1), weight.unsqueeze(2)).flatten()
        return logits if self._bias is None else logits + self._bias.detach()[targets].to(dtype)


@dataclass(frozen=True)
class _Launched:
    """TRL's Triton kernel with its grid, `kernel[grid](...)`, followed by our fold."""

    kernel: Any
    fold: Callable[..., None]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.fold, self.kernel[grid])


def _top(output: str) -> int:
    """How many log-probabilities an output names, 0 for another output."""
    found = _TOP.fullmatch(output)
    return int(found[1]) if found else 0


def _at(mask: Tensor, values: Tensor) -> Tensor:
    """(B, T, ...) the values of the labelled positions, or of all of them, in their places; 0 at the others."""
    if len(values) == mask.numel():
        values = values.view(*mask.shape, *values.shape[1:])
        return torch.where(mask.view(*mask.shape, *[1] * (values.dim() - 2)), values, 0)
    placed = values.new_zeros(*mask.shape, *values.shape[1:])
    placed[mask] = values
    return placed
