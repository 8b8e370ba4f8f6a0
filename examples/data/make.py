"""Write the data files of this folder: short word problems with worked solutions, and general text.

python examples/data/make.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "pens", "stamps", "shells")
WORDS = ("stone", "river", "lamp", "green", "paper", "cloud", "seven", "north")


def problem(draw: random.Random) -> dict[str, str]:
    """A problem of two steps; the answer stands alone in `answer`, and behind "####" in the solution, as in GSM8K."""
    first, second = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    start, boxes, each = draw.randint(2, 20), draw.randint(2, 9), draw.randint(2, 9)
    bought = boxes * each
    total = start + bought
    return {
        "prompt": f"{first} has {start} {thing}. {second} gives {first} {boxes} boxes with {each} {thing} each. "
        f"How many {thing} does {first} have now?\n",
        "completion": f"The boxes hold {boxes} * {each} = {bought} {thing}. "
        f"{first} has {start} + {bought} = {total} {thing}.\n#### {total}",
        "answer": str(total),
    }


def general(draw: random.Random) -> dict[str, str]:
    """An instruction that has nothing to do with the problems: put words in order."""
    words = draw.sample(WORDS, 4)
    return {
        "prompt": f"Put these words in alphabetical order: {', '.join(words)}.\n",
        "completion": f"{', '.join(sorted(words))}.",
    }


def conversation(draw: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Two problems, of which the first is answered without working; only the second answer is to be learned from."""
    hasty, careful = problem(draw), problem(draw)
    turns = (
        ("user", hasty["prompt"], None),
        ("assistant", hasty["answer"], 0.0),
        ("user", f"How did you find out? And: {careful['prompt']}", None),
        ("assistant", careful["completion"], 1.0),
    )
    weighted = [{"role": role, "content": text.strip(), "weight": weight} for role, text, weight in turns]
    return {"messages": [{k: v for k, v in message.items() if v is not None} for message in weighted]}


def distinct(make: Callable[[random.Random], dict[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """Rows without end, no prompt twice."""
    draw, seen = random.Random(seed), set()
    while True:
        row = make(draw)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def main() -> None:
    problems, texts = distinct(problem, seed=0), distinct(general, seed=1)
    for name, rows, count in (("train", problems, 200), ("test", problems, 50), ("general", texts, 100)):
        lines = (json.dumps(next(rows)) for _ in range(count))
        Path(__file__).with_name(f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    draw = random.Random(2)
    lines = (json.dumps(conversation(draw)) for _ in range(40))
    Path(__file__).with_name("conversations.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
