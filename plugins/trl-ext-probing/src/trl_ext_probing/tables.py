"""Tables in Markdown, and estimates with their intervals in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trl_ext_probing.intervals import Estimate


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, with a line end; a stroke or a line end in a cell does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(_cell, cells)) + " |\n" for cells in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")


def shown(estimate: Estimate | None, digits: int = 3, sign: str = "", scale: float = 1.0) -> str:
    """`0.412 [0.380, 0.445]`; "undefined" where there is no value, "" where there is no estimate.

    Args:
        estimate: The estimate.
        digits: Behind the point.
        sign: "+" shows the sign of positive numbers, as of a difference.
        scale: 100 for percent.
    """
    if estimate is None:
        return ""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "undefined"
    value, low, high = (f"{scale * x:{sign}.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def percent(estimate: Estimate | None, sign: str = "") -> str:
    """`41.2 [38.0, 44.5]`: in percent."""
    return shown(estimate, 1, sign, 100.0)
