"""The choice of one optimiser step: scoring passes, solving, and the weights that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from trl_ext.records import Window
from trl_ext_data_regularization.diagnostics import Recorder
from trl_ext_data_regularization.engines import Engine, Scores, derivative_scores
from trl_ext_data_regularization.layers import Batch, Layer
from trl_ext_data_regularization.selection import Samples, choose_over_window, normalised, total_over_ranks
from trl_ext_data_regularization.solvers import Problem, Rule, Solution
from trl_ext_data_regularization.taps import Taps
from trl_ext_data_regularization.visitors import OnePass, ScorePass


@dataclass
class Step:
    """Chooses weights for the n samples of this rank's window in each of L layers, or once for all (L = 1)."""

    rule: Rule
    lr: float
    layerwise: bool
    per_micro_batch: bool
    layers: Sequence[Layer]
    samples: Samples
    target: Sequence[Tensor | None]
    """The target's gradient per parameter, as scores see it."""
    engine: Engine | None
    """None for the derivative engine."""
    recorder: Recorder
    weights: Tensor = field(init=False)
    """(L, n) float."""
    _target_tokens: Tensor = field(init=False)
    """(L,) coefficients of the target, each times the label tokens of the unit it was chosen over."""

    def __post_init__(self) -> None:
        rows, device = len(self.layers) if self.layerwise else 1, self.samples.tokens.device
        self.weights = torch.ones(rows, len(self.samples), device=device)
        self._target_tokens = torch.zeros(rows, dtype=torch.float64, device=device)

    @cached_property
    def total(self) -> Tensor:
        """() label tokens of the window over all ranks. Collective on the first use."""
        return total_over_ranks(self.samples.tokens.sum()).clamp(min=1)

    @cached_property
    def squared_target_norms(self) -> Tensor:
        """(L,) float64 |t|^2 of each layer, or of all."""
        present = {i: t for i, t in enumerate(self.target) if t is not None}
        norms = dict(zip(present, torch._foreach_norm(list(present.values()), 2, dtype=torch.float32), strict=True))
        zero = self._target_tokens.new_zeros(())
        square = [norms[i].double() ** 2 if i in norms else zero for i in range(len(self.target))]
        if not self.layerwise:
            return torch.stack(square).sum().unsqueeze(0)
        return torch.stack([sum((square[i] for i in layer.parameters), zero) for layer in self.layers])

    # -- two passes --------------------------------------------------------------------------------------------------

    def score(self, window: Window, taps: Taps, parameters: Sequence[nn.Parameter]) -> Scores:
        """(L, n) scores of summed losses: a pass over the window that leaves no gradient."""
        if self.engine is None:
            s = derivative_scores(lambda: self._losses(window), parameters, self.target)
            return Scores(s.unsqueeze(0), None)
        for i, batch in enumerate(self.samples.batches):
            with taps.active(ScorePass(self.engine), batch):
                window.per_token_loss(i).sum().backward()
        scores = self.engine.scores(range(len(self.layers)))
        return scores if self.layerwise else scores.over_layers()

    def choose(self, scores: Scores) -> None:
        """Set the weights of the whole window. Collective on several ranks."""
        self.recorder.add("agreeing", (scores.s > 0).float())
        if self.per_micro_batch:
            for batch in self.samples.batches:
                self._choose_unit(slice(None), batch, scores, self.samples.tokens[batch.window].sum())
            return
        solution, problem, mine = choose_over_window(
            self.samples, self.engine, scores, lambda p: self._solve(p, slice(None)), not self.layerwise
        )
        self.weights = solution.weights[:, mine].float()
        self._target_tokens = solution.target.double() * self.samples.tokens.sum()
        if problem.K is not None:
            self.recorder.geometry(problem, solution, self.squared_target_norms)

    def _losses(self, window: Window) -> Tensor:
        """(n,) float64 summed losses of the samples."""
        sums = torch.zeros(len(self.samples), dtype=torch.float64, device=self.samples.tokens.device)
        with torch.no_grad():
            for i, batch in enumerate(self.samples.batches):
                losses = window.per_token_loss(i).double().reshape(-1)
                sums[batch.window].index_add_(0, batch.index[:, 1:].reshape(-1), losses)
        return sums

    # -- one pass ----------------------------------------------------------------------------------------------------

    def visitor(self) -> OnePass:
        """Chooses in the middle of the training passes. Collective on several ranks."""
        engine, total = self.engine, self.total
        assert engine is not None
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

        def choose(layer: int, batch: Batch) -> Tensor:
            # The training loss divides by the window's tokens per rank, a unit's share by the unit's.
            tokens = self.samples.tokens[batch.window].sum()
            self._choose_unit(slice(layer, layer + 1), batch, engine.scores([layer]), tokens * world / total)
            return self.weights[layer, batch.window]

        return OnePass(engine, choose)

    # -- both --------------------------------------------------------------------------------------------------------

    def target_share(self) -> Tensor:
        """(L,) float: the coefficient of the target's gradient in the update. Collective on several ranks."""
        return total_over_ranks(self._target_tokens) / self.total

    def _choose_unit(self, rows: slice, batch: Batch, scores: Scores, scale: Tensor) -> None:
        """Choose over one micro-batch of this rank, in some layers."""
        tokens = self.samples.tokens[batch.window]
        K = None if scores.K is None else scores.K[:, batch.window, batch.window]
        part = normalised(Scores(scores.s[:, batch.window], K), scale.clamp(min=torch.finfo(torch.float32).tiny))
        solution = self._solve(Problem(part.s, tokens, part.K), rows)
        self.weights[rows, batch.window] = solution.weights.float()
        self._target_tokens[rows] += solution.target.double() * tokens.sum()

    def _solve(self, problem: Problem, rows: slice) -> Solution:
        norms = self.squared_target_norms[rows] if self.rule.name == "ball" else problem.s.new_zeros(())
        return self.rule.solve(problem, norms, self.lr)
