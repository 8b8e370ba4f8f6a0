"""What a reference is: a source of the labels' log-probabilities under a model that is not the one in training.

| option | memory | time per micro-batch |
|---|---|---|
| `start` | one copy of the trainable parameters, also in each checkpoint | one forward |
| `base` | none | one forward |
| `model:PATH` | that model's weights | one forward of that model |
| `cache:PATH` | none on the device; the file is mapped into host memory | one look-up per sample |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


class Reference(ABC):
    """A source of log-probabilities of the labels."""

    def check(self, run: RunDescription) -> None:  # noqa: B027, most have nothing to check
        """Refuse a run that cannot have this reference, before the model loads."""

    def setup(self, context: SetupContext) -> None:  # noqa: B027, a cache needs no model
        """Take what is needed of the model before the first step."""

    @abstractmethod
    def log_probs(self, tokens: TokenRecord) -> Tensor:
        """Log-probabilities (B, T) fp32 of the labels, without gradient, 0 where the mask is False."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; tensors by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` gave."""
