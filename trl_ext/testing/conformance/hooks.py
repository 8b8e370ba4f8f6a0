"""Cases about the calls of hooks: that they happen, change something, and leave alone what is to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trl_ext.engine.unmodified import tensors_of_records
from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Run, Subject, require_same_bits, same, state_of
from trl_ext.testing.runs import parameters, without_timing

Call = Callable[..., Any]


@case()
def hooks_fire(subject: Subject, folder: Path) -> None:
    """Every hook that the plugin has is called in training, evaluation and the final save.

    A hook that no run reaches is dead code, or waits for a trainer or a setting that its documents should name.
    """
    calls, _ = _observed(subject, folder)
    silent = [hook for hook in subject.hooks if hook != "check" and not calls[hook]]
    assert not silent, f"never called in a {subject.trainer} run with training, evaluation and a final save: {silent}"


@case()
def changes_something(subject: Subject, folder: Path) -> str:
    """A run with the plugin differs from one without it: in weights, logs, or evaluation.

    A plugin that fires and changes nothing is most often one that writes to a copy. The rewards of the GRPO run tell
    completions of a group apart also for an untrained model, since equal ones would hide every change.
    """
    mine, plain = subject.usual(folder), subject.without(folder)
    assert plain.change() > 0, "the run without the plugin trains nothing: its rewards are the same within each group"
    found = {"weights": not same(mine.parameters, plain.parameters), "logs": _numbers(mine) != _numbers(plain)}
    found["evaluation"] = _evaluated(mine) != _evaluated(plain)
    changed = [name for name, differs in found.items() if differs]
    assert changed, "weights, logs and evaluation are those of a run without the plugin, to the last bit"
    return f"changes {', '.join(changed)}"


@case()
def records_unmodified(subject: Subject, folder: Path) -> None:
    """The records that hooks receive hold the same numbers after the call.

    The core, the log and other plugins read the same tensors. Copies are compared bit by bit, so that edits which
    PyTorch does not count, as of `tensor.data`, are found too.
    """
    _, edited = _observed(subject, folder)
    assert not edited, f"edited in place: {', '.join(sorted(edited))}; edit a clone"


@case()
def evaluation_changes_nothing(subject: Subject, folder: Path) -> None:
    """Evaluation leaves weights, the plugin's state and the random state as they are.

    What is trained must not depend on how often it is evaluated. The random state is compared with that of a run
    without the plugin after the same evaluation, since a data loader draws a seed of its own.
    """
    states = []
    for run in (subject.usual(folder), subject.without(folder)):
        weights, state = parameters(run.trainer), state_of(run.plugin)
        torch.manual_seed(5)
        run.trainer.evaluate()
        states.append(torch.get_rng_state())
        require_same_bits(parameters(run.trainer), weights, "the weights after an evaluation, and before")
        require_same_bits(state_of(run.plugin), state, "the plugin's state_dict() after an evaluation, and before")
    assert torch.equal(*states), "an evaluation with the plugin draws other random numbers than one without it"


def _observed(subject: Subject, folder: Path) -> tuple[Counter[str], set[str]]:
    """How often each hook was called in a training with evaluation and save, and which tensors hooks have edited."""

    def observe() -> tuple[Counter[str], set[str]]:
        calls: Counter[str] = Counter()
        edited: set[str] = set()
        trainer = subject.build(folder / "observed", trainer=subject.held_out())
        calls["streams"] = len(trainer.ext_streams)  # asked for at construction; of no use where there is no data
        trainer.ext_plugins.wrap(lambda hook, call: partial(_watched, calls, edited, hook, call))
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        return calls, edited

    return subject.once("observed", observe)


def _watched(calls: Counter[str], edited: set[str], hook: str, call: Call, **arguments: Any) -> Any:
    before = [(path, tensor, tensor.detach().clone()) for path, tensor in tensors_of_records(arguments)]
    calls[hook] += 1
    result = call(**arguments)
    edited.update(f"{path} by {hook}" for path, tensor, kept in before if not same(tensor.detach(), kept))
    return result


def _numbers(run: Run) -> list[dict[str, Any]]:
    """The log without what every run with an active plugin adds to it."""
    return [
        {key: value for key, value in entry.items() if key != "nll" and not key.endswith("_stream/nll")}
        for entry in run.logs
    ]


def _evaluated(run: Run) -> dict[str, Any]:
    return without_timing(run.trainer.evaluate(), ("eval_nll",))
