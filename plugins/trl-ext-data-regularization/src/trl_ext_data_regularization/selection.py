"""From the scores of a window to the weights of its samples: units, normalisation, and the one collective.

A *unit* is what one choice is made over: the whole accumulation window over all ranks, or one micro-batch of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.records import Window
from trl_ext.records.tokens import rows_are_joined, starts_in
from trl_ext_data_regularization.engines import Engine, Scores, Sketch
from trl_ext_data_regularization.layers import Batch
from trl_ext_data_regularization.ranks import gather_rows, world_size
from trl_ext_data_regularization.solvers import Problem, Solution


@dataclass(frozen=True)
class Samples:
    """The samples of one rank's window."""

    batches: tuple[Batch, ...]
    tokens: Tensor
    """(n,) long: label tokens of each sample."""

    def __len__(self) -> int:
        return len(self.tokens)


def samples_of(window: Window) -> Samples:
    """Which sample each input position of the window belongs to, and how many labels each has."""
    batches, counts, offset = [], [], 0
    for inputs in window.micro_batches:
        batch, tokens = samples_of_inputs(inputs, offset)
        batches.append(batch)
        counts.append(tokens)
        offset += batch.samples
    return Samples(tuple(batches), torch.cat(counts))


def samples_of_inputs(inputs: Mapping[str, Tensor], offset: int = 0) -> tuple[Batch, Tensor]:
    """The samples of one batch: rows, or under padding-free training what starts at a position id of 0.

    Args:
        inputs: the batch as the model receives it.
        offset: samples of the window before it.

    Returns:
        The batch, and (samples,) label tokens.
    """
    labels = inputs["labels"]
    by_row = not rows_are_joined(inputs)
    if by_row:
        index = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
        samples = len(labels)
    else:
        starts = starts_in(inputs["position_ids"])
        index = (starts.flatten().cumsum(0) - 1).clamp(min=0).view(starts.shape)
        samples = int(index[-1, -1]) + 1
    labelled = (labels[:, 1:] != -100).long()
    tokens = labels.new_zeros(samples).index_add_(0, index[:, 1:].reshape(-1), labelled.reshape(-1))
    return Batch(index, samples, offset, by_row), tokens


def normalised(scores: Scores, total: Tensor | float) -> Scores:
    """Scores of summed losses as those of shares of the token mean, g_i = (1 / T_tot) sum_t grad loss_t; float64."""
    K = None if scores.K is None else scores.K.double() / total**2
    return Scores(scores.s.double() / total, K)


def choose_over_window(
    samples: Samples, engine: Engine | None, scores: Scores, solve: Callable[[Problem], Solution], together: bool
) -> tuple[Solution, Problem, slice]:
    """Solve the whole window over all ranks. Collective on several.

    Args:
        samples: this rank's samples.
        engine: the engine behind the scores; a `Sketch` gives inner products across ranks.
        scores: (L, n) of summed losses.
        solve: the rule.
        together: one choice for all layers (L = 1).

    Returns:
        The solution and the problem over all ranks' samples, and which of them are this rank's.
    """
    tokens, mine = samples.tokens, slice(0, len(samples))
    if world_size() > 1:
        if isinstance(engine, Sketch):
            scores, tokens, mine = _gather_sketches(engine, tokens)
            if together:
                scores = scores.over_layers()
        else:
            gathered, mine = gather_rows(torch.cat([scores.s.t().float(), tokens.float().unsqueeze(1)], 1))
            scores, tokens = Scores(gathered[:, :-1].t(), None), gathered[:, -1].round().long()
    scores = normalised(scores, tokens.sum().clamp(min=1))
    problem = Problem(scores.s, tokens, scores.K)
    return solve(problem), problem, mine


def _gather_sketches(engine: Sketch, tokens: Tensor) -> tuple[Scores, Tensor, slice]:
    pairs = [engine.sketches(layer) for layer in range(len(engine.layers))]
    rows, mine = gather_rows(torch.cat([*(z for z, _ in pairs), tokens.float().unsqueeze(1)], 1))
    parts = rows[:, :-1].split([len(t) for _, t in pairs], dim=1)
    s = torch.stack([z @ t for z, (_, t) in zip(parts, pairs, strict=True)])
    return Scores(s, torch.stack([z @ z.t() for z in parts])), rows[:, -1].round().long(), mine
