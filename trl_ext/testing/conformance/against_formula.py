"""A case about the numbers: loss and gradient against the author's formula, on full logits in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Subject, distance
from trl_ext.testing.runs import parameters

RATE = 0.5
CLOSE = 2e-5
"""Relative error of a gradient in fp32: sums over a few hundred numbers, each off by 6e-8, with a margin."""


@case(trainers=("sft",), applies=lambda subject: subject.formula is not None)
def formula(subject: Subject, folder: Path) -> str:
    """Loss and gradient of the first step are those of the author's formula, by autograd on full logits in fp64.

    The formula takes the logits (N, V) and the labels (N,) of the N label tokens, and gives the loss (N,) of each. It
    is written from the paper, and knows neither the fused head nor masks. Detach in it what the paper does.
    """
    assert subject.formula is not None
    constant: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = subject.build(folder / "run", padding_free=False, max_steps=1, learning_rate=RATE, **constant)
    batch = next(iter(trainer.get_train_dataloader()))
    expected_loss, expected = _by_formula(subject.formula, trainer.ext_base_model(), batch)
    start = parameters(trainer)
    trainer.train()
    step = {name: (start[name] - value) / RATE for name, value in parameters(trainer).items()}
    loss = trainer.state.log_history[0]["loss"]
    assert abs(loss - expected_loss) <= CLOSE * max(1.0, abs(expected_loss)), (
        f"the loss is {loss:.8g}, and by the formula {expected_loss:.8g}"
    )
    size = distance(expected, {name: torch.zeros_like(value) for name, value in expected.items()})
    apart = distance(step, expected) / size
    # The step is read off weights in fp32, which are off by 6e-8 of their own size, divided by the rate.
    read = 1e-7 / RATE * float(torch.stack([value.norm() for value in start.values()]).norm()) / size
    assert apart <= CLOSE + read, f"the gradient differs from the formula's by {apart:.2g} of its norm"
    return f"loss and gradient within {max(apart, abs(loss - expected_loss)):.1g}"


def _by_formula(formula: Any, model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss per label token, and its gradient by parameter."""
    double = copy.deepcopy(model).double()
    logits = type(double).forward(double, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    loss = formula(logits[:, :-1][kept], labels[kept]).mean()
    names, values = zip(*double.named_parameters(), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, values), strict=True))
