"""Per-token log-probabilities of a data set's response tokens under a model, as TRL's SFT would see both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_ext_objectives.capability import histogram
from trl_ext_objectives.sample_keys import label_values, vocabulary_digest

ROW = "trl_ext_row"


@dataclass(frozen=True)
class CapabilitySettings:
    """Everything that the scores depend on."""

    model: str
    dataset: str
    dataset_name: str | None = None
    split: str = "train"
    columns: str | None = None
    limit: int | None = None
    max_length: int = 1024
    completion_only: bool | None = None
    dtype: str = "auto"
    batch_tokens: int = 16_384
    chunk: int = 512
    log_probs: bool = False


@dataclass(frozen=True)
class ChunkScores:
    """What is kept of a chunk of n examples, in the data set's order."""

    rows: np.ndarray
    """(n,) int64 places in the data set."""
    tokens: np.ndarray
    """(n,) int64 response tokens."""
    sum_p: np.ndarray
    """(n,) float64."""
    sum_nll: np.ndarray
    """(n,) float64, nats."""
    histogram: np.ndarray
    """(BINS,) int64 of p over the response tokens."""
    keys: np.ndarray
    """(n, 2) int64 content keys; (0, 2) unless log-probabilities are kept."""
    log_probs: np.ndarray
    """(tokens,) float32, one example after the other; empty unless kept."""
    vocabulary: str

    def save(self, path: Path) -> None:
        """Write the file in one move, so that it is whole or not there."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **asdict(self))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> ChunkScores:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            fields = dict(arrays)
        return cls(**fields | {"vocabulary": str(fields["vocabulary"])})


class Scorer:
    """A base model behind TRL's `SFTTrainer`, which prepares the examples, collates them and carries the fused head.

    Args:
        settings: what to measure.
        rows: the whole `datasets.Dataset`; tokenized as it is read, so that any size will do.
        start: the first row to score.
        scratch: an empty folder.
    """

    def __init__(self, settings: CapabilitySettings, rows: Any, start: int, scratch: Path) -> None:
        import trl

        stream = rows.skip(start).to_iterable_dataset()
        stream = stream.map(lambda row, i: {**row, ROW: i + start}, with_indices=True)
        args = trl.SFTConfig(
            output_dir=str(scratch),
            max_steps=1,  # a stream has no length; nothing is trained
            max_length=settings.max_length,
            completion_only_loss=settings.completion_only,
            model_init_kwargs={"dtype": settings.dtype},
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        self._trainer = trl.SFTTrainer(model=settings.model, args=args, train_dataset=stream)
        self._model = self._trainer.model.eval()
        self._settings = settings
        self._vocabulary = vocabulary_digest(self._trainer.processing_class)

    def examples(self) -> Iterator[dict[str, Any]]:
        """The prepared examples in order, with their row; those without a response token are left out."""
        for row in self._trainer.train_dataset:
            if any(label != -100 for label in row["labels"][1:]):
                yield {name: row[name] for name in ("input_ids", "labels", ROW)}

    def score(self, chunk: Sequence[dict[str, Any]]) -> ChunkScores:
        """Score a chunk in batches of similar length, longest first: what does not fit in memory fails at once."""
        scores: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        for batch in _batches(chunk, self._settings.batch_tokens):
            features = [{name: row[name] for name in ("input_ids", "labels")} for row in batch]
            inputs = self._trainer.data_collator(features)
            inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
            with torch.no_grad():
                values = self._model(**inputs, fused_lm_head=True).log_probs
            scores.update(zip((row[ROW] for row in batch), label_values(inputs, values), strict=True))
        ordered = [scores[row[ROW]] for row in chunk]
        flat = np.concatenate([values for _, values in ordered])
        exact = [values.astype(np.float64) for _, values in ordered]
        kept = self._settings.log_probs
        return ChunkScores(
            rows=np.array([row[ROW] for row in chunk], dtype=np.int64),
            tokens=np.array([len(values) for values in exact], dtype=np.int64),
            sum_p=np.array([np.exp(values).sum() for values in exact]),
            sum_nll=np.array([-values.sum() for values in exact]),
            histogram=histogram(torch.from_numpy(flat).exp()),
            keys=np.array([key for key, _ in ordered] if kept else [], dtype=np.int64).reshape(-1, 2),
            log_probs=flat if kept else np.empty(0, dtype=np.float32),
            vocabulary=self._vocabulary,
        )


def _batches(chunk: Sequence[dict[str, Any]], budget: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of at most `budget` tokens, padding included; an example longer than that is a batch of its own."""
    ordered = sorted(chunk, key=lambda row: (-len(row["input_ids"]), row[ROW]))
    while ordered:
        size = max(1, budget // len(ordered[0]["input_ids"]))
        yield ordered[:size]
        ordered = ordered[size:]
