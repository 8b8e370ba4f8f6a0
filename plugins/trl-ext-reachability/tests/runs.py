"""Tiny GRPO runs, and verifiers named by dotted path in their configs."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.testing import ModularChain, tiny_llama, tiny_tokenizer

TASK = ModularChain(steps=2)


def checksum_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that a random model gets at many values, so that groups carry a signal from the first step."""
    return [sum(map(ord, c)) % 7 / 6 for c in completions]


def constant_verifier(steps: Sequence[Sequence[str]], completions: Sequence[str], **columns: Any) -> list[list[float]]:
    """The outcome's reward for every step."""
    outcomes = checksum_reward(completions)
    return [[reward] * len(row) for reward, row in zip(outcomes, steps, strict=True)]


def failing_verifier(steps: Sequence[Sequence[str]], **columns: Any) -> list[list[float]]:
    """Fails on the second rank, or where there is only one."""
    if os.environ.get("RANK", "1") == "1":
        raise LookupError("no verdict")
    return [[0.0] * len(row) for row in steps]


def prompts(size: int = 16) -> Dataset:
    return TASK.dataset(size, "prompt_only")


SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "activation_checkpointing": False,
    "disable_tqdm": True,
}


def grpo(
    output_dir: Path | str,
    plugins: list[Any] | None = None,
    *,
    instances: Sequence[Any] = (),
    plain: bool = False,
    reward: Any = checksum_reward,
    data: Dataset | None = None,
    eval_data: Dataset | None = None,
    streams: dict[str, Dataset] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a few steps at a rate that moves the weights visibly; TRL's own where `plain`."""
    torch.manual_seed(0)
    config = {**SETTINGS, **settings}
    ours: dict[str, Any] = {} if plain else {"plugins": list(instances), "streams": streams}
    return (trl.GRPOTrainer if plain else GRPOTrainer)(
        model=tiny_llama(hidden=16),
        reward_funcs=reward,
        args=trl.GRPOConfig(str(output_dir), **config)
        if plain
        else GRPOConfig(str(output_dir), plugins=plugins, **config),
        train_dataset=prompts() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tiny_tokenizer(),
        **ours,
    )


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of two weights."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


COLUMNS = (
    "key", "rollouts", "successes", "first_rollouts", "first_successes", "low", "high", "worst_token",
    "demonstration_correct", "route",
)  # fmt: skip


def write_measurement(folder: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """What training reads of a finished `trl-ext probe reachability`."""
    models = [{"model": "m", "prior": [0.5, 2.0]}]
    content = {"schema": 1, "probe": "reachability", "settings": settings, "models": models}
    (folder / "results.json").write_text(json.dumps(content))
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows({k: "" if v is None else v for k, v in record.items()} for record in records)
