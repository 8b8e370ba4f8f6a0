"""What the objectives with a reference share: the option that names it, and its life within a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.cached_reference import CachedReference
from trl_ext_objectives.live_reference import AdaptersOff, OtherModel, StartModel
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord
    from trl_ext_objectives.reference import Reference

KINDS = "start, base, model:PATH or cache:PATH"


def parse_reference(text: str, option: str) -> Reference:
    """Read `start`, `base`, `model:PATH` or `cache:PATH`.

    Raises:
        ValueError: naming the option and the forms.
    """
    kind, _, path = text.partition(":")
    if text == "start":
        return StartModel()
    if text == "base":
        return AdaptersOff()
    if kind == "model" and path:
        return OtherModel(path)
    if kind == "cache" and path:
        return CachedReference(path)
    raise ValueError(f"{option}={text!r} is not one of {KINDS}")


class ReferenceObjective(Objective):
    """Base of the objectives that compare with a reference; `reference` is an option of each.

    The reference's log-probabilities come from the record where the core provides them.
    """

    state_version: ClassVar[int] = 1
    cost: ClassVar[str] = "a forward of the reference; none with a cache"
    reference: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference: Reference = parse_reference(self.reference, "reference")

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse a reference that this run cannot have."""
        self._reference.check(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take or load the reference."""
        self._reference.setup(context)

    def reference_log_probs(self, tokens: TokenRecord) -> Tensor:
        """(B, T) float, without gradient."""
        if tokens.reference_log_probs is not None:
            return tokens.reference_log_probs
        return self._reference.log_probs(tokens)

    def state_dict(self) -> dict[str, Any]:
        """The reference's weights, where only this run has them."""
        return self._reference.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after `setup`."""
        self._reference.load_state_dict(state)
