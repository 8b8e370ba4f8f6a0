"""Scores and nll of a model on the evaluation sets."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError, NonFiniteError
from trl_ext_reachability.from_scratch.control_settings import EXACT, ControlSettings
from trl_ext_reachability.from_scratch.row_texts import completion_text, evaluation_row
from trl_ext_reachability.reward_calls import judge, mean_of_judged
from trl_ext_reachability.sampled_policy import Policy, Sampler, batches

Rows = list[dict[str, Any]]


def load_set(settings: ControlSettings, option: str, path: str) -> Rows:
    """An evaluation set in memory.

    Raises:
        ConfigurationError: it cannot be loaded, is empty, or lacks what the reward needs; names the option.
    """
    from trl_ext.data import load_dataset_spec, parse_columns, refuse_missing_columns

    columns = parse_columns(settings.columns, "--columns")
    try:
        loaded = load_dataset_spec({"path": path, "split": settings.eval_split, "columns": columns})
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {error}") from error
    rows = [evaluation_row(row) for row in loaded]
    if not rows:
        raise ConfigurationError(f"{option}: {path} has no rows")
    if "prompt" not in rows[0]:
        raise ConfigurationError(
            f"{option}: {path} has no column 'prompt' but {', '.join(rows[0])}; name it by --columns"
        )
    if settings.reward == EXACT and option != "--validation":
        for row in rows:
            row["answer"] = row.get("answer") or completion_text(row)
        if rows[0]["answer"] is None:
            raise ConfigurationError(
                f"{option}: {path} has neither 'answer' nor 'completion', which the built-in reward compares with; "
                "name it by --columns, or give another --reward"
            )
    elif option != "--validation":
        try:
            refuse_missing_columns(settings.load_reward(), rows[0], settings.reward)
        except ConfigurationError as error:
            raise ConfigurationError(f"{option}: {error}") from None
    return rows


def has_answers(rows: Rows) -> bool:
    """Whether nll can be measured: every row shows a completion."""
    return all(row.get("completion") for row in rows)


class Evaluator:
    """Evaluates saved models.

    Args:
        settings: of the probe.
        sets: name to rows of what is scored.
        validation: rows whose nll chooses learning rates.
    """

    def __init__(self, settings: ControlSettings, sets: Mapping[str, Rows], validation: Rows) -> None:
        self.settings = settings
        self.sets = sets
        self.validation = validation
        self.reward: Callable[..., Any] = settings.load_reward()

    def validation_nll(self, model: Path) -> float | None:
        """Nats per token of the validation set's completions; None where the model gives no finite number."""
        nll = _nll(self._policy(model), self.validation, self.settings.eval_batch_size)
        return nll if math.isfinite(nll) else None

    def evaluate(self, model: Path) -> dict[str, dict[str, Any]]:
        """Of each set, `scores` (mean reward of each prompt) and `nll` (nats per token; None without completions).

        Raises:
            NonFiniteError: the model has weights that are NaN or infinite.
        """
        settings = self.settings
        policy = self._policy(model)
        if not all(bool(parameter.isfinite().all()) for parameter in policy.model.parameters()):
            raise NonFiniteError(f"{model} has weights that are NaN or infinite")
        # The likelihood is the model's own, at temperature 1; only sampling may be at another one.
        sampler = policy if not settings.samples or settings.temperature == 1 else self._policy(model, sampling=True)
        found = {}
        for name, rows in self.sets.items():
            nll = _nll(policy, rows, settings.eval_batch_size) if has_answers(rows) else None
            found[name] = {"scores": self._scores(sampler, name, rows), "nll": nll}
        return found

    def _policy(self, model: Path, sampling: bool = False) -> Policy:
        gc.collect()  # the model before holds itself, through its fused head
        settings = self.settings
        sampler = Sampler(
            settings.max_completion_length,
            temperature=settings.temperature if sampling else 1.0,
            top_k=0 if settings.samples else 1,  # the likeliest token only: greedy
        )
        return Policy(str(model), sampler)

    def _scores(self, policy: Policy, name: str, rows: Rows) -> list[float]:
        found: list[list[float | None]] = [[] for _ in rows]
        repeated = [i for i in range(len(rows)) for _ in range(self.settings.samples or 1)]
        for number, batch in enumerate(batches(rows, repeated, self.settings.eval_batch_size)):
            drawn = policy.sample([policy.prompt_ids(rows[i]["prompt"]) for i in batch], number)
            texts = [policy.text(ids) for ids in drawn]
            rewards = judge(self.reward, self.settings.reward, [rows[i] for i in batch], texts, drawn)
            for i, value in zip(batch, rewards, strict=True):
                found[i].append(value)
        return mean_of_judged(found, self.settings.reward, f"--eval-{name}")


def _nll(policy: Policy, rows: Rows, size: int) -> float:
    total, tokens = 0.0, 0
    for batch in batches(rows, range(len(rows)), size):
        prompts = [policy.prompt_ids(rows[i]["prompt"]) for i in batch]
        answers = [policy.demonstration_ids(row["prompt"], row["completion"]) for row in (rows[i] for i in batch)]
        for log_probs in policy.log_probs(prompts, answers):
            total -= float(log_probs.sum())
            tokens += len(log_probs)
    return total / tokens
