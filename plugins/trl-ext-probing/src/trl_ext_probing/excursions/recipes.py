"""The file of `trl-ext probe excursions`: which checkpoints, recipes and measures it asks for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.comparing.measures import Drift, Passk
from trl_ext_probing.config_files import read_config
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.results import slug

KEYS = {"checkpoints": list, "recipes": dict, "passk": dict, "drift": dict, "launcher": str}


@dataclass(frozen=True)
class Stage:
    """One training of a recipe."""

    kind: str
    """`sft` or `grpo`."""
    config: Path


@dataclass(frozen=True)
class Excursions:
    """What the file asks for."""

    checkpoints: tuple[str, ...]
    recipes: Mapping[str, tuple[Stage, ...]]
    output: Path
    passk: Passk
    drift: Drift | None
    launcher: tuple[str, ...]
    """Words before the training command; none where it runs by itself."""

    def folder(self, checkpoint: str, *below: str) -> Path:
        """Where what starts at a checkpoint goes."""
        return self.output.joinpath(slug(checkpoint), *map(slug, below))


def read(settings: ExcursionSettings) -> Excursions:
    """Read and check the file, before anything is trained.

    Raises:
        ConfigurationError: naming the key to change.
    """
    path = settings.config
    asked = read_config(path, KEYS, {"checkpoints", "recipes", "passk"}, "--config")
    checkpoints = tuple(map(str, asked["checkpoints"]))
    recipes = {str(name): _stages(path, str(name), stages) for name, stages in asked["recipes"].items()}
    for what, names in (("checkpoints", checkpoints), ("recipes", ("base", *recipes))):
        if len({slug(name) for name in names}) < len(names) or not checkpoints or not recipes:
            raise ConfigurationError(f"{path}: {what} have to be there, of different names, and none a recipe `base`")
    return Excursions(
        checkpoints=checkpoints,
        recipes=recipes,
        output=settings.output,
        passk=Passk(f"{path}: passk", asked["passk"]),
        drift=Drift(f"{path}: drift", asked["drift"]) if "drift" in asked else None,
        launcher=tuple(shlex.split(asked.get("launcher", ""))),
    )


def _stages(path: Path, recipe: str, stages: Any) -> tuple[Stage, ...]:
    result = []
    for stage in stages if isinstance(stages, list) else [stages]:
        if not isinstance(stage, dict) or len(stage) != 1 or not stage.keys() <= {"sft", "grpo"}:
            raise ConfigurationError(f"{path}: recipe {recipe!r} has {stage!r}; a stage is `sft: FILE` or `grpo: FILE`")
        ((kind, name),) = stage.items()
        config = path.parent / str(name)
        if not config.is_file():
            raise ConfigurationError(f"{path}: recipe {recipe!r} names {str(config)!r}, which is no file")
        result.append(Stage(kind, config))
    if not result:
        raise ConfigurationError(f"{path}: recipe {recipe!r} has no stage")
    return tuple(result)
