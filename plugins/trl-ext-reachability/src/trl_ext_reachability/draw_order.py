"""In which order, and how often, prompts are drawn in an epoch of GRPO."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import cycle, groupby, islice
from typing import Literal

Order = Literal["data", "easy-first", "hard-first"]


def draw_order(
    order: Sequence[int],
    kept: Sequence[bool],
    groups: Sequence[int],
    rates: Sequence[float],
    by: Order,
    batch: int,
) -> list[int]:
    """Rows in the order to draw them, as many as there are rows; a row that is to have several groups comes as often.

    Rows are chosen in the order given, so that those for which an epoch has no room are not always the same; where
    rows are left out, it begins again. Then they are sorted, and laid into generation batches so that the groups of a
    row lie in one: rows of one group fill the gaps. Where there are none left, groups are spread over two batches.
    What does not fill a batch is never drawn, and stays last: sorted with the others, it would always be the same rows.

    Args:
        order: row numbers as they would be drawn.
        kept, groups, rates: for each row, by its number: whether to draw it, in how many groups, its success rate.
        by: "data" keeps the order, the others sort by rate.
        batch: groups of a generation batch.

    Raises:
        ValueError: no row is kept.
    """
    rows = [row for row in order if kept[row]]
    if not rows:
        raise ValueError("no prompt is left to draw")
    endless = ((turn, row) for turn, row in enumerate(cycle(rows)) for _ in range(groups[row]))
    turns = list(islice(endless, len(order)))
    drawn = len(order) // batch * batch
    chosen = [(row, len(list(same))) for (_, row), same in groupby(turns[:drawn])]
    if by != "data":
        chosen.sort(key=lambda item: rates[item[0]], reverse=by == "easy-first")
    return _packed(chosen, batch) + [row for _, row in turns[drawn:]]


def _packed(chosen: Sequence[tuple[int, int]], batch: int) -> list[int]:
    """Rows repeated as often as they say, in batches that split as few of them as may be."""
    singles = deque((place, row) for place, (row, n) in enumerate(chosen) if n == 1)
    several = deque((place, row, n) for place, (row, n) in enumerate(chosen) if n > 1)
    laid: list[int] = []
    while singles or several:
        room = batch - len(laid) % batch
        if several and (not singles or (several[0][0] < singles[0][0] and several[0][2] <= room)):
            place, row, n = several.popleft()
            now = min(n, room)
            laid += [row] * now
            if now < n:
                several.appendleft((place, row, n - now))
        else:
            laid.append(singles.popleft()[1])
    return laid
