"""The documents of the repository, and what tests read of them: fenced blocks, snippets and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "data" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
MODEL = "HuggingFaceTB/SmolLM2-135M"
"""The model that documents and recipes name; tests put a tiny one in its place."""


def blocks(document: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The line number and text of each fenced block in one of the languages."""
    text = document.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield text[: match.start(2)].count("\n") + 1, match[2]


def snippets(document: Path) -> list[CodeType]:
    """The Python blocks, compiled as a file of their own, with the document's line numbers for tracebacks."""
    return [
        compile("\n" * (line - 1) + text, str(document), "exec", dont_inherit=True)
        for line, text in blocks(document, "python")
    ]


def commands(document: Path) -> Iterator[tuple[int, list[str]]]:
    """Each command line of the shell blocks as words, continuation lines joined, comments left out."""
    for line, text in blocks(document, "sh", "bash"):
        joined = text.replace("\\\n", " ")
        for command in joined.splitlines():
            words = shlex.split(command, comments=True)
            if words:
                yield line, words


def name(document: Path) -> str:
    """Its path in the repository, for the names of tests."""
    return str(document.relative_to(ROOT))


def save_adapter(folder: Path, seed: int = 0) -> None:
    """An adapter of the documents' model, as training leaves it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config).save_pretrained(folder)
