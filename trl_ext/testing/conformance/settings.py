"""Cases about settings of runs that every plugin meets sooner or later."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch

from trl_ext.testing.conformance.case import Skipped, case
from trl_ext.testing.conformance.subject import Run, Subject, require_close
from trl_ext.testing.runs import lora, start_model

BF16 = 0.05
"""How far the first loss may be off in bf16, which keeps 8 bits: 0.4 % a number, and a tiny model adds few of them."""


@case(setting=True)
def peft(subject: Subject, folder: Path) -> None:
    """With LoRA, the adapter trains and the base model stays as it is.

    Names and number of the trainable parameters are other ones under PEFT: take them from `context.weights`, and not
    from `model.parameters()`.
    """
    if find_spec("peft") is None:
        raise Skipped("peft is not installed")
    run = subject.run(
        folder / "run", model=start_model(subject.trainer), trainer={"peft_config": lora(subject.trainer)}
    )
    _require_sound(run)
    moved = [name for name, value in run.parameters.items() if not torch.equal(value, run.start[name])]
    assert moved, "no weight of the adapter has changed"
    strayed = [name for name in moved if "lora_" not in name and "modules_to_save" not in name]  # a reward's new head
    assert not strayed, f"weights of the base model have changed, first {strayed[0]}"


@case(setting=True)
def bf16_autocast(subject: Subject, folder: Path) -> None:
    """With bf16=True, the first loss is that in fp32 within bf16's rounding, and the run stays finite.

    This is TRL's default. Log-probabilities arrive in fp32 all the same; what the plugin computes by itself has to
    take care of that.
    """
    _require_close_loss(subject.run(folder / "bf16", bf16=True), subject.usual(folder))


@case(setting=True)
def bf16_weights(subject: Subject, folder: Path) -> None:
    """With a model in bf16, the first loss is that in fp32 within bf16's rounding, and the run stays finite.

    Small updates vanish in bf16: sums and averages that a plugin keeps over steps belong in fp32.
    """
    _require_close_loss(
        subject.run(folder / "bf16", model=start_model(subject.trainer).bfloat16()), subject.usual(folder)
    )


@case(setting=True)
def activation_checkpointing(subject: Subject, folder: Path) -> None:
    """With activations checkpointed, the training is the same up to rounding.

    The forward runs once more in the backward pass then, so that hooks on modules fire twice.
    """
    checkpointed = subject.run(folder / "checkpointed", activation_checkpointing=True)
    require_close(checkpointed, subject.usual(folder), "with and without activation_checkpointing")


@case(trainers=("sft",), setting=True)
def padding_free(subject: Subject, folder: Path) -> None:
    """Without padding, a micro-batch is one row, and the training is the same up to rounding.

    Rows are no samples then: which token belongs to which sample is in `tokens.sample_index`.
    """
    flat = subject.run(folder / "flat", padding_free=True, max_length=None)
    require_close(flat, subject.usual(folder), "with and without padding_free")


@case(trainers=("sft",), setting=True)
def packing(subject: Subject, folder: Path) -> None:
    """With samples packed into rows, the plugin trains, and the run stays finite."""
    _require_sound(subject.run(folder / "run", packing=True, max_length=64))


def _require_sound(run: Run) -> None:
    """Hold a run to finite losses and a change of the weights.

    Raises:
        AssertionError: naming the step.
    """
    for entry in run.logs:
        loss = entry.get("loss", 0.0)
        assert math.isfinite(loss), f"the loss of step {entry['step']} is {loss}"
    assert all(value.isfinite().all() for value in run.parameters.values()), "a weight is not finite"
    assert run.change() > 0, "the training changed no weight"


def _require_close_loss(mine: Run, theirs: Run) -> None:
    _require_sound(mine)
    one, other = (run.logs[0]["loss"] for run in (mine, theirs))
    assert abs(one - other) <= BF16 * max(abs(other), 1e-2), f"the first loss is {one:g} in bf16 and {other:g} in fp32"
