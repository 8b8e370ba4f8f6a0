"""Cases about runs that have to be the same: however a window is cut, and however often an instance was used."""

from __future__ import annotations

from pathlib import Path

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Subject, require_close, require_same_bits


@case()
def accumulation(subject: Subject, folder: Path) -> None:
    """An optimiser step is the same, up to rounding, in one micro-batch, in two of half the size, and in four.

    Memory decides how a window is cut, and must not decide what is learnt. What breaks this most often is a mean
    over a micro-batch where the mean over the window is meant: divide by `tokens.denominator`, or leave it to the core.
    A method that chooses within micro-batches says so in `unsupported`.
    """
    for parts in (2, 4):
        rows = subject.rows // parts
        run = subject.run(folder / f"{parts}", per_device_train_batch_size=rows, gradient_accumulation_steps=parts)
        require_close(run, subject.usual(folder), f"{parts} micro-batches of {rows} rows, and one of {subject.rows}")


@case()
def two_trainings(subject: Subject, folder: Path) -> None:
    """One instance trains twice, and the second training is the one of a new instance, to the last bit.

    A script may train twice with one instance, and what the first training has left in it must not reach the second:
    set everything up anew in `setup`. A plugin that draws at random takes its numbers from PyTorch's random
    state, which the trainer seeds.
    """
    first = subject.usual(folder)
    second = subject.run(folder / "second", first.plugin, trainer=subject.held_out())
    require_same_bits(second.parameters, first.parameters, "the weights after a second training of one instance")
    assert second.logs == first.logs, "the second training of one instance logs other numbers than the first"
