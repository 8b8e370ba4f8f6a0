"""What the choice did: shares kept, angles, position between the two extremes; a plot and a table of samples."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_ext_data_regularization.solvers import Problem, Solution, squared_distance


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
        types: type of each layer, or one name for all of them in global scope.
        tokenizer: decodes the beginnings of samples in the table.
        limit: samples to keep track of; later ones are not counted.
    """

    types: Sequence[str]
    tokenizer: Any = None
    limit: int = 100_000
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    """Per step, (L,) the share of its samples that each layer kept."""
    seen: dict[str, Seen] = field(default_factory=dict)
    _sums: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def record(self, step: int, weights: Tensor) -> None:
        """Note a step's weights (L, n)."""
        if weights.numel():
            self.history.append((step, (weights != 0).float().mean(1)))
            self._sums["kept"].append(self.history[-1][1].mean())

    def add(self, name: str, value: Tensor) -> None:
        """Note a number to be averaged until the next log."""
        self._sums[name].append(value.detach().float().mean())

    def geometry(self, problem: Problem, solution: Solution, squared_target_norm: Tensor) -> None:
        """Cosine of t and the mean general gradient, and where u lies between the two: 0 is full training (all bias,
        least variance), 1 is target only. Over all layers, from the Gram matrices.

        Args:
            problem: (L, n), with K.
            solution: its solution.
            squared_target_norm: (L,) |t|^2.
        """
        assert problem.K is not None
        t2 = squared_target_norm.to(problem.s).sum()
        mean2 = problem.K.sum((-1, -2)).sum().clamp(min=0)
        self.add("cosine", problem.s.sum() / (mean2 * t2).sqrt().clamp(min=torch.finfo(torch.float32).tiny))
        # u - g = sum (w_i - 1) g_i + a t
        shifted = Solution(solution.weights - 1, solution.target)
        to_mean = _squared_norm(problem, shifted, squared_target_norm.to(problem.s)).sum().clamp(min=0).sqrt()
        to_target = squared_distance(problem, solution, squared_target_norm.to(problem.s)).sum().clamp(min=0).sqrt()
        self.add("position", to_mean / (to_mean + to_target).clamp(min=torch.finfo(torch.float32).tiny))

    def metrics(self) -> dict[str, float]:
        """Means since the last call, and the shares kept by type of layer at the last step."""
        out = {name: float(torch.stack([v.cpu() for v in values]).mean()) for name, values in self._sums.items()}
        self._sums.clear()
        if self.history and len(self.types) > 1:
            by_type = defaultdict(list)
            for kind, share in zip(self.types, self.history[-1][1].tolist(), strict=True):
                by_type[kind].append(share)
            out.update({f"kept/{kind}": sum(shares) / len(shares) for kind, shares in by_type.items()})
        return out

    def note_samples(self, ids: Sequence[list[int]], weights: Tensor) -> None:
        """Count samples, told apart by their tokens.

        Args:
            ids: n lists of token ids.
            weights: (L, n).
        """
        kept, mean = (weights != 0).float().mean(0).tolist(), weights.mean(0).tolist()
        for tokens, share, weight in zip(ids, kept, mean, strict=True):
            name = sample_id(tokens)
            if name not in self.seen:
                if len(self.seen) >= self.limit:
                    continue
                self.seen[name] = Seen(tokens[:40])
            self.seen[name].times += 1
            self.seen[name].kept += share
            self.seen[name].weight += weight

    def table(self, rows: int = 10) -> list[dict[str, Any]]:
        """The samples most often kept and most often dropped, `rows` each.

        Columns: id, times seen, share of layers and appearances that kept it, mean weight, beginning of its text.
        """
        ranked = sorted(self.seen.items(), key=lambda item: -item[1].kept / item[1].times)
        chosen = ranked if len(ranked) <= 2 * rows else ranked[:rows] + ranked[-rows:]
        return [
            {
                "id": name,
                "seen": one.times,
                "kept": one.kept / one.times,
                "weight": one.weight / one.times,
                "text": self._text(one.tokens),
            }
            for name, one in chosen
        ]

    def _text(self, tokens: list[int]) -> str:
        return str(tokens) if self.tokenizer is None else self.tokenizer.decode(tokens)

    def write(self, folder: str | Path) -> None:
        """Write `data_regularization.csv` (the table, all samples) and, where matplotlib is there, the plot."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with (path / "data_regularization.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "seen", "kept", "weight", "text"])
            writer.writeheader()
            writer.writerows(self.table(rows=max(len(self.seen), 1)))
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return
        self.plot(path / "data_regularization.png")

    def plot(self, path: str | Path) -> None:
        """Draw the share kept by each layer over training: one row of colour per layer. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = [step for step, _ in self.history]
        shares = torch.stack([share.cpu() for _, share in self.history], 1)
        figure = Figure(figsize=(8, 1 + 0.16 * max(len(self.types), 6)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(
            shares.numpy(),
            aspect="auto",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(min(steps) - 0.5, max(steps) + 0.5, len(self.types) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(self.types)), self.types, fontsize=6)
        axes.set_xlabel("optimiser step")
        figure.colorbar(image, label="share of general samples kept")
        figure.savefig(path, dpi=150)


def _squared_norm(problem: Problem, solution: Solution, squared_target_norm: Tensor) -> Tensor:
    """(L,) |sum_i w_i g_i + a t|^2."""
    assert problem.K is not None
    w, a = solution.weights, solution.target
    quadratic = torch.einsum("...i,...ij,...j->...", w, problem.K, w)
    return quadratic + 2 * a * (w * problem.s).sum(-1) + a * a * squared_target_norm


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
