"""What the choice did: shares kept, angles, position between the two extremes, and what became of each sample."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_ext.gradients import GradientView
from trl_ext_data_regularization.solvers import Problem, Solution

_SHOWN = 40  # tokens of a sample that are kept, to show how it begins


@dataclass
class Seen:
    """What became of one sample, over all its appearances on this rank."""

    tokens: list[int]
    times: int = 0
    kept: float = 0.0
    """Sum over the appearances of the share of layers that kept it."""
    weight: float = 0.0
    """Sum over the appearances of its mean weight over layers; 1 is what plain training gives."""


@dataclass
class Recorder:
    """Collects on the device, without waiting for it; numbers are read when they are logged.

    Args:
        names: of the layers, or "all" in global scope.
        types: type of each layer.
        keep: whether to keep the shares of every step, and not of the last one alone.
        limit: samples to keep track of; later ones are not counted.
    """

    names: Sequence[str]
    types: Sequence[str]
    keep: bool = False
    limit: int = 100_000
    seen: dict[str, Seen] = field(default_factory=dict)
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    """Step, and (L,) the share of this rank's samples that each layer kept; complete after `settle`."""
    _new: list[tuple[int, Tensor]] = field(default_factory=list)
    _sums: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def record(self, step: int, weights: Tensor) -> None:
        """Note a step's weights (L, n). The share of a layer that could not choose (NaN weights) is NaN."""
        if weights.numel():
            share = torch.where(torch.isfinite(weights).all(1), (weights != 0).float().mean(1), torch.nan)
            if not self.keep:
                self._new.clear()
            self._new.append((step, share))
            self._sums["kept"].append(share.mean())

    def settle(self) -> None:
        """Take to the host what is still on the device, which a long run would fill with small tensors."""
        new, self._new = [(step, share.cpu()) for step, share in self._new], []
        if new and not self.keep:
            self.history.clear()
        self.history.extend(new)

    def add(self, name: str, value: Tensor) -> None:
        """Note a number to be averaged until the next log, unless it is NaN or infinite by then."""
        self._sums[name].append(value.detach().float().mean())

    def geometry(self, types: Sequence[str], terms: Tensor) -> None:
        """Note `cosine` and `position`, over all layers and by type.

        The cosine is that of t and the mean general gradient g. The position of u is |u - g| / (|u - g| + |u - t|):
        0 is full training (all bias, least variance), 1 is target only.

        Args:
            types: type of each of the L rows.
            terms: (L, 5), the columns of `gram_terms`.
        """
        groups = sorted(set(types))
        index = torch.tensor([groups.index(kind) for kind in types], device=terms.device)
        by_type = terms.new_zeros(len(groups), 5).index_add_(0, index, terms)
        gg, tg, tt, to_mean, to_target = torch.cat([terms.sum(0, keepdim=True), by_type]).unbind(1)
        tiny = torch.finfo(torch.float32).tiny
        # Of the roots: the product of small squares would be 0 in fp32.
        cosine = tg / (gg.clamp(min=0).sqrt() * tt.sqrt()).clamp(min=tiny)
        near, far = to_mean.clamp(min=0).sqrt(), to_target.clamp(min=0).sqrt()
        position = near / (near + far).clamp(min=tiny)
        shown = ["", *(f"/{kind}" for kind in groups)] if len(groups) > 1 else [""]
        for i, suffix in enumerate(shown):
            self.add(f"cosine{suffix}", cosine[i])
            self.add(f"position{suffix}", position[i])

    def metrics(self) -> dict[str, float]:
        """Means since the last call, and the shares kept by type of layer at the last step."""
        out = {name: _mean_of_finite(torch.stack(values)) for name, values in self._sums.items()}
        out = {name: value for name, value in out.items() if math.isfinite(value)}
        self._sums.clear()
        self.settle()
        if self.history and len(self.types) > 1:
            by_type = defaultdict(list)
            for kind, share in zip(self.types, self.history[-1][1].tolist(), strict=True):
                if math.isfinite(share):
                    by_type[kind].append(share)
            out.update({f"kept/{kind}": sum(shares) / len(shares) for kind, shares in by_type.items()})
        return out

    def note_samples(self, ids: Sequence[list[int]], weights: Tensor) -> None:
        """Count samples, told apart by their tokens. A step without a choice (NaN weights) does not count.

        Args:
            ids: n lists of token ids.
            weights: (L, n).
        """
        if not torch.isfinite(weights).all():
            return
        kept, mean = (weights != 0).float().mean(0).tolist(), weights.mean(0).tolist()
        for tokens, share, weight in zip(ids, kept, mean, strict=True):
            name = sample_id(tokens)
            if name not in self.seen:
                if len(self.seen) >= self.limit:
                    continue
                self.seen[name] = Seen(tokens[:_SHOWN])
            self.seen[name].times += 1
            self.seen[name].kept += share
            self.seen[name].weight += weight

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Shares kept and samples counted so far, on this rank."""
        self.settle()
        history, seen = self.history, self.seen.values()
        tokens = torch.full((len(seen), _SHOWN), -1, dtype=torch.int32)
        for row, one in zip(tokens, seen, strict=True):
            row[: len(one.tokens)] = torch.tensor(one.tokens, dtype=torch.int32)
        return {
            "layers": list(self.names),
            "steps": torch.tensor([step for step, _ in history], dtype=torch.int64),
            "shares": torch.stack([share for _, share in history]) if history else torch.zeros(0, len(self.names)),
            "samples": list(self.seen),
            "tokens": tokens,
            "counts": torch.tensor([[x.times, x.kept, x.weight] for x in seen], dtype=torch.float64).view(-1, 3),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting.

        Raises:
            ValueError: the layers are others than those of the checkpoint.
        """
        if state["layers"] != list(self.names):
            raise ValueError(
                f"the checkpoint's diagnostics are of {len(state['layers'])} layers, this run has {len(self.names)} or "
                "other ones; keep scope, engine and trainable parameters, or set reset_plugin_state=True"
            )
        self.history = list(zip(state["steps"].tolist(), state["shares"].unbind(0), strict=True))
        self.seen = {
            name: Seen([t for t in tokens if t >= 0], int(times), kept, weight)
            for name, tokens, (times, kept, weight) in zip(
                state["samples"], state["tokens"].tolist(), state["counts"].tolist(), strict=True
            )
        }


