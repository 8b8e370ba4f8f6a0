"""Cases about checkpoints: what a plugin remembers, and that a resumed run is the run without a break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import STEPS, Run, Subject, require_same_bits, same


@case()
def resume(subject: Subject, folder: Path) -> None:
    """A run that stops after one step, or after two, and is resumed ends as the run without a break, to the last bit.

    Weights, logs and the plugin's state are compared. What the plugin remembers between steps has to go through
    `state_dict` and `load_state_dict`; what it makes in `setup` from the start has to be saved too, since `setup` of a
    resumed run sees the weights of the checkpoint. Odd and even steps differ where a plugin acts every second step.
    """
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS + 1}
    whole = subject.run(folder / "run", **saving)
    for step in (1, 2):
        again = subject.run(folder / f"run{step}", resume=folder / "run" / f"checkpoint-{step}", **saving)
        what = f"resumed after step {step} of {STEPS + 1}"
        require_same_bits(again.parameters, whole.parameters, f"{what}, the weights")
        require_same_bits(again.state, whole.state, f"{what}, the plugin's state_dict()")
        _require_same_logs(again, whole, what)


@case(applies=lambda subject: hasattr(subject.plugin, "state_dict"))
def state_survives_json(subject: Subject, folder: Path) -> None:
    """What `state_dict()` gives after a training comes back from a checkpoint as it was.

    Tensors are kept to the last bit, and everything else as JSON, which knows texts as the only keys and no tuples:
    `{1: 2}` would come back as `{"1": 2}`.
    """
    state = subject.usual(folder).state
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    back = json.loads(json.dumps(values))
    changed = [name for name, value in values.items() if not same(value, back[name])]
    assert not changed, f"state_dict()[{changed[0]!r}] is {values[changed[0]]!r}, and JSON gives {back[changed[0]]!r}"


def _require_same_logs(again: Run, whole: Run, what: str) -> None:
    """The entries of steps; those at the end of a training hold means over the steps of one process."""
    mine, theirs = (_of_steps(run.logs) for run in (again, whole))
    assert len(mine) == len(theirs), f"{what}: it logs {len(mine)} steps, and without the break {len(theirs)}"
    for one, other in zip(mine, theirs, strict=True):
        require_same_bits(one, other, f"{what}, the log of step {other['step']}")


def _of_steps(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logs if "learning_rate" in entry]
