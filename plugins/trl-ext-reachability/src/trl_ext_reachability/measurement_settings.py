"""What the probe `reachability` measures, and what follows from it before a model loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trl_ext_reachability.routing import Budget, closing_limit, confidence_per_look, failures_close, schedule


@dataclass(frozen=True)
class MeasurementSettings:
    """Everything that the measurement depends on; `max_rollouts` is `closing_rollouts` where it is None."""

    model: str
    dataset: str
    reward: str
    dataset_name: str | None = None
    split: str = "train"
    columns: str | None = None
    limit: int | None = None
    success: float = 1.0
    num_generations: int = 8
    epochs: float = 1.0
    rollouts: int = 8
    max_rollouts: int | None = None
    confidence: float = 0.95
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0, since greedy completions have no success rate")
        _ = self.budget, self.totals  # refuse what they refuse

    @property
    def budget(self) -> Budget:
        """What GRPO will draw."""
        return Budget(self.num_generations, self.epochs)

    @property
    def totals(self) -> list[int]:
        """Rollouts of a prompt after each round."""
        return schedule(self.rollouts, self.closing_rollouts if self.max_rollouts is None else self.max_rollouts)

    @property
    def closing_rollouts(self) -> int:
        """The smallest limit at which failures alone show that a prompt is out of reach."""
        return closing_limit(self.rollouts, self.budget, self.confidence)

    @property
    def closes(self) -> bool:
        """Whether the limit of rollouts is enough for that."""
        return failures_close(self.totals[-1], len(self.totals), self.budget, self.confidence)

    @property
    def confidence_per_look(self) -> float:
        """Confidence of the bounds after each round."""
        return confidence_per_look(self.confidence, len(self.totals))

    def as_dict(self) -> dict[str, Any]:
        """By name, with the limit of rollouts as a number."""
        return {**asdict(self), "max_rollouts": self.totals[-1]}
