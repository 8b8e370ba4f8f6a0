"""The run of `excursions`: trainings one after the other, then both probes on what they left.

A stage whose training has ended is not trained again, one that was interrupted goes on from its last checkpoint, and
samples that are drawn are kept.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from trl_ext.errors import ConfigurationError
from trl_ext_probing.drift.drift_run import run as run_drift
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.excursions.excursions_results import Row, write_excursions
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.excursions.recipes import Excursions, Stage, read
from trl_ext_probing.passk.passk_run import run as run_passk
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.progress import say
from trl_ext_probing.ranks import refuse_several

DONE = "excursion.json"
"""Written into a stage's folder when its training has ended; says what it was of."""


def run(settings: ExcursionSettings) -> None:
    """Train and measure, checkpoint by checkpoint; the results are written after each.

    Raises:
        ConfigurationError: The file, a training or a measurement cannot be used.
    """
    refuse_several("excursions")
    asked = read(settings)
    rows: list[Row] = []
    for checkpoint in asked.checkpoints:
        models = {"base": checkpoint}
        for recipe, stages in asked.recipes.items():
            models[recipe] = train(asked, checkpoint, recipe, stages)
        rows += measure(settings, asked, checkpoint, models)
        write_excursions(settings, rows)


def measure(settings: ExcursionSettings, asked: Excursions, checkpoint: str, models: Mapping[str, str]) -> list[Row]:
    """Run both probes on the models that came of a checkpoint; pass@k is compared with the checkpoint's own."""
    folder, names = asked.folder(checkpoint), list(models.values())
    common = {"confidence": settings.confidence, "overwrite": settings.overwrite}
    passk = PasskSettings(**{**common, **asked.passk, "model": names, "output": folder / "passk"})
    results = dict(zip(models, run_passk(passk), strict=True))
    changes = {}
    if asked.drift is not None:
        given = {**common, **asked.drift, "base": checkpoint, "model": names[1:], "output": folder / "drift"}
        changes = run_drift(DriftSettings(**given))
    return [
        Row(
            checkpoint,
            recipe,
            models[recipe],
            result.estimates,
            {} if recipe == "base" else result.differences(results["base"]),
            changes[models[recipe]]["nll"].change if models[recipe] in changes else None,
        )
        for recipe, result in results.items()
    ]


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
                    "choose another --output"
                )
        else:
            command = [*asked.launcher, stage.kind, "--config", str(stage.config), "--model_name_or_path", model]
            command += ["--output_dir", str(folder)]
            if any(folder.glob("checkpoint-*/trainer_state.json")):
                command += ["--resume_from_checkpoint", "true"]
            say(f"{recipe} from {checkpoint}: {shlex.join(command)}")
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
