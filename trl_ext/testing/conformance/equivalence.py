"""Cases about runs that have to be the same: however a window is cut, and however often an instance was used."""

from __future__ import annotations

import copy
from pathlib import Path

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Subject, require_close, require_same_bits


@case(setting=True)
def accumulation(subject: Subject, folder: Path) -> None:
    """An optimiser step is the same, up to rounding, in one micro-batch, in two of half the size, and in four.

    Memory decides how a window is cut, and must not decide what is learnt. What breaks this most often is a mean
    over a micro-batch where the mean over the window is meant: divide by `tokens.denominator`, or leave it to the core.
    """
    runs = [
        subject.run(
            folder / f"{parts}", per_device_train_batch_size=subject.rows // parts, gradient_accumulation_steps=parts
        )
        for parts in (1, 2, 4)
    ]
    for run, parts in zip(runs[1:], (2, 4), strict=True):
        require_close(run, runs[0], f"{parts} micro-batches of {subject.rows // parts} rows, and one of {subject.rows}")


@case()
def two_trainings(subject: Subject, folder: Path) -> None:
    """One instance trains twice, and the second training is the one of a new instance, to the last bit.

    A script may train twice with one instance, and what the first training has left in it must not reach the second:
    set everything up anew in `setup`.
    """
    first = subject.run(folder / "first")
    second = subject.run(folder / "second", first.plugin)
    require_same_bits(second.parameters, first.parameters, "the weights after a second training of one instance")
    assert second.logs == first.logs, "the second training of one instance logs other numbers than the first"


@case()
def deterministic(subject: Subject, folder: Path) -> None:
    """Two runs of two copies of the plugin are the same to the last bit.

    Without this no resume can be. A plugin that draws at random takes its numbers from PyTorch's random state, which
    the trainer seeds and checkpoints keep.
    """
    one, other = (subject.run(folder / name, copy.deepcopy(subject.plugin)) for name in ("one", "other"))
    require_same_bits(one.parameters, other.parameters, "the weights after the same training")
    assert one.logs == other.logs, "the same training logs other numbers"
