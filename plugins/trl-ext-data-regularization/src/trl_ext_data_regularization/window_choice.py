"""The choice of one optimiser step: scores by an engine, weights by a solver, and what the taps ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from trl_ext.own_passes import drop_gathered_weights
from trl_ext.records import SetupContext, Window
from trl_ext_data_regularization.diagnostics import gram_terms
from trl_ext_data_regularization.engines import Engine, Scores, Target, derivative_scores
from trl_ext_data_regularization.layers import Batch, Layer
from trl_ext_data_regularization.plan import Plan
from trl_ext_data_regularization.ranks import total_over_ranks, world_size
from trl_ext_data_regularization.selection import Samples, choose_over_window, normalised
from trl_ext_data_regularization.solvers import Problem, Solution
from trl_ext_data_regularization.taps import Taps
from trl_ext_data_regularization.visitors import Choice, OnePass, ScorePass


@dataclass
class WindowChoice:
    """Chooses weights for the n samples of this rank's window in each of L layers, or once for all (L = 1)."""

    plan: Plan
    lr: float
    """Learning rate of the step, for rule=second-order."""
    layers: Sequence[Layer]
    samples: Samples
    target: Target
    """The target's gradient per parameter, as scores see it."""
    engine: Engine | None
    """None for the derivative engine, and once the whole window has been chosen from."""
    weights: Tensor = field(init=False)
    """(L, n) float."""
    failure: Exception | None = field(init=False, default=None)
    """What went wrong in the middle of a training backward pass."""
    _agreeing: list[Tensor] = field(init=False, default_factory=list)
    """Shares of positive scores."""
    _target_tokens: Tensor = field(init=False)
    """(L,) coefficients of the target, each times the label tokens of the unit it was chosen over."""
    _solved: list[tuple[slice, Problem, Solution]] = field(init=False, default_factory=list)
    """What has been solved over the whole window with Gram matrices, and for which layers."""

    def __post_init__(self) -> None:
        rows, device = len(self.layers) if self.plan.layerwise else 1, self.samples.tokens.device
        self.weights = torch.ones(rows, len(self.samples), device=device)
        self._target_tokens = torch.zeros(rows, dtype=torch.float64, device=device)

    @cached_property
    def total(self) -> Tensor:
        """() label tokens of the window over all ranks. Collective on the first use."""
        return total_over_ranks(self.samples.tokens.sum()).clamp(min=1)

    @cached_property
    def squared_target_norms(self) -> Tensor:
        """(L,) float64 |t|^2 of each layer, or of all. Collective under FSDP2 on the first use."""
        squares = self.target.squared_norms(self._target_tokens.device)
        if not self.plan.layerwise:
            return squares.sum().unsqueeze(0)
        return torch.stack([squares[list(layer.parameters)].sum() for layer in self.layers])

    def settle_target(self) -> None:
        """Before the first pass: take what is collective under FSDP2, and let go of t where nothing else needs it."""
        if self.plan.scored_by in ("direct", "sketch"):  # whose <g_i, g_j> some rules and metrics compare with |t|^2
            _ = self.squared_target_norms
        if not self.plan.keeps_target:
            self.target = Target(())

    # -- two passes --------------------------------------------------------------------------------------------------

    def score(self, window: Window, taps: Taps, context: SetupContext) -> Scores:
        """(L, n) scores of summed losses: a pass over the window that leaves no gradient."""
        if self.engine is None:
            moved = partial(drop_gathered_weights, context.model)
            parameters = context.weights.parameters
            s = derivative_scores(
                lambda: self._losses(window), parameters, self.target.tensors, points=self.plan.points, moved=moved
            )
            return Scores(s.unsqueeze(0), None)
        for i, batch in enumerate(self.samples.batches):
            with taps.active(ScorePass(self.engine), batch):
                window.per_token_loss(i).sum().backward()
        scores = self.engine.scores(range(len(self.layers)))
        return scores if self.plan.layerwise else scores.over_layers()

    def choose(self, scores: Scores) -> None:
        """Set the weights of the whole window. Collective on several ranks, unless micro-batches choose."""
        self._agreeing.append(_share_of_positive(scores.s))
        if self.plan.per_micro_batch:
            for batch in self.samples.batches:
                self._choose_unit(slice(None), batch, scores, self.samples.tokens[batch.window].sum())
            return
        solution, problem, mine = choose_over_window(
            self.samples, self.engine, scores, lambda p: self._solve(p, slice(None)), not self.plan.layerwise
        )
        self.weights = solution.weights[:, mine].float()
        self._target_tokens = solution.target.double() * self.samples.tokens.sum()
        self._solved.append((slice(None), problem, solution))
        self.engine = None

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
        world = world_size()

        def choose(layer: int, batch: Batch) -> Choice:
            # The training loss divides by the window's tokens per rank, a unit's share by the unit's.
            tokens = self.samples.tokens[batch.window].sum()
            try:
                scores = engine.scores([layer])
                self._agreeing.append(_share_of_positive(scores.s[:, batch.window]))
                self._choose_unit(slice(layer, layer + 1), batch, scores, tokens * world / total)
            except Exception as error:
                # The other ranks wait for this backward pass; `raise_failure` is for after it.
                self.failure = self.failure or error
            return self.choice(layer, batch)

        return OnePass(engine, choose)

    def raise_failure(self) -> None:
        """Raise what went wrong in the middle of this rank's backward pass, if anything did."""
        if self.failure is not None:
            raise self.failure

    # -- both --------------------------------------------------------------------------------------------------------

    def choice(self, layer: int, batch: Batch) -> Choice:
        """What one layer has chosen of a micro-batch."""
        alone = self.plan.per_micro_batch or (batch.samples == len(self.samples) and world_size() == 1)
        kept = self.plan.solver.kept(batch.samples) if alone else None
        return Choice(self.weights[layer, batch.window], self.plan.solver.equal, kept)

    @property
    def not_finite(self) -> list[str]:
        """Names of the layers ("all" in global scope) whose scores were not finite, so that nothing was chosen."""
        bad = (~torch.isfinite(self.weights).all(1)).tolist()
        names = [layer.name for layer in self.layers] if self.plan.layerwise else ["all"]
        return [name for name, is_bad in zip(names, bad, strict=True) if is_bad]

    def agreeing(self) -> Tensor:
        """() the share of positive scores."""
        return torch.stack(self._agreeing).mean()

    def target_share(self) -> Tensor:
        """(L,) float: the coefficient of the target's gradient in the update. Collective on several ranks."""
        return total_over_ranks(self._target_tokens) / self.total

    def geometry(self) -> Tensor | None:
        """(L, 5) `gram_terms` of each layer; None where the engine has no <g_i, g_j>, or micro-batches chose alone."""
        solved = [parts for parts in self._solved if parts[1].K is not None]
        if not solved:
            return None
        order, problems, solutions = zip(*solved, strict=True)
        norms = torch.cat([self.squared_target_norms[rows] for rows in order])
        K = torch.cat([p.K for p in problems if p.K is not None])
        problem = Problem(torch.cat([p.s for p in problems]), problems[0].tokens, K)
        solution = Solution(torch.cat([x.weights for x in solutions]), torch.cat([x.target for x in solutions]))
        terms = gram_terms(problem, solution, norms)
        # In one pass layers come in the order of the backward pass.
        found = torch.cat([torch.arange(len(self.weights))[rows] for rows in order])
        out = terms.new_zeros(len(self.weights), 5)
        out[found.to(out.device)] = terms
        return out

    def _choose_unit(self, rows: slice, batch: Batch, scores: Scores, scale: Tensor) -> None:
        """Choose over one micro-batch of this rank, in some layers."""
        tokens = self.samples.tokens[batch.window]
        K = None if scores.K is None else scores.K[:, batch.window, batch.window]
        part = normalised(Scores(scores.s[:, batch.window], K), scale.clamp(min=torch.finfo(torch.float32).tiny))
        solution = self._solve(Problem(part.s, tokens, part.K), rows)
        self.weights[rows, batch.window] = solution.weights.float()
        self._target_tokens[rows] += solution.target.double() * tokens.sum()
        if batch.samples == len(self.samples) and world_size() == 1:
            self._solved.append((rows, Problem(part.s, tokens, part.K), solution))

    def _solve(self, problem: Problem, rows: slice) -> Solution:
        norms = self.squared_target_norms[rows] if self.plan.solver.name == "ball" else problem.s.new_zeros(())
        return self.plan.solver.solve(problem, norms, self.lr)


def _share_of_positive(scores: Tensor) -> Tensor:
    """() float: the share of (L, n) scores that are positive; NaN where one of them is not finite."""
    return torch.where(torch.isfinite(scores).all(), (scores > 0).float().mean(), torch.nan)
