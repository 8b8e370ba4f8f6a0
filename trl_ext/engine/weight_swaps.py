"""Weights that a plugin puts in place of the trained ones: to evaluate and save with, or to sample completions with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from trl_ext.engine.context import RunContext
from trl_ext.records import WeightsView

Context = AbstractContextManager[None]


@dataclass
class WeightSwaps:
    """Asks the owners of `deployed_weights` and `sampling_weights`, and enters what they give, one at a time."""

    run: RunContext
    weights: Callable[[], WeightsView | None]
    """Gives the trainable parameters; None before the model is prepared."""
    changed: Callable[[], None]
    """Called whenever other weights are in place than before."""
    swapped: bool = False

    def deployed(self) -> dict[str, Context]:
        """Contexts to evaluate under, by metric name; the first is the one to save under, its name is not shown."""
        weights = self.weights()
        if weights is None or self.swapped or not self.run.plugins.implements("deployed_weights"):
            return {"": nullcontext()}
        contexts = self.run.guard.exclusive("deployed_weights", nullcontext(), weights=weights)
        self.run.guard.agree()
        return dict(contexts) if isinstance(contexts, Mapping) else {"": contexts}

    def to_save(self) -> Context:
        """The context to predict and to save under."""
        return next(iter(self.deployed().values()))

    def to_sample(self) -> Context:
        """The context to draw training completions under; evaluation has swapped its own already."""
        if self.swapped or not self.run.training() or not self.run.plugins.implements("sampling_weights"):
            return nullcontext()
        context: Context | None = self.run.guard.exclusive("sampling_weights", None, weights=self.weights())
        self.run.guard.agree()
        return nullcontext() if context is None else self.enter(context)

    @contextmanager
    def enter(self, context: Context) -> Iterator[None]:
        """Enter a context; inside, nothing is swapped again (`evaluate` calls itself for several sets)."""
        before, self.swapped = self.swapped, True
        swaps = not isinstance(context, nullcontext)
        try:
            with context:
                if swaps:
                    self.changed()
                yield
        finally:
            self.swapped = before
            if swaps:
                self.changed()
