"""What identifies a model whose folder may get other files under the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path

PATTERNS = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
"""The files that decide what a model answers."""


def digest_files(folder: Path) -> str:
    """16 hexadecimal digits of a local model's weights, configuration and tokenizer; of a hub id, those of nothing."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
