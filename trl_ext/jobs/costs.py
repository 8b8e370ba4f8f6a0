"""What a training takes: time, memory and tokens, over all its attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

COSTS = "TRL_EXT_COSTS"
"""Environment variable with the file that a training writes its costs to; unset, it writes none."""


@dataclass(frozen=True)
class Costs:
    """What a training took so far, or in all."""

    seconds: float
    """Of training, evaluation on the way included; loading and what an attempt did after its last line are not."""
    steps: int
    """Optimiser steps that the weights have seen."""
    tokens: int
    """Tokens trained on, prompts included and padding left out, as TRL logs them."""
    peak_memory: int
    """Bytes: of the first rank's accelerator as torch allocates, or of its process on a CPU, imports included."""


def append_costs(path: Path, attempt: float, costs: Costs) -> None:
    """Write down what an attempt took so far; `attempt` is the time at which it began, which tells it from others."""
    with path.open("a") as file:
        file.write(json.dumps({"attempt": attempt, **asdict(costs)}) + "\n")


def read_costs(path: Path) -> Costs | None:
    """What a training took: seconds of all attempts, steps and tokens of the last one, and the greatest peak."""
    last = dict(_lines(path))
    if not last:
        return None
    *_, final = last.values()
    seconds, peak = sum(costs.seconds for costs in last.values()), max(costs.peak_memory for costs in last.values())
    return Costs(seconds, final.steps, final.tokens, peak)


def tokens_at(path: Path, step: int) -> int:
    """The tokens that the newest attempt had trained on by a step; 0 where no line is of that step."""
    return next((costs.tokens for _, costs in reversed(list(_lines(path))) if costs.steps == step), 0)


def _lines(path: Path) -> Iterator[tuple[float, Costs]]:
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # of an attempt that was killed as it wrote
            continue
        yield line.pop("attempt"), Costs(**line)
