"""What a file of results belongs to: the very rows and weights, not only their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_ext_probing.models import adapter_config

PATTERNS = (
    "*.safetensors", "pytorch_model*", "adapter_*", "*.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip
"""The files of a folder that decide what a model answers."""

_WHOLE = 64 * 2**20
"""Bytes up to which a file is read whole; adapters and small models are."""
_BLOCK = 4096


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Number, columns and a digest of the rows as they are used, with every column that a reward function receives."""
    total, count, columns = hashlib.sha256(), 0, set[str]()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        count += 1
        columns |= row.keys()
    return {"rows": count, "columns": sorted(columns), "digest": total.hexdigest()[:16]}


def weights_fingerprint(model: str) -> dict[str, str]:
    """What tells a model's weights and tokenizer from others under the same name; of an adapter its base's as well.

    Of a folder a digest of names, sizes and content; of a hub id the commit. Content is whole up to 64 MiB a file.
    Beyond, it is the header and up to 16 blocks of 4 KiB of each tensor: training moves every tensor that it trains
    nearly everywhere, and a large model is told apart in seconds. An edit of single entries may escape.

    Raises:
        ConfigurationError: there is no such model.
    """
    adapter = adapter_config(model)
    found = {"model": _identify(model, "config.json" if adapter is None else "adapter_config.json")}
    if adapter is not None:
        base = weights_fingerprint(adapter["base_model_name_or_path"])
        found |= {f"base {name}": value for name, value in base.items()}
    return found


def _identify(model: str, file: str) -> str:
    from transformers.utils import cached_file

    folder = Path(model)
    if not folder.is_dir():
        # The hub's cache keeps a file under snapshots/COMMIT/.
        return f"commit {Path(cached_file(model, file)).parent.name}"
    total = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        total.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for block in _content(path):
            total.update(block)
    return f"content {total.hexdigest()[:16]}"


def _content(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            yield file.read()
            return
        spans, start = [(0, size)], 0
        if path.suffix == ".safetensors":  # 8 bytes with the length of the header, the header, the tensors
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            yield header
            start = 8 + length
            spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        for begin, end in spans:
            count = min(16, 1 + (end - begin) // 2**20) if start else 4096  # without a header: over the whole file
            step = max((end - begin) // count, 1)
            for i in range(count):
                file.seek(start + begin + i * step)
                yield file.read(min(_BLOCK, end - begin - i * step))
