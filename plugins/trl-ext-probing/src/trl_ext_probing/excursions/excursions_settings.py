"""`trl-ext probe excursions`: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from trl_ext_probing.settings import Option, ProbeSettings


@dataclass(frozen=True, kw_only=True)
class ExcursionSettings(ProbeSettings):
    """What `excursions` measures; the file says the rest."""

    config: Annotated[
        Path, Option(help="YAML with checkpoints, recipes, passk and drift, such as examples/excursions.yaml.")
    ]
    output: Annotated[Path, Option(help="Folder for trainings and results; the same command goes on in it.")] = Path(
        "excursions"
    )

    probe: ClassVar[str] = "excursions"
