"""What a tapped backward pass is for: scoring, applying weights, or both at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trl_ext_data_regularization.engines import Engine
from trl_ext_data_regularization.layers import Batch, Use


@dataclass(frozen=True)
class Choice:
    """How much each sample of a micro-batch counts in one layer."""

    weights: Tensor
    """(samples,) float."""
    equal: bool = False
    """Whether all that are not zero are the same."""
    count: int | None = None
    """How many are not zero, where that is known without waiting for the device."""


class Visitor(Protocol):
    """What the backward pass asks."""

    @property
    def scoring(self) -> bool:
        """Whether `score` wants to be called."""

    @property
    def weighing(self) -> bool:
        """Whether `choice` gives any, so that the parameters get a gradient."""

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        """Take note of a module's tokens: input x (N, I) or ids (N,), gradient of the output go (N, O), sample (N,)."""

    def choice(self, use: Use, batch: Batch) -> Choice | None:
        """Weights of the batch's samples in this layer, or None for no parameter gradient at all."""


class ScorePass:
    """Scores every layer and gives no parameter a gradient: two thirds of a backward pass, and the scores' own cost."""

    scoring, weighing = True, False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        self.engine.add(use, x, go, index, batch)

    def choice(self, use: Use, batch: Batch) -> None:
        return None


class WeightedPass:
    """Applies weights that were chosen before.

    Args:
        choose: from a layer and the micro-batch to the weights of its samples.
    """

    scoring, weighing = False, True

    def __init__(self, choose: Callable[[int, Batch], Choice]) -> None:
        self.choose = choose

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        """Not called: there is nothing left to choose."""

    def choice(self, use: Use, batch: Batch) -> Choice:
        return self.choose(use.layer, batch)


class OnePass(ScorePass):
    """Chooses in the middle of the backward pass, as soon as a layer's scores are there.

    Args:
        engine: scores of the window's samples.
        choose: from a layer and the micro-batch to the weights of its samples.
    """

    scoring, weighing = True, True

    def __init__(self, engine: Engine, choose: Callable[[int, Batch], Choice]) -> None:
        super().__init__(engine)
        self.choose = choose

    def choice(self, use: Use, batch: Batch) -> Choice:  # type: ignore[override]
        return self.choose(use.layer, batch)
