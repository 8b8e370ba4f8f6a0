"""`trl-ext compare`: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from trl_ext_probing.settings import Argument, Option, OutputSettings


@dataclass(frozen=True, kw_only=True)
class CompareSettings(OutputSettings):
    """What `compare` does; the file says the rest."""

    config: Annotated[Path, Argument(help="YAML with base, arms, seeds and measures.", metavar="CONFIG.yaml")]
    output: Annotated[
        Path,
        Option(
            help="Folder for runs and results; the same command goes on in it. By default runs/ and the file's name."
        ),
    ] = None  # type: ignore[assignment]  # a path as soon as the settings are made
    size: Annotated[str | None, Option(help="The entry of `sizes` in the file that is laid over the rest.")] = None

    probe: ClassVar[str] = "compare"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            name = self.config.stem if self.size is None else f"{self.config.stem}-{self.size}"
            object.__setattr__(self, "output", Path("runs", name))
