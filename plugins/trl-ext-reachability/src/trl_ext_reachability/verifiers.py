"""Verifiers: they give each step of a completion a reward.

A verifier is called like a reward function of TRL, once for a rank's completions, with `steps` and `step_ids`, the
tokens of each step, in addition: `verifier(steps=[["2 + 3 = 5\n", "5 * 2 = 10"], ...], step_ids=[[[...], [...]], ...],
prompts=..., completions=..., completion_ids=..., **columns)`.
It returns one list of numbers per completion, one number per step. None in place of a number or of a list says that the
verifier cannot judge this step or completion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import and_
from typing import Any

from trl_ext_reachability.steps import Splitter

Verifier = Callable[..., Sequence[Sequence[float | None] | None]]


@dataclass(frozen=True)
class StepChecker:
    """Compares each step with that of a reference solution: r_i = 1[y_1:i = y*_1:i], so no step is right after a
    wrong one (arXiv 2603.06957, process rewards).

    A completion that stops before the solution does is wrong in its last step: the policy chose to stop there. Single
    tokens as steps are compared as tokens, and need no such rule, since EOS is a step of its own.
    """

    splitter: Splitter
    solution: str
    """Column that holds the reference solution, as text."""
    pattern: str | None = None
    """Regular expression for what counts of a step: its last match, or group 1 of that. The whole step where None."""
    wrong: float = 0.0
    """Reward of a wrong step; a right one has 1."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end a completion."""

    def __call__(
        self, steps: Sequence[Sequence[str]], step_ids: Sequence[Sequence[Sequence[int]]], **columns: Any
    ) -> list[list[float]]:
        """1 for each right step, `wrong` for the others.

        Raises:
            ValueError: the data set has no such column, or a solution that is no text.
        """
        if self.solution not in columns:
            raise ValueError(
                f"solution={self.solution!r}: the data set has no such column; name the one that holds the reference "
                "solutions"
            )
        solutions = columns[self.solution]
        for solution in solutions:
            if not isinstance(solution, str):
                raise ValueError(
                    f"solution={self.solution!r}: the column holds {solution!r} ({type(solution).__name__}), no text; "
                    "give the reference solutions as text"
                )
        judge = self._tokens if self.splitter.split == "token" else self._texts
        verdicts = [judge(*row) for row in zip(steps, step_ids, solutions, strict=True)]
        return [[1.0 if right else self.wrong for right in accumulate(row, and_)] for row in verdicts]

    def _tokens(self, texts: Sequence[str], ids: Sequence[Sequence[int]], solution: str) -> list[bool]:
        """Whether each token is that of the solution, or the one that ends a completion after it."""
        reference = self.splitter.solution_ids(solution)
        mine = [token for step in ids for token in step]
        right = [a == b for a, b in zip(mine, reference, strict=False)]
        return right + [i == len(reference) and mine[i] in self.eos_ids for i in range(len(right), len(mine))]

    def _texts(self, texts: Sequence[str], ids: Sequence[Sequence[int]], solution: str) -> list[bool]:
        """Whether each step says what that of the solution does."""
        reference = self.splitter.reference(solution)
        right = [self._essence(a) == self._essence(b) is not None for a, b in zip(texts, reference, strict=False)]
        right += [False] * (len(texts) - len(right))
        if right and len(texts) < len(reference) and ids[-1][-1] in self.eos_ids:
            right[-1] = False
        return right

    def _essence(self, step: str) -> str | None:
        if self.pattern is not None:
            matches = list(re.finditer(self.pattern, step))
            return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
        return step.strip().removesuffix(self.splitter.delimiter).strip()
