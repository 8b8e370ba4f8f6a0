"""The commands of the documents run: what a CPU does in seconds, from the files that a reader would have by then."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import DOCUMENTS, MODEL, ROOT, blocks, commands, name, save_adapter

from trl_ext.cli import run
from trl_ext.records import TRAINERS

NOT_RUN = {
    "probe": "measures for minutes; the tests of the probes run each of them",
    "demo": "trains for minutes; tests/test_demo.py runs it with --quick",
    "plugins check": "speaks of the plugin that the tutorial has just written, and whose tests run in test_docs.py",
    "new-plugin": "has tests of its own",
    "compare": "trains for minutes; has tests of its own",
}
"""Commands of `trl-ext` whose flags alone are checked (test_docs.py), and why."""
ABSENT = ("PATH", "BEFORE", "AFTER", "my-focal", "ref.safetensors")
"""What stands in commands for something that the reader has and no file here could."""


def runs_here(words: list[str]) -> bool:
    """Whether a command line is one of ours that a CPU can run."""
    if words[0] != "trl-ext" or " ".join(words[1:3]) in NOT_RUN or words[1] in NOT_RUN:
        return False  # make, pip, torchrun and others build environments or launch on several GPUs
    if any(absent in word for word in words for absent in ABSENT) or "--num_processes" in words:
        return False
    return words[1] not in (*TRAINERS, "validate") or not in_bf16(words)


def in_bf16(words: list[str]) -> bool:
    """Whether a training command leaves bf16 on, which needs a GPU."""
    return "--bf16" not in words and "sft.yaml" not in words


def command_lines() -> list[Any]:
    return [
        pytest.param(words, id=f"{name(document)}:{line} {' '.join(words[1:3])}")
        for document in DOCUMENTS
        for line, words in commands(document)
        if runs_here(words)
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("words", command_lines())
def test_a_command_of_the_documents_runs(words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    prepare(words)
    assert run(words[1:]) == 0


def test_most_commands_of_ours_run() -> None:
    assert len(command_lines()) > 15


# -- what a reader has by then ---------------------------------------------------------------------------------------


def prepare(words: list[str]) -> None:
    """Make what the command names, in the current directory."""
    if "train.py" in words:
        Path("train.py").write_text(script_without_plugins())
    if "sft.yaml" in words:
        Path("sft.yaml").write_text(next(text for _, text in blocks(ROOT / "docs" / "start" / "yaml.md", "yaml")))
    if any(word.startswith("runs/sft") for word in words):
        train_with_checkpoints()
    for folder in ("start", "tuned"):
        if folder in words:
            shutil.copytree(MODEL, folder)
    for seed, word in enumerate(words):
        if re.fullmatch(r"(runs/)?adapter-\w", word):
            save_adapter(Path(word), seed)
    if "examples/mixing.yaml" in words:  # short answers: the tiny model never ends one by itself
        shortened("examples/mixing.yaml", max_completion_length=4)


def script_without_plugins() -> str:
    """The README's script as it was before the swap."""
    text = next(text for _, text in blocks(ROOT / "README.md", "python"))
    return re.sub(r"plugins=\[.*?\], ", "", text.replace("from trl_ext import", "from trl import"))


def train_with_checkpoints() -> None:
    """A run with five checkpoints and averages in their state, as the guide to averaging has it."""
    settings = f"--model_name_or_path {MODEL} --dataset_name examples/data/train.jsonl --output_dir runs/sft"
    short = "--max_steps 5 --save_steps 1 --per_device_train_batch_size 2 --use_cpu --bf16 false --report_to none"
    assert run(["sft", *settings.split(), *short.split(), "--plugins", "ema:decay=[0.99,0.9999]"]) == 0
    shutil.copytree("runs/sft/checkpoint-5", "runs/sft/checkpoint-500")


def shortened(path: str, **changed: Any) -> None:
    """Put a copy with some settings changed in the place of an example."""
    settings = yaml.safe_load(Path(path).read_text()) | changed
    Path("examples").unlink()
    shutil.copytree(ROOT / "examples", "examples")
    Path(path).write_text(yaml.safe_dump(settings))
