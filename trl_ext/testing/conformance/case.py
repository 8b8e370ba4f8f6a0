"""A case of the kit: one property of a plugin, checked by tiny runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trl_ext.errors import ConfigurationError
from trl_ext.records import TRAINERS
from trl_ext.startup.plan import CheckRefusalError
from trl_ext.testing.conformance.subject import Subject

Check = Callable[[Subject, Path], str | None]
"""Checks a subject in an empty folder. It raises AssertionError where the property does not hold, `Skipped` where this
machine cannot tell, and may return a remark."""


class Skipped(Exception):
    """This machine cannot run the case; the text says why."""


@dataclass(frozen=True)
class Case:
    """A property that a plugin is held to."""

    name: str
    check: Check
    trainers: tuple[str, ...]
    applies: Callable[[Subject], bool]
    """Whether the property means anything for a plugin."""
    setting: bool
    """Whether it is a setting of runs: a plugin that does not support it has to refuse them."""

    @property
    def about(self) -> str:
        """What is checked, and why."""
        return inspect.getdoc(self.check) or ""


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    verdict: str
    """passed, FAILED, unsupported or skipped."""
    remark: str = ""
    """Why, or what was measured."""
    error: BaseException | None = None


def case(
    *,
    trainers: tuple[str, ...] = TRAINERS,
    applies: Callable[[Subject], bool] = lambda subject: True,
    setting: bool = False,
) -> Callable[[Check], Case]:
    """Make a function the case of its name; the arguments are the fields of `Case`."""
    return lambda check: Case(check.__name__, check, trainers, applies, setting)


def outcome_of(found: Case, subject: Subject, folder: Path) -> Outcome:
    """Run a case, whatever becomes of it."""
    reason = subject.unsupported.get(found.name)
    if reason is not None and not found.setting:
        return Outcome("unsupported", reason)
    try:
        remark = found.check(subject, folder) or ""
    except Skipped as skipped:
        return Outcome("skipped", str(skipped))
    except Exception as error:
        refusal = _refusal(error)
        if refusal is not None and reason is not None:
            return Outcome("unsupported", reason)
        if isinstance(refusal, CheckRefusalError) and found.setting:  # with these options
            return Outcome("unsupported", str(refusal))
        return Outcome("FAILED", f"{type(error).__name__}: {error}", error)
    if reason is None:
        return Outcome("passed", remark)
    return Outcome("FAILED", f"the plugin declares this unsupported ({reason}), but no run was refused: it may go on")


def _refusal(error: BaseException) -> ConfigurationError | None:
    """Why a run was refused before it began, in this process or on the ranks that it started; None if it was not."""
    return next((e for e in (error, error.__cause__) if isinstance(e, ConfigurationError)), None)
