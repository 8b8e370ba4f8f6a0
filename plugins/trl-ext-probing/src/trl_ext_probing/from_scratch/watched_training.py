"""One training of an arm: the user's SFT run through TRL's own script, watched at some points on its way."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trl
from torch import Tensor
from transformers import TrainerCallback

from trl_ext import SFTTrainer
from trl_ext.cli import parse
from trl_ext.errors import NonFiniteError
from trl_ext_probing.training_jobs import newest_checkpoint

FIXED: dict[str, Any] = {
    "save_strategy": "no",
    "save_total_limit": 1,
    "save_only_model": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "ignore_data_skip": False,
    "push_to_hub": False,
    "disable_tqdm": True,
}
"""What the probe takes over from the user's settings: saving, evaluating and resuming, none of which moves weights."""


class Point(NamedTuple):
    """A place on the way of a training, with the model as it would be deployed there."""

    folder: Path
    step: int
    tokens: int
    """Trained on so far, prompts included and padding left out."""
    batches: str
    """SHA-256 of all batches so far, in order."""
    last: bool


def points_of(folder: Path) -> list[Point]:
    """The finished points of a run, in order."""
    found = [Point(path.parent, **json.loads(path.read_text())) for path in folder.glob("points/step-*/point.json")]
    return sorted(found, key=lambda point: point.step)


def is_trained(folder: Path) -> bool:
    """Whether a run is at its end."""
    return any(point.last for point in points_of(folder))


def train(config: str, folder: str, start: str, rate: float, seed: int, points: int, share: float = 1.0) -> str:
    """Train to the end, from the newest complete checkpoint where there is one; our trainer keeps TRL's place.

    Args:
        config: the user's YAML.
        folder: of the run: `points` and `checkpoint-*`.
        start: the initial weights, a path or hub id.
        rate: learning rate.
        seed: of the training, the order of the data included.
        points: number of points, evenly spaced; the last is the end.
        share: of the steps or epochs.

    Returns:
        Why it diverged; "" where it did not.
    """
    flags = {**FIXED, "output_dir": folder, "model_name_or_path": start, "learning_rate": rate, "seed": seed}
    if share < 1:
        _, args, *_ = parse("sft", ["--config", config])
        if args.max_steps > 0:
            flags["max_steps"] = math.ceil(share * args.max_steps)
        else:
            flags["num_train_epochs"] = share * args.num_train_epochs
    if (newest := newest_checkpoint(Path(folder))) is not None:
        flags["resume_from_checkpoint"] = newest
    parsed = parse("sft", ["--config", config, *(text for k, v in flags.items() for text in (f"--{k}", str(v)))])
    trl.SFTTrainer = partial(WatchedTrainer, points=points)  # where TRL's script takes its trainer from
    from trl.scripts.sft import main

    try:
        main(*parsed)
    except NonFiniteError as error:
        return str(error)
    return ""


class WatchedTrainer(SFTTrainer):
    """Counts tokens, sums up batches, and keeps the model and a checkpoint at each point.

    Args:
        *args, **kwargs: the trainer's.
        points: number of points.
    """

    def __init__(self, *args: Any, points: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen_tokens = 0
        self.seen_batches = ""
        self.add_callback(_Watch(self, points))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.seen_tokens += int(ids.numel() if mask is None else mask.sum())
        content = ids.cpu().numpy().tobytes() + inputs["labels"].cpu().numpy().tobytes()
        self.seen_batches = hashlib.sha256(self.seen_batches.encode() + content).hexdigest()
        return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir != self.args.output_dir:  # the end is the last point
            super().save_model(output_dir, _internal_call)


class _Watch(TrainerCallback):
    def __init__(self, trainer: WatchedTrainer, points: int) -> None:
        self.trainer = trainer
        self.points = points
        self.steps: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = {max(round(i * state.max_steps / self.points), 1) for i in range(1, self.points + 1)}
        for point in points_of(Path(args.output_dir)):
            if point.step == state.global_step:  # resumed: checkpoints are at points
                self.trainer.seen_tokens, self.trainer.seen_batches = point.tokens, point.batches

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.steps:
            return
        folder = Path(args.output_dir, "points", f"step-{state.global_step:08d}")
        unfinished = folder.with_name(f".{folder.name}")
        for stale in (folder, unfinished):  # of a run that was killed before its checkpoint
            shutil.rmtree(stale, ignore_errors=True)
        self.trainer.save_model(str(unfinished))
        about = {
            "step": state.global_step,
            "tokens": self.trainer.seen_tokens,
            "batches": self.trainer.seen_batches,
            "last": state.global_step == state.max_steps,
        }
        (unfinished / "point.json").write_text(json.dumps(about))
        unfinished.rename(folder)
        control.should_save = not about["last"]
