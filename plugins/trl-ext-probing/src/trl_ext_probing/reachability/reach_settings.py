"""`trl-ext probe reachability`: its settings, and what follows from them before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from trl_ext.errors import ConfigurationError
from trl_ext_probing.reachability.routing import Budget, closing_limit, confidence_per_look, failures_close, schedule
from trl_ext_probing.settings import DataSettings, Option, ProbeSettings, RewardSettings, SampledModelSettings


@dataclass(frozen=True, kw_only=True)
class ReachabilitySettings(SampledModelSettings, DataSettings, RewardSettings):
    """What `reachability` measures; `max_rollouts` is `closing_rollouts` where it is None."""

    output: Annotated[Path, Option(help="Folder for rollouts and results; the same command goes on in it.")] = Path(
        "reachability"
    )
    n: Annotated[int, Option(help="Rollouts of each prompt in the first round.", min=1)] = 8
    max_rollouts: Annotated[
        int | None, Option(help="Most rollouts of a prompt; by default as many as show that it is out of reach.", min=1)
    ] = None
    solved_at: Annotated[float, Option(help="Reward from which a completion counts as correct.")] = 1.0
    num_generations: Annotated[int, Option(help="Group size of the planned GRPO run.", min=2)] = 8
    epochs: Annotated[float, Option(help="Epochs of the planned GRPO run.")] = 1.0
    check_against: Annotated[
        Path | None, Option(help="Folder measured with another seed: predicted against observed there.")
    ] = None

    probe: ClassVar[str] = "reachability"
    free: ClassVar[frozenset[str]] = (SampledModelSettings.free - {"confidence"}) | {"check_against"}
    files: ClassVar[tuple[str, ...]] = (
        *ProbeSettings.files, "demonstrations.jsonl", "calibration.json", "calibration.md", "calibration.png",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0:
            raise ConfigurationError("--temperature 0: above 0, since greedy completions have no success rate")
        if self.check_against is not None and len(self.model) > 1:
            raise ConfigurationError("--check-against is for one --model")
        _ = self.budget, self.totals  # refuse what they refuse

    @property
    def budget(self) -> Budget:
        """What GRPO will draw."""
        return Budget(self.num_generations, self.epochs)

    @property
    def totals(self) -> list[int]:
        """Rollouts of a prompt after each round."""
        return schedule(self.n, self.closing_rollouts if self.max_rollouts is None else self.max_rollouts)

    @property
    def closing_rollouts(self) -> int:
        """The smallest limit at which failures alone show that a prompt is out of reach."""
        return closing_limit(self.n, self.budget, self.confidence)

    @property
    def closes(self) -> bool:
        """Whether the limit of rollouts is enough for that."""
        return failures_close(self.totals[-1], len(self.totals), self.budget, self.confidence)

    @property
    def confidence_per_look(self) -> float:
        """Confidence of the bounds after each round."""
        return confidence_per_look(self.confidence, len(self.totals))

    @property
    def plain(self) -> bool:
        """Whether every completion can be drawn, with the probability that teacher forcing gives."""
        return self.top_p == 1.0 and self.top_k == 0

    @property
    def all(self) -> dict[str, Any]:
        """Every setting, as JSON keeps it, with the limit of rollouts as a number."""
        return {**super().all, "max_rollouts": self.totals[-1]}

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is measured, with the limit of rollouts as a number."""
        return {**super().deciding, "max_rollouts": self.totals[-1]}
