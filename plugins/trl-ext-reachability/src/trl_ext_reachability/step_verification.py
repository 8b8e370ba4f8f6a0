"""The options that say how the steps of a completion are told apart and judged, and the verifier made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from trl_ext_probing.engines.prompt_tokens import end_tokens
from trl_ext_probing.functions import load_function

from trl_ext.options import Range
from trl_ext.records import RunDescription, SetupContext
from trl_ext_reachability.step_classifier import StepClassifier
from trl_ext_reachability.step_rewards import RESERVED, StepJudge
from trl_ext_reachability.steps import Split, Splitter
from trl_ext_reachability.verifiers import StepChecker, Verifier

_OPTIONS_OF = {"solution": "steps", "pattern": "steps", "wrong": "steps", "separator": "model"}


@dataclass(eq=False)
class StepVerification:
    """Which verifier judges which steps; `trl_ext_reachability.process_reward` documents the options.

    Raises:
        ValueError: Options that contradict each other, or a verifier of the user's that cannot be loaded.
    """

    verifier: str = "steps"
    split: Split = "delimiter"
    delimiter: str = "\n"
    solution: str = "solution"
    pattern: str | None = None
    wrong: Annotated[float, Range(lt=1)] = 0.0
    model: str = ""
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ValueError("delimiter='': give the text that ends a step, or split='token'")
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
        self._check_pattern()
        for name, verifier in _OPTIONS_OF.items():
            if verifier != self.verifier and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for verifier={verifier!r}; leave it out with {self.verifier!r}"
                )
        own = self.verifier not in ("steps", "model")
        self._own: Verifier | None = load_function(self.verifier, "verifier") if own else None

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from error
        if self.split == "token":
            raise ValueError(f"pattern={self.pattern!r}: split='token' compares tokens as they are; leave pattern out")

    def check_columns(self, run: RunDescription) -> None:
        """Refuse a data set without the reference solutions, or with a column that verifiers could not receive.

        Raises:
            ValueError: Names the column.
        """
        for name in RESERVED:
            if name in run.columns:
                raise ValueError(
                    f"the data set has a column {name!r}, the name of what verifiers receive; rename the column"
                )
        if self.verifier == "steps" and run.columns and self.solution not in run.columns:
            raise ValueError(
                f"solution={self.solution!r}: the data set has no such column (it has {', '.join(run.columns)}); "
                "name the column with the reference solutions, or give a verifier of your own"
            )

    def make_judge(self, context: SetupContext) -> StepJudge:
        """Split with the policy's tokenizer, that of a processor too, and load the model where one judges."""
        tokenizer = getattr(context.tokenizer, "tokenizer", context.tokenizer)
        splitter = Splitter(tokenizer, self.split, self.delimiter)
        if self._own is not None:
            return StepJudge(splitter, self._own)
        if self.verifier == "model":
            return StepJudge(splitter, StepClassifier(self.model, self.separator, context.device))
        ends = end_tokens(context.model, tokenizer)
        return StepJudge(splitter, StepChecker(splitter, self.solution, self.pattern, self.wrong, ends))
