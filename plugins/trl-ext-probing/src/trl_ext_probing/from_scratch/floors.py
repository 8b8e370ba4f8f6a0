"""What a model scores that knows the format and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from trl_ext.errors import ConfigurationError
from trl_ext_probing.from_scratch.row_texts import Row, completion_text
from trl_ext_probing.rewards import Judge, mean_of_judged

DRAWS = 16
"""Foreign answers that each prompt gets for the format-only score."""


class Floor(NamedTuple):
    """The scores of a model without knowledge of the prompts."""

    scores: list[float]
    """(prompts,)"""
    about: str


def floor_of(kind: str | float, rows: Sequence[Row], training: Sequence[Row], judge: Judge) -> Floor:
    """The floor of an evaluation set.

    majority: every prompt gets the most frequent answer of the training set (its column `answer`, or else the
    completion). format: each prompt gets the completions of 16 training samples drawn at random, with a fixed seed.

    Raises:
        ConfigurationError: the training set shows no answers.
    """
    if not isinstance(kind, str):
        return Floor([kind] * len(rows), f"{kind:g}, as given")
    answers = [answer for answer in map(completion_text, training) if answer]
    if kind == "majority" and training and isinstance(training[0].get("answer"), str):
        answers = [row["answer"] for row in training]
    if not answers:
        raise ConfigurationError(
            f"--floor {kind}: the training set has no completions apart from their prompts; give the floor as a number"
        )
    if kind == "majority":
        # The first of equally frequent ones: Counter keeps the order of appearance.
        ((text, count),) = Counter(answers).most_common(1)
        about = f"the most frequent training answer, {text[:60]!r} ({count} of {len(answers)})"
        return Floor(_scores(judge, rows, [[text] * len(rows)]), about)
    rng = random.Random(0)
    scores = _scores(judge, rows, [rng.choices(answers, k=len(rows)) for _ in range(DRAWS)])
    return Floor(scores, f"the right format with the answers of other prompts, {DRAWS} for each")


def _scores(judge: Judge, rows: Sequence[Row], draws: Sequence[Sequence[str]]) -> list[float]:
    rewards = [judge(rows, texts, [[] for _ in rows]) for texts in draws]
    return mean_of_judged(list(zip(*rewards, strict=True)), judge.name, "an evaluation set")
