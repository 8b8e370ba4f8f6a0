"""What the objectives with a reference share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.reference import Reference, parse_reference

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


class ReferenceObjective(Objective):
    """Base of the objectives that compare with a reference; `reference` is an option of each.

    The reference's log-probabilities come from the record where the core provides them.
    """

    state_version: ClassVar[int] = 1
    reference: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference: Reference = parse_reference(self.reference, f"{type(self).__name__}: reference")

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
