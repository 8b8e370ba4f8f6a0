"""Cases about the calls of hooks: that they happen, change something, and leave alone what is to be read."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl_ext.engine.unmodified import tensors_of_records
from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Run, Subject, finished, same

Call = Callable[..., Any]
_AT_CONSTRUCTION = {"check", "streams"}


@case()
def hooks_fire(subject: Subject, folder: Path) -> None:
    """Every hook that the plugin has is called in training, evaluation and the final save.

    A hook that no run reaches is dead code, or waits for a trainer or a setting that its documents should name.
    """
    calls: Counter[str] = Counter()

    def counted(hook: str, call: Call) -> Call:
        @functools.wraps(call)
        def count(**arguments: Any) -> Any:
            calls[hook] += 1
            return call(**arguments)

        return count

    _observed(subject, folder, counted)
    silent = [hook for hook in subject.hooks if hook not in _AT_CONSTRUCTION and not calls[hook]]
    assert not silent, f"never called in a {subject.trainer} run with training, evaluation and a final save: {silent}"


@case()
def changes_something(subject: Subject, folder: Path) -> str:
    """A run with the plugin differs from one without it: in weights, logs, evaluation or what is saved.

    A plugin that fires and changes nothing is most often one that writes to a copy. The rewards of the GRPO run tell
    completions of a group apart also for an untrained model, since equal ones would hide every change.
    """
    plain = subject.run(folder / "plain", plain=True, trainer=subject.held_out())
    assert plain.change() > 0, "the run without the plugin trains nothing: its rewards are the same within each group"
    mine = subject.run(folder / "run", trainer=subject.held_out())
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

    def compared(hook: str, call: Call) -> Call:
        @functools.wraps(call)
        def compare(**arguments: Any) -> Any:
            before = [(path, tensor, tensor.detach().clone()) for path, tensor in tensors_of_records(arguments)]
            result = call(**arguments)
            edited = [path for path, tensor, kept in before if not same(tensor.detach(), kept)]
            assert not edited, f"hook '{hook}' edited {edited[0]} in place; edit a clone of it"
            return result

        return compare

    _observed(subject, folder, compared)


@case()
def evaluation_changes_nothing(subject: Subject, folder: Path) -> None:
    """Evaluation leaves weights, gradients, the plugin's state and the random state as they are.

    What is logged must not depend on how often it is evaluated. The random state is that of a run without the plugin
    after the same evaluation, since a data loader draws a seed of its own.
    """
    states = []
    for plain in (False, True):
        run = subject.run(folder / f"run{plain}", plain=plain, trainer=subject.held_out())
        kept = run.state()
        torch.manual_seed(5)
        run.trainer.evaluate()
        states.append(torch.get_rng_state())
        after = finished_state(run)
        assert same(after[0], run.parameters), "the weights are other ones after an evaluation"
        assert same(after[1], kept), "the plugin's state_dict() is another one after an evaluation"
    assert torch.equal(*states), "an evaluation with the plugin draws other random numbers than one without it"


def finished_state(run: Run) -> tuple[Any, Any]:
    """The weights and the plugin's state of now."""
    from trl_ext.testing.runs import parameters

    return parameters(run.trainer), run.state()


def _observed(subject: Subject, folder: Path, around: Callable[[str, Call], Call]) -> None:
    """Train, evaluate and save, with something around each call of a hook."""
    trainer = subject.build(folder / "run", trainer=subject.held_out())
    trainer.ext_plugins.wrap(around)
    finished(trainer)
    trainer.evaluate()
    trainer.save_model()


def _numbers(run: Run) -> list[dict[str, Any]]:
    """The log without what every run with an active plugin adds to it."""
    return [
        {key: value for key, value in entry.items() if key != "nll" and not key.endswith("_stream/nll")}
        for entry in run.logs
    ]


def _evaluated(run: Run) -> dict[str, Any]:
    from trl_ext.testing.runs import without_timing

    return without_timing(run.trainer.evaluate(), ("eval_nll",))
