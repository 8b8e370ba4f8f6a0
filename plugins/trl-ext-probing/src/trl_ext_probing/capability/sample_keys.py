"""Keys of samples by their content, and where each sample lies in a micro-batch.

A content key, not a column: it survives shuffling, packing, padding and the trainer's own choice of columns.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def vocabulary_digest(tokenizer: Any) -> str:
    """A digest of the tokenizer's mapping from text to ids."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    digest = hashlib.blake2b(digest_size=16)
    for text, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index}\t{text}\n".encode())
    return digest.hexdigest()


def sample_key(input_ids: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """The key of one sample: a digest of its tokens and of which of them are labels.

    Args:
        input_ids: (n,) without padding.
        labels: (n,) with -100 where there is none.
    """
    digest = hashlib.blake2b(input_ids.astype("<i8").tobytes(), digest_size=16)
    digest.update((labels[1:] != -100).tobytes())
    high, low = np.frombuffer(digest.digest(), dtype="<i8")
    return int(high), int(low)


def samples(inputs: Mapping[str, Tensor]) -> Iterator[tuple[int, slice]]:
    """Row and columns of each sample of a micro-batch, without its padding."""
    input_ids = inputs["input_ids"]
    rows, width = input_ids.shape
    if "attention_mask" in inputs:
        for row, real in enumerate(inputs["attention_mask"].bool().cpu().numpy()):
            columns = real.nonzero()[0]
            yield row, slice(int(columns[0]), int(columns[-1]) + 1)
        return
    if "position_ids" not in inputs:
        yield from ((row, slice(0, width)) for row in range(rows))
        return
    for row, position_ids in enumerate(inputs["position_ids"].cpu().numpy()):
        starts = sorted({0, *(position_ids == 0).nonzero()[0].tolist(), width})
        for start, end in itertools.pairwise(starts):
            yield row, slice(start, end)
