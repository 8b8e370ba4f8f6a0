"""Weights that a plugin puts in place of the trained ones: to evaluate and save with, or to sample completions with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

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
        given = self.run.guard.exclusive("deployed_weights", nullcontext(), weights=weights)
        contexts = dict(given) if isinstance(given, Mapping) else {"": given}
        self.run.guard.agree()
        self._refuse_other_names(list(contexts))
        return contexts

    def to_save(self) -> Context:
        """The context to predict and to save under."""
        return next(iter(self.deployed().values()))

    def to_sample(self) -> Context:
        """The context to draw training completions under; evaluation has swapped its own already."""
        if self.swapped or not self.run.training() or not self.run.plugins.implements("sampling_weights"):
            return nullcontext()
        context: Context | None = self.run.guard.exclusive("sampling_weights", None, weights=self.weights())
        self.run.guard.agree()
        return nullcontext() if context is None else self.enter(context, "sampling_weights")

    @contextmanager
    def enter(self, context: Context, hook: str = "deployed_weights") -> Iterator[None]:
        """Enter a context; inside, nothing is swapped again (`evaluate` calls itself for several sets).

        Raises:
            PluginError: on every rank, where the context of any of them cannot be entered or left.
        """
        before, self.swapped = self.swapped, True
        try:
            if isinstance(context, nullcontext):
                yield
            else:
                with self._in_place(context, hook):
                    yield
        finally:
            self.swapped = before

    @contextmanager
    def _in_place(self, context: Context, hook: str) -> Iterator[None]:
        guard, owner = self.run.guard, self.run.plugins.owner(hook)
        assert owner is not None, "it gave the context"
        entered = ExitStack()
        try:
            guard.run(hook, owner, partial(entered.enter_context, context), None)
            guard.agree()  # a rank without these weights would be missed in what comes
            self.changed()
            yield
        finally:
            guard.run(hook, owner, entered.close, None, always=True)
            self.changed()
        guard.agree()

    def _refuse_other_names(self, names: list[str]) -> None:
        """Each name is one evaluation, in which ranks wait for one another."""
        guard, owner = self.run.guard, self.run.plugins.owner("deployed_weights")
        ranks = guard.gather(names)
        if owner is not None and any(other != ranks[0] for other in ranks):
            raise guard.failure("deployed_weights", owner, f"it gives the ranks different names: {ranks}")
