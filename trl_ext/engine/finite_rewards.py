"""Rewards and advantages that are not numbers, found before they reach a loss that does not show them.

An infinite reward makes the mean of its group infinite, and TRL turns the advantages that are NaN then to 0: the group
teaches nothing, and nothing says so. With `scale_rewards="none"` they become 3.4e38. A NaN counts as None, which says
that a function does not apply, since TRL writes NaN for None. What can be told apart: an infinite reward; a NaN of a
reward model, which never gives None; and a NaN of a reward function whose answers pass through `nan_as_infinite`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

from trl_ext.errors import NonFiniteError

logger = logging.getLogger(__name__)


def nan_as_infinite(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function, plain or async, whose NaN becomes infinite, so that it differs from None.

    Args:
        function: Of TRL's form. A reward model comes back as it is.
    """
    if isinstance(function, nn.Module):
        return function
    if is_async_callable(function):

        async def asynchronous(*args: Any, **kwargs: Any) -> list[Any]:
            return [_mark(value) for value in await function(*args, **kwargs)]

        return functools.update_wrapper(asynchronous, function)

    def plain(*args: Any, **kwargs: Any) -> list[Any]:
        return [_mark(value) for value in function(*args, **kwargs)]

    return functools.update_wrapper(plain, function)


def reward_fault(per_function: Tensor, names: Sequence[str], functions: Sequence[Any]) -> str | None:
    """Say which rewards cannot be trained on, in a sentence; None where all can. The same on every rank.

    Args:
        per_function: (N x ranks, F) float, as TRL gathered them; NaN where a function returned None.
        names: Names of the reward functions.
        functions: The reward functions themselves; only a model's NaN is a fault.
    """
    for values, name, function in zip(per_function.unbind(dim=1), names, functions, strict=True):
        wrong = values.isinf() | (values.isnan() if isinstance(function, nn.Module) else False)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            return (
                f"reward function {name!r} gave a reward that is NaN or infinite for {int(wrong.sum())} of "
                f"{len(values)} completions, first for number {row} of the generation batch; a reward is a finite "
                "number, or None where the function does not apply"
            )
    return None


def without_faults(advantages: Tensor, fault: str, skip: bool, step: int) -> Tensor:
    """Give NaN in place of the advantages of a generation batch whose rewards are at fault, if its steps are skipped.

    NaN makes the loss NaN, and the agreement before the optimiser then leaves out the step on all ranks alike.

    Args:
        advantages: (N,) float, TRL's.
        fault: From `reward_fault`.
        skip: Whether the run skips such steps; else it stops.
        step: Number of the optimiser step, from 1.

    Raises:
        NonFiniteError: The run does not skip such steps.
    """
    if not skip:
        raise NonFiniteError(
            f"at step {step} {fault}. Mend the function, or set nonfinite='skip' to leave out steps with such rewards"
        )
    logger.warning("step %d is left out: %s", step, fault)
    return torch.full_like(advantages, math.nan)


def refuse_non_finite_advantages(advantages: Tensor) -> None:
    """Refuse what a plugin has made of the advantages, if they are NaN or infinite; to be called within its hook.

    Args:
        advantages: (N,) or (N, T) float.

    Raises:
        ValueError: some are.
    """
    wrong = ~advantages.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"returned advantages that are NaN or infinite for {int(wrong.reshape(len(wrong), -1).any(dim=1).sum())} "
            f"of {len(wrong)} completions; set nonfinite='skip' to leave such steps out"
        )


def _mark(value: Any) -> Any:
    """The reward, or infinity in place of NaN, which alone differs from itself; what is no number is left to TRL."""
    return math.inf if value != value else value
