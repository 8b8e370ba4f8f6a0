"""What identifies a prompt in any data set, in any order."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def prompt_key(prompt: Any) -> str:
    """16 hexadecimal digits of a prompt's content, text or messages."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]


def prompt_number(key: str) -> int:
    """A key as a signed 64-bit number, which ranks can exchange."""
    return int.from_bytes(bytes.fromhex(key), "big", signed=True)
