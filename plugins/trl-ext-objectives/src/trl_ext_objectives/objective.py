"""What every objective is: a loss per label token, with options that may follow a schedule over the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import WITH_LM_HEAD
from trl_ext.schedules import Schedule, parse_schedules

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import Column, TokenRecord


class Objective(ABC):
    """Base of the objectives. A subclass is a dataclass that implements `per_token_loss`.

    An option annotated `Annotated[Scheduled, Range(...)]` may be a schedule such as `"linear:0.1:1"`
    (`trl_ext.schedules`). Its current value comes from `now`, and is logged under the option's name where it moves.
    """

    requires_api: ClassVar[str] = ">=1.5,<2"
    citation: ClassVar[str]
    cost: ClassVar[str] = "none that can be measured"
    trainers: tuple[str, ...] = WITH_LM_HEAD
    """SFT, and for the streams of other plugins the rest."""
    fused_outputs: tuple[str, ...] = ()
    """Outputs of TRL's fused head, beside `log_probs` and `entropy`, that the formula needs."""
    columns: tuple[Column, ...] = ()
    """Columns of the data that the formula reads."""
    alone: str = ""
    """Why no other objective can work beside this one (`mixture`), with what to do instead; empty where one can."""

    @property
    def head_temperature(self) -> float:
        """Temperature at which `log_probs` are wanted."""
        return 1.0

    def __post_init__(self) -> None:
        self._schedules: dict[str, Schedule] = parse_schedules(self)
        self._shown: dict[str, float] = {}

    @property
    def moves(self) -> bool:
        """Whether the loss changes over the training because an option does."""
        return any(schedule.moves for schedule in self._schedules.values())

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
        """Draw the loss and the gradient weight W(p) next to NLL's into an image file.

        Where an option moves, there is a curve for the start, the middle and the end of the training.

        Raises:
            ConfigurationError: The loss of a token depends on columns of the data.
        """
        if self.columns:
            names = ", ".join(column.name for column in self.columns)
            raise ConfigurationError(f"{self!r} has no curve of its own: its loss depends on the data's {names}")
        from trl_ext_objectives.figures import draw_objective

        draw_objective(self.per_token_loss, path, repr(self), temperature=self.head_temperature, moves=self.moves)
