"""One rank of a run that is killed, asked to stop, or left alone; and that goes on where its last checkpoint is.

`python -m torch.distributed.run ... elastic.py FOLDER TROUBLE` makes it a process of a launcher.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_resume import Counter, Mix
from transformers import TrainerCallback

from trl_ext.testing.runs import additions, make_grpo, make_sft, tiny_model

STEPS = 6
TROUBLE = {"none": None, "slow": None, "killed": (1, 3), "asked": (1, 1)}
"""The rank that something happens to, and the steps done by then."""


class Trouble(TrainerCallback):
    """Sends this process a signal, once in the life of the folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.marker, self.kind, self.waits = folder / "happened", kind, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kind == "slow":
            time.sleep(2)
        if self.waits:
            time.sleep(4)  # transformers acts on SIGTERM 3 s later
            self.waits = False
        if TROUBLE[self.kind] == (int(os.environ["RANK"]), state.global_step) and not self.marker.exists():
            self.marker.touch()
            self.waits = True
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "killed" else signal.SIGTERM)


def main(folder: Path, trouble: str, kind: str = "sft") -> int:
    """Train, or go on; save; give the steps done."""
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "plugins": [Mix(), Counter()],
        "streams": {"general": additions(7, seed=3)},
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "enable_jit_checkpoint": True,
        "ddp_timeout": 60,
        "model": tiny_model(attention_dropout=0.1),
        "trainer": {"callbacks": [Trouble(folder, trouble)]},
    }
    if kind == "grpo":
        trainer = make_grpo(folder / "run", names=["ema:decay=0.5"], steps_per_generation=4, **common)
    else:
        trainer = make_sft(folder / "run", names=["power:alpha=0.5", "ema:decay=0.5"], **common)
    saved = list((folder / "run").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if saved else None)
    trainer.save_model(str(folder / "final"))
    return trainer.state.global_step


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
