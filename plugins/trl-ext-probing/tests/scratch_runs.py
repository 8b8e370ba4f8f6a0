"""A tiny SFT run and its evaluation sets on disk, for the from-scratch control."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext_probing.from_scratch.arms import Base
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings

from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

SEED = 5
COLUMNS = ("prompt", "completion", "answer")
YAML = """
model_name_or_path: {folder}/base
dataset_name: {folder}/train.jsonl
output_dir: {folder}/unused
max_steps: 8
seed: 5
per_device_train_batch_size: 8
learning_rate: 0.01
lr_scheduler_type: constant
bf16: false
use_cpu: true
report_to: none
activation_checkpointing: false
"""


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of three characters that are digits: what a model learns of an answer within a few steps."""
    return [sum(c.isdigit() for c in text[:3]) / 3 for text in completions]


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps({key: row[key] for key in COLUMNS}) + "\n" for row in rows))
    return str(path)


def prepare(folder: Path) -> FromScratchSettings:
    """A base model that is the random initialisation of the first seed, data and YAML, and settings for them."""
    shape = save_model(tiny_llama(hidden=16, layers=1), tiny_tokenizer(), folder / "shape")
    model = type("ModelConfig", (), {"model_name_or_path": shape, "model_revision": "main"})
    Base(model).start("scratch", SEED, folder / "base")
    (folder / "sft.yaml").write_text(YAML.format(folder=folder))
    write(folder / "train.jsonl", Addition(digits=2).dataset(80))
    return FromScratchSettings(
        config=str(folder / "sft.yaml"),
        eval_in=write(folder / "in.jsonl", Addition(digits=2).dataset(12, split="held_out")),
        eval_out=write(folder / "out.jsonl", Addition(digits=4).dataset(12, split="held_out")),
        reward=["scratch_runs:digits"],
        floor="0",
        learning_rates="0.003,0.01",
        points=2,
        n=4,
        temperature=1.0,
        max_completion_length=3,
    )