def _mean_of_finite(values: Tensor) -> float:
    """The mean of those of (N,) values that are finite; NaN where none is."""
    return float(values[torch.isfinite(values)].mean())


def gram_terms(problem: Problem, solution: Solution, squared_target_norm: Tensor) -> Tensor:
    """(L, 5) |g|^2, <t, g>, |t|^2, |u - g|^2 and |u - t|^2 of each layer, by its Gram matrix.

    Args:
        problem: (L, n), with K.
        solution: its solution.
        squared_target_norm: (L,) |t|^2.
    """
    assert problem.K is not None
    s, K, w, a, tt = problem.s, problem.K, solution.weights, solution.target, squared_target_norm.to(problem.s)

    def squared_norm(v: Tensor, b: Tensor) -> Tensor:
        """|sum_i v_i g_i + b t|^2"""
        return torch.einsum("...i,...ij,...j->...", v, K, v) + 2 * b * (v * s).sum(-1) + b * b * tt

    return torch.stack([K.sum((-1, -2)), s.sum(-1), tt, squared_norm(w - 1, a), squared_norm(w, a - 1)], -1)


def view_terms(update: GradientView, target: GradientView, general: GradientView) -> Tensor:
    """(P, 5) the same of each parameter, from the gradients themselves: exact, whatever the engine."""
    tt, tg, _, gg = target.grams(general).flatten(1).unbind(1)
    uu, ug, _, _ = update.grams(general).flatten(1).unbind(1)
    return torch.stack([gg, tg, tt, uu - 2 * ug + gg, uu - 2 * update.dots(target) + tt], -1)


def sample_id(tokens: Sequence[int]) -> str:
    """The name of a sample in the table: a hash of its token ids."""
    return hashlib.blake2b(repr(list(tokens)).encode(), digest_size=6).hexdigest()


def token_lists(micro_batches: Sequence[Mapping[str, Tensor]], indices: Sequence[Tensor]) -> list[list[int]]:
    """The token ids of each sample of a window, without padding."""
    out: list[list[int]] = []
    for inputs, index in zip(micro_batches, indices, strict=True):
        mask = inputs.get("attention_mask")
        ids, owner = inputs["input_ids"].flatten().tolist(), index.flatten().tolist()
        real = [1] * len(ids) if mask is None else mask.flatten().tolist()
        lists: list[list[int]] = [[] for _ in range(owner[-1] + 1)]
        for token, sample, counts in zip(ids, owner, real, strict=True):
            if counts:
                lists[sample].append(token)
        out.extend(lists)
    return out
