"""What every objective shares: option ranges, schedules, the choice of denominator, and its picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from trl_ext import hookimpl
from trl_ext_objectives.schedule import Range, Schedule, parse_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trl_ext.records import TokenRecord

Normalization = Literal["valid", "kept"]


class Objective(ABC):
    """Base of the objectives. A subclass is a dataclass that implements `per_token_loss`.

    An option annotated `float | str` may be a schedule such as `"linear:0.1:1"` (`trl_ext_objectives.schedule`); its
    current value comes from `now`, and is logged under the option's name where it moves.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    ranges: ClassVar[Mapping[str, Range]] = {}
    """Options that are numbers, with the values that are allowed."""
    fused_outputs: tuple[str, ...] = ()
    """Outputs of TRL's fused head, beside `log_probs` and `entropy`, that the formula needs."""
    mixable: ClassVar[bool] = True
    """Whether the objective leaves the model's forward alone, so that another one can work beside it."""

    @property
    def head_temperature(self) -> float:
        """Temperature at which `log_probs` are wanted."""
        return 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        self._schedules: dict[str, Schedule] = {
            option: parse_schedule(getattr(self, option), f"{name}: {option}", allowed)
            for option, allowed in self.ranges.items()
        }
        self._shown: dict[str, float] = {}

    def choose(self, option: str, allowed: Any) -> None:
        """Check an option against a `Literal`.

        Raises:
            ValueError: naming the option and the choices.
        """
        value = getattr(self, option)
        if value not in get_args(allowed):
            raise ValueError(f"{type(self).__name__}: {option}={value!r} is not one of {', '.join(get_args(allowed))}")

    def now(self, option: str, tokens: TokenRecord) -> float:
        """The option's value at this point of the training."""
        schedule = self._schedules[option]
        value = schedule(tokens.progress)
        if schedule.moves:
            self._shown[option] = value
        return value

    @abstractmethod
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) of each label token; a hook in every subclass."""

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Options that move, at their latest value."""
        return dict(self._shown)

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the loss and the gradient weight W(p) next to NLL's, into an image file."""
        from trl_ext_objectives.drawing import draw

        draw(self, path)


class KeptShare:
    """Counts kept against valid tokens of this rank between two logs, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[bool, list[Tensor | int]] = {}

    def add(self, kept: Tensor, tokens: TokenRecord) -> None:
        """Count one micro-batch; `kept` is (B, T) bool, False where the mask is."""
        sums = self._sums.setdefault(tokens.training, [0, 0])
        sums[0] = sums[0] + kept.sum()
        sums[1] = sums[1] + tokens.mask.sum()

    def pop(self, mode: str) -> dict[str, float]:
        """The share since the last call, as `kept_share`; nothing where no token was counted."""
        kept, valid = self._sums.pop(mode == "train", (0, 0))
        return {"kept_share": float(kept / valid)} if valid else {}


def normalized(loss: Tensor, kept: Tensor, tokens: TokenRecord, normalization: Normalization) -> Tensor:
    """Keep the loss of the kept tokens, over the denominator that was asked for.

    "valid": as it is; the core divides by all label tokens of the window. "kept": scaled so that the sum over the
    core's denominator becomes the mean over this micro-batch's kept tokens, averaged over the window's micro-batches
    and ranks, which is the reduction of arXiv 2510.00526.

    Args:
        loss: (B, T).
        kept: (B, T) bool, False where the mask is.
    """
    loss = loss * kept
    if normalization == "valid":
        return loss
    share: torch.Tensor = tokens.denominator / (kept.sum().clamp(min=1) * tokens.accumulation_steps)
    return loss * share
