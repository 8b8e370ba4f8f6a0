"""Fingerprints of data sets that are the same in every process, also for data that was made in memory.

`datasets` has fingerprints of its own; those of data in memory are drawn at random, so a resumed run would never see
its own again.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash
from datasets import Dataset

SAMPLE = 512
"""Rows that are read: all of a smaller data set, evenly spaced ones of a larger."""


def data_fingerprint(dataset: Any) -> dict[str, Any]:
    """The number of rows, the columns, and a hash over at most `SAMPLE` rows.

    A change of single rows of a larger data set may go unseen. Data that can only be iterated has its columns alone.
    """
    columns = list(getattr(dataset, "column_names", None) or ())
    if not isinstance(dataset, Dataset):
        return {"rows": None, "columns": columns, "hash": None}
    size = len(dataset)
    picked = range(size) if size <= SAMPLE else [i * (size - 1) // (SAMPLE - 1) for i in range(SAMPLE)]
    # Arrow's own values: no transform runs and no image is decoded.
    rows = dataset.with_format("arrow")[list(picked)].to_pylist() if size else []
    text = json.dumps(rows, sort_keys=True, default=repr)
    return {"rows": size, "columns": columns, "hash": xxhash.xxh3_128(text.encode()).hexdigest()}
