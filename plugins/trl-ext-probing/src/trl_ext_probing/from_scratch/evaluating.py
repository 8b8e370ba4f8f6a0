"""Scores and nll of a model on the evaluation sets."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError, NonFiniteError
from trl_ext_probing.encoding import encode
from trl_ext_probing.engines import engine, outstanding
from trl_ext_probing.from_scratch.control_settings import EXACT, FromScratchSettings
from trl_ext_probing.from_scratch.row_texts import completion_text, evaluation_row
from trl_ext_probing.models import load_model
from trl_ext_probing.rewards import Judge, mean_of_judged
from trl_ext_probing.rows import check_prompts
from trl_ext_probing.sampling import Samples
from trl_ext_probing.scoring import Scorer

Rows = list[dict[str, Any]]


def load_set(settings: FromScratchSettings, option: str, path: str) -> Rows:
    """An evaluation set in memory.

    Raises:
        ConfigurationError: it cannot be loaded, is empty, or lacks what the reward needs; names the option.
    """
    from trl_ext.data import load_dataset_spec, parse_columns

    columns = parse_columns(settings.columns, "--columns")
    try:
        loaded = load_dataset_spec({"path": path, "split": settings.split, "columns": columns})
        rows = check_prompts([evaluation_row(row) for row in loaded], path)
        if option != "--validation":
            _check_rewards(settings, rows, path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {error}") from None
    return rows


def _check_rewards(settings: FromScratchSettings, rows: Rows, path: str) -> None:
    """Refuse rows that the reward functions cannot judge; give the built-in one its column."""
    if settings.reward == [EXACT]:
        for row in rows:
            row["answer"] = row.get("answer") or completion_text(row)
        if rows[0]["answer"] is None:
            raise ConfigurationError(
                f"{path} has neither 'answer' nor 'completion', which the built-in reward compares with; name it by "
                "--columns, or give another --reward"
            )
    with Judge.of(settings.reward, rows[0], settings.weights):
        pass


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

    def __init__(self, settings: FromScratchSettings, sets: Mapping[str, Rows], validation: Rows) -> None:
        self.settings = settings
        self.sets = sets
        self.validation = validation

    def validation_nll(self, model: Path) -> float | None:
        """Nats per token of the validation set's completions; None where the model gives no finite number."""
        loaded, tokenizer = self._load(model)
        nll = _nll(Scorer(loaded), tokenizer, self.validation)
        return nll if math.isfinite(nll) else None

    def evaluate(self, model: Path) -> dict[str, dict[str, Any]]:
        """Of each set, `scores` (mean reward of each prompt) and `nll` (nats per token; None without completions).

        Raises:
            NonFiniteError: the model has weights that are NaN or infinite.
        """
        loaded, tokenizer = self._load(model)
        if not all(bool(parameter.isfinite().all()) for parameter in loaded.parameters()):
            raise NonFiniteError(f"{model} has weights that are NaN or infinite")
        scorer = Scorer(loaded)
        return {
            name: {
                "scores": self._scores(loaded, tokenizer, name, rows),
                "nll": _nll(scorer, tokenizer, rows) if has_answers(rows) else None,
            }
            for name, rows in self.sets.items()
        }

    def _load(self, model: Path) -> tuple[Any, Any]:
        gc.collect()  # the model before holds itself, through its fused head
        return load_model(str(model))

    def _scores(self, model: Any, tokenizer: Any, name: str, rows: Rows) -> list[float]:
        settings, samples = self.settings, Samples(rows)
        sampler = engine("transformers", model=model, tokenizer=tokenizer, batch_size=settings.batch_size)
        with Judge.of(settings.reward, rows[0], settings.weights) as judge:
            for _ in samples.draw(outstanding(len(rows), settings.n), lambda: sampler, judge, settings):
                pass
            return mean_of_judged(samples.rewards(), judge.name, f"--eval-{name}")


def _nll(scorer: Scorer, tokenizer: Any, rows: Rows) -> float:
    """Of the completions, as TRL's SFT would train on them."""
    scores = scorer.score([encode(tokenizer, row, max_length=2**31) for row in rows])
    return -sum(float(s.log_probs.sum(dtype=float)) for s in scores) / sum(len(s.log_probs) for s in scores)
