"""`trl-ext probe capability`: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from trl_ext.errors import ConfigurationError
from trl_ext_probing.settings import Option, ScoringSettings


@dataclass(frozen=True, kw_only=True)
class CapabilitySettings(ScoringSettings):
    """What `capability` measures."""

    output: Annotated[Path, Option(help="Folder for scores and results; the same command goes on in it.")] = Path(
        "capability"
    )
    completion_only: Annotated[
        bool | None, Option(help="Measure completions only; by default where the data has prompts.")
    ] = None
    log_probs: Annotated[
        Path | None, Option(help="Also keep each token's log-probability here: a reference for objectives.")
    ] = None

    probe: ClassVar[str] = "capability"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_probs is not None and len(self.model) > 1:
            raise ConfigurationError("--log-probs keeps the probabilities of one model; name one --model")

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is measured; where the probabilities go does not."""
        return {**super().deciding, "log_probs": self.log_probs is not None}
