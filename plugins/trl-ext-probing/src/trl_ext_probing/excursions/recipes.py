"""The file of `trl-ext probe excursions`: which checkpoints, recipes and measures it asks for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from trl_ext.errors import ConfigurationError
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.results import slug

KEYS = {"checkpoints": list, "recipes": dict, "passk": dict, "drift": dict, "launcher": str}
OURS = {"model", "base", "output", "overwrite", "confidence"}
"""Options of the measures that the file leaves to this probe."""


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
    passk: Mapping[str, Any]
    drift: Mapping[str, Any] | None
    launcher: tuple[str, ...]

    def folder(self, checkpoint: str, *below: str) -> Path:
        """Where what starts at a checkpoint goes."""
        return self.output.joinpath(slug(checkpoint), *map(slug, below))


def read(settings: ExcursionSettings) -> Excursions:
    """Read and check the file, before anything is trained.

    Raises:
        ConfigurationError: naming the key to change.
    """
    path = settings.config
    if not path.is_file():
        raise ConfigurationError(f"--config: there is no file {str(path)!r}")
    try:
        asked = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {error}") from error
    if not isinstance(asked, dict):
        raise ConfigurationError(f"{path} has no keys; there are {', '.join(KEYS)}")
    asked = {key: value for key, value in asked.items() if value is not None}
    if unknown := sorted(asked.keys() - KEYS.keys()):
        raise ConfigurationError(f"{path}: unknown keys {', '.join(unknown)}; there are {', '.join(KEYS)}")
    if missing := sorted({"checkpoints", "recipes", "passk"} - asked.keys()):
        raise ConfigurationError(f"{path} lacks {', '.join(missing)}")
    for key, value in asked.items():
        if not isinstance(value, KEYS[key]):
            raise ConfigurationError(f"{path}: {key} is a {type(value).__name__}, and should be a {KEYS[key].__name__}")
    checkpoints = tuple(map(str, asked["checkpoints"]))
    recipes = {str(name): _stages(path, str(name), stages) for name, stages in asked["recipes"].items()}
    for what, names in (("checkpoints", checkpoints), ("recipes", ("base", *recipes))):
        if len({slug(name) for name in names}) < len(names) or not checkpoints or not recipes:
            raise ConfigurationError(f"{path}: {what} have to be there, of different names, and none a recipe `base`")
    default = (sys.executable, "-m", "trl_ext")
    return Excursions(
        checkpoints=checkpoints,
        recipes=recipes,
        output=settings.output,
        passk=_options(path, "passk", PasskSettings, asked["passk"]),
        drift=_options(path, "drift", DriftSettings, asked["drift"]) if "drift" in asked else None,
        launcher=tuple(shlex.split(asked["launcher"])) if "launcher" in asked else default,
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


def _options(path: Path, key: str, settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a probe, by the names that its settings have."""
    options = {field.name: field for field in fields(settings) if field.name not in OURS}
    if unknown := sorted(given.keys() - options.keys()):
        raise ConfigurationError(f"{path}: {key} has no option {unknown[0]}; there are {', '.join(options)}")
    needed = {name for name, f in options.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - given.keys()):
        raise ConfigurationError(f"{path}: {key} lacks {', '.join(missing)}")
    return dict(given)
