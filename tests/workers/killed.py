"""Trains in child processes that are killed at a given point of saving checkpoint 4, then resumes each in another.

Children are forks of this process, which has imported everything and computed nothing, so that a point takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_resume
import transformers.trainer
from transformers import Trainer, TrainerState

from trl_ext.checkpoints import newest_complete, plugin_state

STEP = 4
OUT = Path()
"""Folder of the run at hand; children see it as it was when they were forked."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, before: bool, when: Callable[..., bool] = lambda *args: True) -> None:
    """Kill this process before or after a call, once the trainer saves checkpoint 4."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = (OUT / f"checkpoint-{STEP}").is_dir() and when(*args)
        if now and before:
            die()
        result = original(*args, **kwargs)
        if now:
            die()
        return result

    setattr(owner, name, wrapped)


def of_counter(folder: Path, *args: Any) -> bool:
    return folder.name == "Counter"


POINTS: dict[str, Callable[[], None]] = {
    "after the model": lambda: around(Trainer, "_save_optimizer_and_scheduler", before=True),
    "after the optimiser": lambda: around(Trainer, "_save_rng_state", before=True),
    "before the plugins": lambda: around(plugin_state, "save_state", before=True),
    "amid the plugins": lambda: around(plugin_state, "_write", before=True, when=of_counter),
    "after a plugin": lambda: around(plugin_state, "_write", before=False, when=of_counter),
    "before the manifest": lambda: around(os, "replace", before=True, when=lambda a, b: "manifest" in str(b)),
    "after the plugins": lambda: around(plugin_state, "save_state", before=False),
    "before the trainer's state": lambda: around(TrainerState, "save_to_json", before=True),
    "rotation": lambda: around(transformers.trainer, "rotate_checkpoints", before=True),
}


def in_child(work: Callable[[], None]) -> int:
    """The status with which a fork that did the work ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(folder: Path, points: list[str]) -> None:
    global OUT
    report = {}
    for point in points:
        kind, _, where = point.rpartition(": ")
        build, arm = partial(test_resume.build, kind or "sft"), POINTS[where]
        OUT = folder / point / "run"

        def train(build: Callable[..., Any] = build, arm: Callable[[], None] = arm, out: Path = OUT) -> None:
            trainer = build(out, save_total_limit=1)
            arm()
            trainer.train()

        def resume(build: Callable[..., Any] = build, out: Path = OUT) -> None:
            build(out, save_total_limit=1).train(resume_from_checkpoint=True)

        status = in_child(train)
        newest, _ = newest_complete(OUT)
        report[point] = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "resumed at": None if newest is None else int(newest.name.removeprefix("checkpoint-")),
        }
        if in_child(resume) != 0:
            raise SystemExit(f"could not resume after a kill at: {point}")
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
