"""The rewards of the steps of this rank's completions, as a verifier gives them, on all ranks or on none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_ext.ranks import on_every_rank
from trl_ext.records import Rollouts
from trl_ext_reachability.steps import Span, Splitter
from trl_ext_reachability.verifiers import Verifier

RESERVED = ("steps", "step_ids")
"""What verifiers receive beside the columns of the data set."""
_TAKEN = ("prompt", "completion_ids")  # of other columns `completion` is one: demonstrations have their solution there
_NOT_JUDGED = math.nan


@dataclass(frozen=True)
class StepRewards:
    """Rewards of N completions of up to S steps each."""

    values: Tensor
    """(N, S) float; NaN where `mask` is False."""
    mask: Tensor
    """(N, S) bool: the steps that the verifier judged."""
    spans: Sequence[Sequence[Span]]
    """For each completion the tokens of its steps."""

    def per_token(self, of_steps: Tensor, width: int) -> Tensor:
        """(N, width) float: what each step has, at each of its tokens; 0 where no step was judged.

        Args:
            of_steps: (N, S) float.
            width: Tokens of a row.
        """
        tokens = torch.zeros(len(of_steps), width, dtype=of_steps.dtype, device=of_steps.device)
        known = torch.where(self.mask, of_steps, 0)
        for row, spans in enumerate(self.spans):
            for step, (start, end) in enumerate(spans):
                tokens[row, start:end] = known[row, step]
        return tokens

    def statistics(self) -> list[tuple[float, float, float]]:
        """Of each completion with a judged step: its mean reward, its number of them, whether all have 1 or more."""
        rows = (values[mask].tolist() for values, mask in zip(self.values, self.mask, strict=True))
        return [(sum(row) / len(row), float(len(row)), float(min(row) >= 1)) for row in rows if row]


class StepJudge:
    """Splits completions into steps, and asks a verifier for their rewards.

    Args:
        splitter: Where steps begin and end.
        verifier: See `trl_ext_reachability.verifiers`.
    """

    def __init__(self, splitter: Splitter, verifier: Verifier) -> None:
        self.splitter = splitter
        self.verifier = verifier

    def __call__(self, rollouts: Rollouts) -> StepRewards:
        """Judge this rank's completions. Collective: a verifier that fails on one rank stops all with its message.

        Without that the other ranks would wait for this one's part of their groups.

        Raises:
            OnAllRanksError: on several ranks, where the verifier failed on any; on one rank the failure itself.
        """
        return on_every_rank(partial(self._judge, rollouts))

    def _judge(self, rollouts: Rollouts) -> StepRewards:
        splitter = self.splitter
        rows = list(zip(rollouts.completion_ids.tolist(), rollouts.mask.tolist(), strict=True))
        spans = [splitter.spans(ids, mask) for ids, mask in rows]
        given = self.verifier(
            steps=[splitter.texts(ids, row) for (ids, _), row in zip(rows, spans, strict=True)],
            step_ids=[[ids[a:b] for a, b in row] for (ids, _), row in zip(rows, spans, strict=True)],
            prompts=list(rollouts.prompts),
            completions=list(rollouts.completions),
            completion_ids=[splitter.trimmed(ids, mask) for ids, mask in rows],
            **{key: [row[key] for row in rollouts.inputs] for key in rollouts.inputs[0] if key not in _TAKEN},
        )
        verdicts = [torch.tensor(row) for row in _read_verdicts(given, [len(row) for row in spans])]
        values = pad_sequence(verdicts, batch_first=True, padding_value=_NOT_JUDGED).to(rollouts.mask.device)
        return StepRewards(values, ~values.isnan(), spans)


def _read_verdicts(given: Sequence[Sequence[float | None] | None], steps: Sequence[int]) -> list[list[float]]:
    """The verifier's rewards as numbers, NaN for what it did not judge.

    Args:
        given: For each completion its rewards, or None; in them a number or None for each step.
        steps: For each completion the number of its steps.

    Raises:
        ValueError: other numbers of completions or steps, or a reward that is NaN or infinite.
    """
    if len(given) != len(steps):
        raise ValueError(f"the verifier gave rewards for {len(given)} completions instead of {len(steps)}")
    rows = [[None] * n if row is None else list(row) for row, n in zip(given, steps, strict=True)]
    for i, (row, n) in enumerate(zip(rows, steps, strict=True)):
        if len(row) != n:
            raise ValueError(f"the verifier gave {len(row)} rewards for the {n} steps of completion {i}")
        if not all(value is None or math.isfinite(value) for value in row):
            raise ValueError(f"the verifier gave a reward that is not finite, for completion {i}: {row}")
    return [[_NOT_JUDGED if value is None else float(value) for value in row] for row in rows]
