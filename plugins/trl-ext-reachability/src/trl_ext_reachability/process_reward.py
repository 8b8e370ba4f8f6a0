"""`process-reward`: advantages per token in GRPO, from a verifier that rewards each step of a completion."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_ext import hookimpl
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_reachability.dotted import load_function
from trl_ext_reachability.precedence import refuse_overwriting
from trl_ext_reachability.step_classifier import StepClassifier
from trl_ext_reachability.steps import Span, Split, Splitter
from trl_ext_reachability.verifiers import StepChecker, Verifier

Normalize = Literal["none", "center", "group"]
_EPSILON = 1e-4  # TRL's, beside the standard deviation
_OPTIONS_OF = {"solution": "steps", "pattern": "steps", "wrong": "steps", "separator": "model"}


def normalized(
    rewards: Tensor, mask: Tensor, num_generations: int, how: Normalize, failure: Exception | None = None
) -> Tensor:
    """(N, S) step rewards, centred and scaled within groups over all ranks. Collective unless `how` is "none".

    A completion weighs as much as any other in its group, evenly spread over its steps. So where the steps of each
    completion share one reward, the result is TRL's advantage of a completion with that reward.

    Args:
        rewards: (N, S) float, of this rank's completions; groups may reach over ranks.
        mask: (N, S) bool: the steps that there are.
        num_generations: completions of a group.
        how: "center" subtracts the group's mean, "group" divides by its standard deviation too.
        failure: why this rank has no rewards; raised once the other ranks know, which would wait for it otherwise.
    """
    if how == "none":
        if failure is not None:
            raise failure
        return rewards
    counts = mask.sum(dim=1).clamp(min=1)
    means = torch.where(mask, rewards, 0).sum(dim=1) / counts
    every = gather(torch.stack([means, torch.full_like(means, float(failure is None))], dim=1))
    if not bool(every[:, 1].all()):
        if failure is not None:
            raise failure
        return rewards  # not used: the trainer stops all ranks before the step, with the other one's reason
    n = len(rewards)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    local = slice(rank * n, (rank + 1) * n)
    mean = every[:, 0].view(-1, num_generations).mean(dim=1).repeat_interleave(num_generations)[local].unsqueeze(1)
    centered = rewards - mean
    if how == "center":
        return centered
    spread = torch.where(mask, centered**2, 0).sum(dim=1) / counts
    variance = gather(spread).view(-1, num_generations).sum(dim=1) / max(num_generations - 1, 1)
    std = variance.sqrt().repeat_interleave(num_generations)[local].unsqueeze(1)
    return centered / (std + _EPSILON)


def return_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """(N, S) sum of the rewards of each step and those after it."""
    return torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)


@dataclass(eq=False)
class ProcessReward:
    """Advantages (B, T) from rewards of steps; A_i = r_i by default, as the paper defines them.

    Args:
        verifier: "steps" compares with a reference solution (`trl_ext_reachability.verifiers.StepChecker`), "model"
            asks a process reward model (`trl_ext_reachability.step_classifier.StepClassifier`); otherwise a function,
            `package.module:function`, called as `trl_ext_reachability.verifiers` says.
        split: What a step is: what a delimiter ends, a turn of the model, or a token.
        delimiter: Ends a step.
        solution: Column with the reference solution ("steps").
        pattern: Regular expression for what counts of a step: its last match ("steps"). The whole step where None.
        wrong: Reward of a wrong step ("steps"); the authors' experiments take -1.
        model: Path or hub id of a model for token classification ("model").
        separator: Ends the steps that this model reads, as in its training ("model").
        normalize: "none", "center" (minus the group's mean) or "group" (and over its standard deviation).
        return_to_go: Whether a token gets the rewards of later steps too, after normalising.
        outcome: Weight of the advantages before this plugin, those from the reward functions, which are added.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (process rewards)"
    )

    verifier: str = "steps"
    split: Split = "delimiter"
    delimiter: str = "\n"
    solution: str = "solution"
    pattern: str | None = None
    wrong: float = 0.0
    model: str = ""
    separator: str = "\n"
    normalize: Normalize = "none"
    return_to_go: bool = False
    outcome: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("split", get_args(Split)), ("normalize", get_args(Normalize))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not self.delimiter:
            raise ValueError("delimiter='': give the text that ends a step, or split='token'")
        if not (math.isfinite(self.wrong) and self.wrong < 1):
            raise ValueError(f"wrong={self.wrong}: below 1, the reward of a right step")
        if not math.isfinite(self.outcome):
            raise ValueError(f"outcome={self.outcome}: a finite weight")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from error
        if (self.verifier == "model") != bool(self.model):
            raise ValueError(
                f"verifier={self.verifier!r}, model={self.model!r}: a path as model goes with verifier='model', and "
                "only with it"
            )
        if self.verifier == "steps" and self.split == "turn":
            raise ValueError(
                "split='turn': a reference solution has no turns to compare with; take split='delimiter' or 'token', "
                "or a verifier of your own"
            )
        if self.pattern is not None and self.split == "token":
            raise ValueError(f"pattern={self.pattern!r}: split='token' compares tokens as they are; leave pattern out")
        for name, verifier in _OPTIONS_OF.items():
            if verifier != self.verifier and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for verifier={verifier!r}; leave it out with {self.verifier!r}"
                )
        own = self.verifier not in ("steps", "model")
        self._function: Verifier | None = load_function(self.verifier) if own else None
        self._splitter: Splitter | None = None
        self._seen: dict[str, list[tuple[float, float, float]]] = {"train": [], "eval": []}

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse a data set without the reference solutions or with a column that verifiers could not receive, and
        plugins before this one whose advantages it would replace."""
        for name in ("steps", "step_ids"):
            if name in run.columns:
                raise ValueError(
                    f"the data set has a column {name!r}, the name of what verifiers receive; rename the column"
                )
        if not self.outcome:
            refuse_overwriting(
                run,
                "process-reward",
                {
                    "reachability": "name process-reward before reachability, or add to them by outcome=1",
                    "best-of-m": "keep one of the two, or add to them by outcome=1",
                },
            )
        if self.verifier == "steps" and run.columns and self.solution not in run.columns:
            raise ValueError(
                f"solution={self.solution!r}: the data set has no such column (it has {', '.join(run.columns)}); "
                "name the column with the reference solutions, or give a verifier of your own"
            )

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take the tokenizer, that of a processor too, and load the model where one judges."""
        tokenizer = getattr(context.tokenizer, "tokenizer", context.tokenizer)
        self._splitter = Splitter(tokenizer, self.split, self.delimiter)
        if self.verifier == "model":
            self._function = StepClassifier(self.model, self.separator, context.device)
        elif self.verifier == "steps":
            generation: Any = context.model.generation_config
            # As TRL: completions end at the tokenizer's EOS and at any of the model's.
            eos = frozenset(_as_list(tokenizer.eos_token_id) + _as_list(generation.eos_token_id))
            self._function = StepChecker(self._splitter, self.solution, self.pattern, self.wrong, eos)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N, T) float; 0 outside of the mask."""
        failure: Exception | None = None
        try:
            spans, values = self._judge(rollouts)
        except Exception as error:  # whatever a user's verifier raises
            failure, spans, values = error, [[(0, 1)]] * len(rollouts.prompts), [[0.0]] * len(rollouts.prompts)
        device = rollouts.mask.device
        given = pad_sequence([torch.tensor(v, dtype=torch.float32) for v in values], batch_first=True).to(device)
        mask = pad_sequence([torch.ones(len(v), dtype=torch.bool) for v in values], batch_first=True).to(device)
        steps = normalized(given, mask, rollouts.num_generations, self.normalize, failure)
        if self.return_to_go:
            steps = return_to_go(steps, mask)
        tokens = torch.zeros(rollouts.mask.shape, dtype=torch.float32, device=device)
        for row, row_spans in enumerate(spans):
            for step, (start, end) in enumerate(row_spans):
                tokens[row, start:end] = steps[row, step]
        if self.outcome:
            tokens += self.outcome * (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages)
        self._seen["train" if rollouts.training else "eval"] += [
            (sum(v) / len(v), float(len(v)), float(min(v) >= 1)) for v in values if v
        ]
        return tokens * rollouts.mask

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """This rank's mean step reward, number of steps, and share of completions whose steps all have 1 or more."""
        seen, self._seen[mode] = self._seen[mode], []
        columns = zip(*seen, strict=True)
        return {name: sum(c) / len(c) for name, c in zip(("reward", "steps", "all_right"), columns, strict=False)}

    def _judge(self, rollouts: Rollouts) -> tuple[list[list[Span]], list[list[float]]]:
        """Spans and rewards of the steps of each completion."""
        if self._splitter is None or self._function is None:
            raise RuntimeError("steps need the tokenizer, which training sets up: evaluate after train(), or in it")
        splitter = self._splitter
        all_ids, masks = rollouts.completion_ids.tolist(), rollouts.mask.tolist()
        spans = [splitter.spans(ids, mask) for ids, mask in zip(all_ids, masks, strict=True)]
        taken = ("prompt", "completion", "completion_ids")  # as for TRL's reward functions
        columns = {key: [row[key] for row in rollouts.inputs] for key in rollouts.inputs[0] if key not in taken}
        given = self._function(
            steps=[splitter.texts(ids, row) for ids, row in zip(all_ids, spans, strict=True)],
            step_ids=[[ids[a:b] for a, b in row] for ids, row in zip(all_ids, spans, strict=True)],
            prompts=list(rollouts.prompts),
            completions=list(rollouts.completions),
            completion_ids=[splitter.trimmed(ids, mask) for ids, mask in zip(all_ids, masks, strict=True)],
            **columns,
        )
        values = [[float(value) for value in row] for row in given]
        _check_shape(values, spans)
        return spans, values


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _check_shape(values: Sequence[Sequence[float]], spans: Sequence[Sequence[Any]]) -> None:
    if len(values) != len(spans):
        raise ValueError(f"the verifier gave rewards for {len(values)} completions instead of {len(spans)}")
    for i, (row, row_spans) in enumerate(zip(values, spans, strict=True)):
        if len(row) != len(row_spans):
            raise ValueError(f"the verifier gave {len(row)} rewards for the {len(row_spans)} steps of completion {i}")
        if not all(math.isfinite(value) for value in row):
            raise ValueError(f"the verifier gave a reward that is not finite, for completion {i}: {list(row)}")
