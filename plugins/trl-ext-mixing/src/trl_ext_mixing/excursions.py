"""`trl-ext probe excursions`: recipes from each of several checkpoints of one base, measured by `passk` and `drift`."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from trl_ext.errors import ConfigurationError
from trl_ext_mixing.drift import drift
from trl_ext_mixing.excursions_results import MODELS, slug, write_results
from trl_ext_mixing.passk import passk

KEYS = {"checkpoints": list, "output_dir": str, "recipes": dict, "passk": dict, "drift": dict, "launcher": str}
DONE = "excursion.json"
"""Written into a stage's folder when its training has ended; says what it was of."""


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
    output_dir: Path
    passk: Mapping[str, Any]
    drift: Mapping[str, Any] | None
    launcher: tuple[str, ...]

    def folder(self, checkpoint: str, *below: str) -> Path:
        """Where what starts at a checkpoint goes."""
        return self.output_dir.joinpath(slug(checkpoint), *map(slug, below))


def excursions(
    config: Annotated[Path, typer.Option(help="YAML: checkpoints, recipes, passk, drift; examples/excursions.yaml.")],
) -> None:
    """Train by several recipes from each checkpoint, and compare pass@k and drift; run it again to go on.

    A stage whose training has ended is not trained again, one that was interrupted goes on from its last checkpoint,
    and samples that are drawn are kept.
    """
    asked = read(config)
    for i, checkpoint in enumerate(asked.checkpoints):
        models = {"base": checkpoint}
        for recipe, stages in asked.recipes.items():
            models[recipe] = train(asked, checkpoint, recipe, stages)
        measure(asked, checkpoint, models)
        folders = {name: asked.folder(name) for name in asked.checkpoints[: i + 1]}
        write_results(asked.output_dir, folders, ["base", *asked.recipes])


def measure(asked: Excursions, checkpoint: str, models: Mapping[str, str]) -> None:
    """Run both probes on the models that came of a checkpoint; pass@k is compared with the checkpoint's own."""
    folder = asked.folder(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    passk(model=list(models.values()), output=folder / "passk.jsonl", **asked.passk)
    if asked.drift is not None:
        for recipe, model in models.items():
            if recipe != "base":
                drift(model=model, base=checkpoint, output=folder / f"drift.{slug(recipe)}.json", **asked.drift)
    (folder / MODELS).write_text(json.dumps(models, indent=1) + "\n")


# -- training ---------------------------------------------------------------------------------------------------------


def train(asked: Excursions, checkpoint: str, recipe: str, stages: Sequence[Stage]) -> str:
    """Run the stages of a recipe one after the other, each from what the one before left; gives the last one's folder.

    Raises:
        ConfigurationError: a training failed, or left no model.
    """
    model, before = checkpoint, ""
    for i, stage in enumerate(stages):
        folder = asked.folder(checkpoint, recipe, f"{i + 1}-{stage.kind}")
        config = hashlib.sha256(stage.config.read_bytes()).hexdigest()
        what = {"kind": stage.kind, "model": model, "config": config, "after": before}
        before = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        done = folder / DONE
        if done.exists():
            if json.loads(done.read_text()) != what:
                raise ConfigurationError(
                    f"{folder} was trained by another {stage.config.name} or from something else; move it away, or "
                    "choose another output_dir"
                )
        else:
            command = [*asked.launcher, stage.kind, "--config", str(stage.config), "--model_name_or_path", model]
            command += ["--output_dir", str(folder)]
            if any(folder.glob("checkpoint-*/trainer_state.json")):
                command += ["--resume_from_checkpoint", "true"]
            print(f"{recipe} from {checkpoint}: {shlex.join(command)}", flush=True)
            code = subprocess.run(command).returncode
            if code:
                raise ConfigurationError(
                    f"the training above ended with exit code {code} ({recipe} from {checkpoint}, {stage.config}); "
                    "mend it and run this command again, which goes on here"
                )
            if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
                raise ConfigurationError(f"the training of {stage.config} left no model in {folder}")
            done.write_text(json.dumps(what, indent=1) + "\n")
        model = str(folder)
    return model


# -- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Excursions:
    """Read and check the file, before anything is trained.

    Raises:
        ConfigurationError: naming the key to change.
    """
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
    if missing := sorted({"checkpoints", "output_dir", "recipes", "passk"} - asked.keys()):
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
        output_dir=Path(asked["output_dir"]),
        passk=_options(path, "passk", passk, asked["passk"], {"model", "output"}),
        drift=_options(path, "drift", drift, asked["drift"], {"model", "base", "output"}) if "drift" in asked else None,
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


def _options(
    path: Path, key: str, probe: Callable[..., None], given: Mapping[str, Any], ours: set[str]
) -> dict[str, Any]:
    """Options of a probe, by the names that its function has."""
    parameters = {name: p for name, p in inspect.signature(probe).parameters.items() if name not in ours}
    if unknown := sorted(given.keys() - parameters.keys()):
        raise ConfigurationError(f"{path}: {key} has no option {unknown[0]}; there are {', '.join(parameters)}")
    needed = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    if missing := sorted(needed - given.keys()):
        raise ConfigurationError(f"{path}: {key} lacks {', '.join(missing)}")
    return dict(given)
