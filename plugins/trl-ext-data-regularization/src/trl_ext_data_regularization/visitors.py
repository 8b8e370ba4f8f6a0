"""What a tapped backward pass is for: scoring, applying weights, or both at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trl_ext_data_regularization.engines import Engine
from trl_ext_data_regularization.layers import Batch, Use


class ScorePass:
    """Scores every layer and gives no parameter a gradient: two thirds of a backward pass, and the scores' own cost."""

    scoring, weighing = True, False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        self.engine.add(use, x, go, index, batch)

    def weights(self, use: Use, batch: Batch) -> None:
        return None


class WeightedPass:
    """Applies weights that were chosen before.

    Args:
        chosen: (L, n) weights of the window's samples in each layer.
    """

    scoring, weighing = False, True

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen

    def score(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        """Not called: there is nothing left to choose."""

    def weights(self, use: Use, batch: Batch) -> Tensor:
        return self.chosen[use.layer, batch.window]


class OnePass(ScorePass):
    """Chooses in the middle of the backward pass, as soon as a layer's scores are there.

    Args:
        engine: scores of the window's samples.
        choose: from a layer and the micro-batch to its (samples,) weights.
    """

    scoring, weighing = True, True

    def __init__(self, engine: Engine, choose: Callable[[int, Batch], Tensor]) -> None:
        super().__init__(engine)
        self.choose = choose

    def weights(self, use: Use, batch: Batch) -> Tensor:  # type: ignore[override]
        return self.choose(use.layer, batch)
