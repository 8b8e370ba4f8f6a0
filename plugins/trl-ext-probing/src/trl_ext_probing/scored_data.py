"""Scores of a data set's label tokens under models, chunk by chunk in a journal: what `drift` and `capability` read."""

from __future__ import annotations

import base64
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ext.errors import ConfigurationError
from trl_ext_probing.encoding import Encoded, data_column, encode
from trl_ext_probing.journal import Journal
from trl_ext_probing.models import check_template, load_model, load_tokenizer
from trl_ext_probing.progress import Report
from trl_ext_probing.rows import load_data
from trl_ext_probing.scoring import Scorer, TokenScores
from trl_ext_probing.settings import ScoringSettings
from trl_ext_probing.work import open_journals

BINS = 10_000
"""Of the histogram of probabilities: quantiles are exact to 1e-4."""


class Data:
    """A data set, tokenised a chunk at a time as TRL's SFT does.

    Args:
        settings: Which data, and how long a row may be.
        completion_only: As of `encode`.

    Raises:
        ConfigurationError: It cannot be loaded, or holds nothing to score.
    """

    def __init__(self, settings: ScoringSettings, completion_only: bool | None = None) -> None:
        self.rows = load_data(settings)
        self.column = data_column(self.rows.column_names)
        self._settings = settings
        self._completion_only = completion_only

    def chunks(self, tokenizer: Any, first: int = 0) -> Iterator[list[Encoded]]:
        """The examples from a chunk on."""
        s = self._settings
        for start in range(first * s.chunk, len(self.rows), s.chunk):
            rows = self.rows.select(range(start, min(start + s.chunk, len(self.rows))))
            yield [encode(tokenizer, row, s.max_length, self._completion_only) for row in rows]

    def check_tokenizers(self, models: Sequence[str]) -> None:
        """Refuse, before a model loads, what could not be scored or compared.

        Raises:
            ConfigurationError: A tokenizer cannot write messages, two make other tokens of a row, or fewer than two
                rows have a label.
        """
        tokenizers = [load_tokenizer(model) for model in models]
        if any(isinstance(row[self.column], list) for row in self.rows):
            for model, tokenizer in zip(models, tokenizers, strict=True):
                check_template(tokenizer, model, self.column)
        scored, other = 0, {model: list[int]() for model in models}
        for number, (own, *rest) in enumerate(zip(*map(self.chunks, tokenizers), strict=True)):
            scored += sum(example.labels > 0 for example in own)
            for model, chunk in zip(models[1:], rest, strict=True):
                pairs = enumerate(zip(own, chunk, strict=True), number * self._settings.chunk)
                other[model] += [i for i, (x, y) in pairs if x != y]
        for model, places in other.items():
            if places:
                raise ConfigurationError(
                    f"the tokenizers of {models[0]!r} and {model!r} make other tokens of example {places[0]} (and of "
                    f"{len(places) - 1} more), so likelihoods per token do not compare; give both models one tokenizer "
                    "and chat template"
                )
        if scored < 2:
            raise ConfigurationError(
                f"{scored} of {len(self.rows)} examples have a token to score in the column {self.column!r} within "
                f"--max-length {self._settings.max_length}; an interval needs two"
            )


class Scores:
    """What is kept of each of N examples under one model, in the data set's order.

    Args:
        model: Its name.
        about: What its journal belongs to.
    """

    def __init__(self, model: str, about: dict[str, Any]) -> None:
        self.model = model
        self.about = about
        self._columns: dict[str, list[float]] = {name: [] for name in ("tokens", "sum_p", "sum_nll", "hits")}
        self.histogram = np.zeros(BINS, dtype=np.int64)
        """(BINS,) of p over all label tokens."""
        self.log_probs: list[NDArray[np.float32]] = []
        """(tokens,) of each example; empty unless they are kept."""

    def add(self, line: dict[str, Any]) -> None:
        """Add a chunk as it stands in a journal."""
        for name, values in self._columns.items():
            values += line[name]
        self.histogram[np.array(line["bins"], dtype=int)] += np.array(line["counts"], dtype=int)
        if "log_probs" in line:
            flat = np.frombuffer(base64.b64decode(line["log_probs"]), dtype="<f4")
            self.log_probs += np.split(flat, np.cumsum(line["tokens"])[:-1])

    def column(self, name: str) -> NDArray[np.float64]:
        """(N,) of `tokens` (labels), `sum_p`, `sum_nll` (nats) or `hits` (labels that are the most probable token)."""
        return np.array(self._columns[name], dtype=float)


def score_models(
    settings: ScoringSettings, models: Sequence[str], data: Data, keep_log_probs: bool = False
) -> list[Scores]:
    """Score the data under each model, as far as the journals do not have it yet.

    Args:
        settings: Of the probe.
        models: Each is looked at before the first one is loaded.
        data: What is scored.
        keep_log_probs: Whether the probability of every token is kept, 6 bytes each in the journal.

    Raises:
        ConfigurationError: A model or a journal cannot be used.
    """
    data.check_tokenizers(models)
    found = []
    with open_journals(settings, models, data.rows) as journals, Report() as report:
        for model, journal in journals.items():
            own = Scores(model, journal.about)
            for line in journal.lines:
                own.add(line)
            found.append(own)
            report.follow(model, len(data.rows), _score(settings, own, journal, data, keep_log_probs))
            gc.collect()  # models hold circles of references, and the next one wants the memory
    return found


def _score(
    settings: ScoringSettings, scores: Scores, journal: Journal, data: Data, keep_log_probs: bool
) -> Iterator[int]:
    """Score the chunks that are left, and say how many examples are done."""
    done = len(journal.lines)
    yield min(done * settings.chunk, len(data.rows))
    if done * settings.chunk < len(data.rows):
        model, tokenizer = load_model(scores.model, settings.dtype, settings.device)
        scorer = Scorer(model)
        for number, chunk in enumerate(data.chunks(tokenizer, done), start=done):
            line = _line(scorer.score_shared(chunk, settings.batch_tokens), keep_log_probs)
            journal.append({"chunk": number, **line})
            scores.add(line)
            yield min((number + 1) * settings.chunk, len(data.rows))


def _line(scores: Sequence[TokenScores], keep_log_probs: bool) -> dict[str, Any]:
    exact = [s.log_probs.astype(np.float64) for s in scores]
    counts = histogram(np.exp(np.concatenate([s.log_probs for s in scores])))
    bins = np.flatnonzero(counts)
    line: dict[str, Any] = {
        "tokens": [len(values) for values in exact],
        "sum_p": [float(np.exp(values).sum()) for values in exact],
        "sum_nll": [float(-values.sum()) for values in exact],
        "hits": [s.hits for s in scores],
        "bins": bins.tolist(),
        "counts": counts[bins].tolist(),
    }
    if keep_log_probs:
        flat = np.concatenate([s.log_probs for s in scores]).astype("<f4")
        line["log_probs"] = base64.b64encode(flat.tobytes()).decode()
    return line


def histogram(p: NDArray[np.float32]) -> NDArray[np.int64]:
    """(BINS,) counts of (n,) probabilities."""
    bins = np.clip((p * BINS).astype(np.int64), 0, BINS - 1)
    return np.bincount(bins, minlength=BINS)
