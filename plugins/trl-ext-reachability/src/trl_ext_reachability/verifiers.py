"""Verifiers: they give each step of a completion a reward.

A verifier is called like a reward function of TRL, once for a rank's completions, with `steps` in addition:
`verifier(steps=[["2 + 3 = 5\n", "5 * 2 = 10"], ...], prompts=..., completions=..., completion_ids=..., **columns)`.
It returns one list of numbers per completion, one number per step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ext_reachability.steps import Splitter

Verifier = Callable[..., Sequence[Sequence[float]]]


@dataclass(frozen=True)
class StepChecker:
    """Compares each step with that of a reference solution: r_i = 1[y_1:i = y*_1:i], so no step is right after a
    wrong one (arXiv 2603.06957, process rewards).

    A completion that stops before the solution does is wrong in its last step: the policy chose to stop there. With
    single tokens as steps this needs no rule, since EOS is a step of its own.
    """

    splitter: Splitter
    solution: str
    """Column that holds the reference solution."""
    pattern: str | None = None
    """Regular expression for what counts of a step: its last match, or group 1 of that. The whole step where None."""
    wrong: float = 0.0
    """Reward of a wrong step; a right one has 1."""

    def __call__(
        self, steps: Sequence[Sequence[str]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[list[float]]:
        if self.solution not in columns:
            raise ValueError(
                f"solution={self.solution!r}: the data set has no such column; name the one that holds the reference "
                "solutions"
            )
        return [
            self._compare(mine, self.splitter.reference(str(solution)), self._stopped(ids))
            for mine, ids, solution in zip(steps, completion_ids, columns[self.solution], strict=True)
        ]

    def _compare(self, mine: Sequence[str], reference: Sequence[str], stopped: bool) -> list[float]:
        right = [self._essence(a) == self._essence(b) is not None for a, b in zip(mine, reference, strict=False)]
        right += [False] * (len(mine) - len(right))
        if stopped and len(mine) < len(reference) and right:
            right[-1] = False
        first_wrong = right.index(False) if False in right else len(right)
        return [1.0 if i < first_wrong else self.wrong for i in range(len(mine))]

    def _essence(self, step: str) -> str | None:
        if self.pattern is not None:
            matches = list(re.finditer(self.pattern, step))
            return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
        if self.splitter.split == "token":
            return step
        return step.strip().removesuffix(self.splitter.delimiter).strip()

    def _stopped(self, ids: Sequence[int]) -> bool:
        single_tokens = self.splitter.split == "token"
        return not single_tokens and len(ids) > 0 and ids[-1] == self.splitter.tokenizer.eos_token_id
