"""`trl-ext probe drift`: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from trl_ext_probing.settings import Option, ScoringSettings


@dataclass(frozen=True, kw_only=True)
class DriftSettings(ScoringSettings):
    """What `drift` measures."""

    base: Annotated[str, Option(help="Model before training, with which the others are compared.")]
    output: Annotated[Path, Option(help="Folder for scores and results; the same command goes on in it.")] = Path(
        "drift"
    )

    probe: ClassVar[str] = "drift"
    free: ClassVar[frozenset[str]] = ScoringSettings.free | {"base"}
