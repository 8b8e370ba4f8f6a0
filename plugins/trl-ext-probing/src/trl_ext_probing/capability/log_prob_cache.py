"""Per-token log-probabilities in a file, keyed by the content of each sample (`sample_keys`).

One safetensors file: `keys` (N, 2) int64, sorted; `offsets` (N + 1) int64; `log_probs` (tokens,) float32. The metadata
holds the vocabulary's digest and the model's name. `trl-ext probe capability --log-probs FILE` writes one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_ext_probing.capability.sample_keys import sample_key, samples, vocabulary_digest

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord

FORMAT = "trl-ext-log-probs-1"


def write_cache(
    path: Path, keys: Sequence[tuple[int, int]], values: Sequence[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write samples, each key once, sorted; the same samples give the same bytes.

    Args:
        path: of the file.
        keys: one per sample.
        values: log-probabilities of each sample's label tokens, in order.
        metadata: `vocabulary` (see `vocabulary_digest`), and what else should be known of the file.
    """
    from safetensors.numpy import save_file

    unique = dict(zip(keys, values, strict=True))
    ordered = sorted(unique)
    lengths = [len(unique[key]) for key in ordered]
    tensors = {
        "keys": np.array(ordered, dtype=np.int64).reshape(-1, 2),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        "log_probs": np.concatenate([unique[key] for key in ordered] or [np.empty(0)]).astype(np.float32),
    }
    temporary = path.with_suffix(".tmp")
    # One entry: safetensors writes several in an order that changes from run to run.
    save_file(tensors, temporary, metadata={FORMAT: json.dumps(metadata)})
    temporary.replace(path)


class LogProbCache:
    """Reads a file of `write_cache`.

    Args:
        path: of the file.

    Raises:
        ValueError: the file does not exist or is of another kind.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        if not path.is_file():
            raise ValueError(
                f"there is no file {str(path)!r}; write it with `trl-ext probe capability --log-probs {path}`"
            )
        self._path = path
        self._file = safe_open(path, framework="numpy").__enter__()
        note = (self._file.metadata() or {}).get(FORMAT)
        if note is None:
            raise ValueError(f"{str(path)!r} is no file of `trl-ext probe capability --log-probs`")
        self._metadata = json.loads(note)
        offsets = self._file.get_tensor("offsets").tolist()
        keys = map(tuple, self._file.get_tensor("keys").tolist())
        self._spans = dict(zip(keys, itertools.pairwise(offsets), strict=True))
        self._log_probs = self._file.get_slice("log_probs")

    def check_vocabulary(self, tokenizer: Any) -> None:
        """Raise ValueError if the file was written with another vocabulary."""
        if self._metadata.get("vocabulary") != vocabulary_digest(tokenizer):
            raise ValueError(
                f"{str(self._path)!r} was written with the vocabulary of {self._metadata.get('model', 'another model')}"
                ", which is not this model's; its log-probabilities are of other tokens"
            )

    def log_probs(self, tokens: TokenRecord) -> Tensor:
        """Log-probabilities (B, T) float32 of the labels, on the record's device, 0 where the mask is False.

        Raises:
            ValueError: a sample is not in the file.
        """
        inputs = tokens.inputs
        input_ids, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
        found = np.zeros(tuple(tokens.mask.shape), dtype=np.float32)
        for row, columns in samples(inputs):
            key = sample_key(input_ids[row, columns], labels[row, columns])
            if key not in self._spans:
                raise ValueError(
                    f"a sample of {columns.stop - columns.start} tokens is not in {str(self._path)!r}; write the file "
                    "with this data set, tokenizer, chat template, max_length and completion_only_loss"
                )
            is_label = labels[row, columns][1:] != -100
            begin, end = self._spans[key]
            found[row, columns.start : columns.stop - 1][is_label] = self._log_probs[begin:end]
        return torch.from_numpy(found).to(tokens.mask.device)
