"""In which order, and how often, prompts are drawn in an epoch of GRPO; and groups of one prompt as one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import cycle, groupby, islice
from typing import Literal

import torch
from torch import Tensor

Order = Literal["data", "easy-first", "hard-first"]
_EPSILON = 1e-4  # TRL's, beside the standard deviation


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


def group_labels(prompts: Sequence[int], merged: Sequence[bool], num_generations: int) -> Tensor:
    """(N,) long: which group each completion's advantage is taken in, all groups of a merged prompt being one.

    Args:
        prompts: (N,) number of each completion's prompt, in groups.
        merged: (N,) whether groups of this prompt are one.
        num_generations: completions of a group as it was drawn.
    """
    first: dict[int, int] = {}
    return torch.tensor(
        [
            first.setdefault(prompt, i // num_generations) if one else i // num_generations
            for i, (prompt, one) in enumerate(zip(prompts, merged, strict=True))
        ]
    )


def group_advantages(rewards: Tensor, labels: Tensor, scale: str) -> Tensor:
    """(N,) TRL's advantages of a sum of rewards, for groups of any size.

    Args:
        rewards: (N,) float; NaN where no reward function judged, which counts nowhere and gets 0.
        labels: (N,) long: the group of each.
        scale: TRL's `scale_rewards`: "group" divides by the group's standard deviation, "batch" by that of all.
    """
    judged = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(int(labels.max()) + 1, dtype=x.dtype, device=x.device).index_add(0, labels, x)

    counts = per_group(judged.to(values.dtype))
    mean = (per_group(values) / counts.clamp(min=1))[labels]
    centered = torch.where(judged, values - mean, 0)
    if scale == "none":
        return centered
    if scale == "batch":
        std = values[judged].std() if int(judged.sum()) > 1 else torch.zeros_like(values[:1])
    else:
        std = (per_group(centered**2) / (counts - 1).clamp(min=1)).sqrt()[labels]
    return centered / (std + _EPSILON)
