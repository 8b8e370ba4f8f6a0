"""The run of `excursions`: trainings, each a job, then both probes on what they left.

A stage whose training has ended is not trained again, one that was interrupted goes on from its last checkpoint, and
samples that are drawn are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from trl_ext.errors import ConfigurationError
from trl_ext.jobs import Job, Pool
from trl_ext_probing.drift.drift_run import run as run_drift
from trl_ext_probing.excursions.excursions_results import Row, write_excursions
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.excursions.recipes import Excursions, Stage, read
from trl_ext_probing.passk.passk_run import run as run_passk
from trl_ext_probing.ranks import refuse_several
from trl_ext_probing.training_jobs import MODEL
from trl_ext_probing.training_jobs import train as train_by_command


def run(settings: ExcursionSettings) -> None:
    """Train and measure, checkpoint by checkpoint; the results are written after each.

    Raises:
        ConfigurationError: The file, a training or a measurement cannot be used.
    """
    refuse_several("excursions")
    asked = read(settings)
    for measured in filter(None, (asked.passk, asked.drift)):
        measured.refuse(asked.checkpoints[0])
    rows: list[Row] = []
    with Pool(("trl_ext.checkpoints",) if asked.launcher else ("trl_ext.trainers",)) as pool:
        for checkpoint in asked.checkpoints:
            rows += measure(settings, asked, checkpoint, {"base": checkpoint, **train(pool, asked, checkpoint)})
            write_excursions(settings, rows)


def measure(settings: ExcursionSettings, asked: Excursions, checkpoint: str, models: Mapping[str, str]) -> list[Row]:
    """Run both probes on the models that came of a checkpoint; pass@k is compared with the checkpoint's own."""
    folder, names = asked.folder(checkpoint), list(models.values())
    common = {"confidence": settings.confidence, "overwrite": settings.overwrite}
    passk = replace(asked.passk.settings("", "", folder / "passk"), model=names, **common)
    results = dict(zip(models, run_passk(passk), strict=True))
    changes = {}
    if asked.drift is not None:
        changes = run_drift(replace(asked.drift.settings("", checkpoint, folder / "drift"), model=names[1:], **common))
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


def train(pool: Pool, asked: Excursions, checkpoint: str) -> dict[str, str]:
    """Run all recipes from a checkpoint, each stage from what the one before left; gives each recipe's last model.

    Raises:
        ConfigurationError: A training failed or left no model, or another one has been in its folder.
    """
    chains = {recipe: _stages(asked, checkpoint, recipe, stages) for recipe, stages in asked.recipes.items()}
    errors = [outcome.error for outcome in pool.run(chains.values()) if outcome.error]
    if errors:
        raise ConfigurationError(f"{errors[0]}; mend it and run this command again, which goes on here")
    return {recipe: str(chain[-1].folder / MODEL) for recipe, chain in chains.items()}


def _stages(asked: Excursions, checkpoint: str, recipe: str, stages: Sequence[Stage]) -> list[Job]:
    jobs, model, before = [], checkpoint, ""
    for i, stage in enumerate(stages):
        folder = asked.folder(checkpoint, recipe, f"{i + 1}-{stage.kind}")
        config = hashlib.sha256(stage.config.read_bytes()).hexdigest()
        depends_on = {"kind": stage.kind, "model": model, str(stage.config.name): config, "the stages before": before}
        before = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        command = [stage.kind, "--config", str(stage.config), "--model_name_or_path", model]
        model = str(folder / MODEL)
        arguments = {"folder": folder, "arguments": [*command, "--output_dir", model], "launcher": asked.launcher}
        jobs.append(Job(f"{recipe} from {checkpoint}, {stage.config}", folder, train_by_command, arguments, depends_on))
    return jobs
