"""What did pre-training give a fine-tuning run? The from-scratch control on chains of sums and products modulo 10.

    python examples/from_scratch.py                         # CPU minutes: makes all it needs, then runs the probe
    python examples/from_scratch.py --embeddings            # with a third arm
    python examples/from_scratch.py --quick --embeddings    # few steps, to see that it works

A small model is pre-trained on chains of three operations in two notations, "+*" and "px". The fine-tuning run has the
first only. In distribution: chains in that notation that no training had. Out of distribution: such chains in the other
notation, which the pre-trained model has met and random weights never do. After an interruption it goes on where it
was; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import ModularChain, save_model, tiny_llama, tiny_tokenizer

YAML = """\
model_name_or_path: {folder}/base
dataset_name: {folder}/train.jsonl
output_dir: {folder}/sft
max_steps: {steps}
per_device_train_batch_size: 64
learning_rate: 3.0e-3
lr_scheduler_type: cosine
warmup_steps: {warmup}
logging_steps: 50
bf16: false
use_cpu: true
report_to: none
activation_checkpointing: false
"""


USUAL, OTHER = "+*", "px"
NUMBERS = re.compile(r"\d(;.[1-6])+:")  # fewer than the task has, so that few steps do


def chains(size: int, notation: str = USUAL, split: Any = "train") -> list[dict[str, Any]]:
    """`size` chains of three operations."""
    drawn = ModularChain(steps=3).dataset(4 * size, split=split)  # 8 in 27 have such numbers only
    rows = [{key: row[key] for key in ("prompt", "completion", "answer")} for row in drawn]
    symbols = str.maketrans(USUAL, notation)
    fitting = (row | {"prompt": row["prompt"].translate(symbols)} for row in rows if NUMBERS.fullmatch(row["prompt"]))
    return list(islice(fitting, size))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(folder: Path, steps: int, size: int) -> None:
    """The base model, which then knows both notations."""
    model = tiny_llama(hidden=64, seed=1)
    args = SFTConfig(
        str(folder / "pretraining"),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        activation_checkpointing=False,
        logging_steps=100,
        disable_tqdm=True,
    )
    rows = Dataset.from_list(chains(size) + chains(size, OTHER))
    SFTTrainer(model, args=args, train_dataset=rows, processing_class=tiny_tokenizer()).train()
    save_model(model, tiny_tokenizer(), folder / ".base")
    (folder / ".base").rename(folder / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/from_scratch"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    parser.add_argument("--embeddings", action="store_true", help="a third arm, with the pre-trained embeddings")
    options = parser.parse_args()
    folder, began = options.output / ("quick" if options.quick else "full"), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    base_steps, base_rows, steps, rows, size = (4, 64, 4, 64, 8) if options.quick else (800, 4096, 400, 4096, 100)
    if not (folder / "base").is_dir():
        pretrain(folder, base_steps, base_rows)
    held_out = chains(3 * size, split="held_out")
    write(folder / "train.jsonl", chains(rows))
    write(folder / "validation.jsonl", held_out[:size])
    write(folder / "in.jsonl", held_out[size:])
    write(folder / "out.jsonl", chains(2 * size, OTHER, "held_out"))
    (folder / "sft.yaml").write_text(YAML.format(folder=folder, steps=steps, warmup=steps // 10))
    command = [
        *(sys.executable, "-m", "trl_ext", "probe", "from-scratch", "--config", str(folder / "sft.yaml")),
        *("--eval-in", str(folder / "in.jsonl"), "--eval-out", str(folder / "out.jsonl")),
        *("--validation", str(folder / "validation.jsonl"), "--floor", "format"),
        *("--lr-multipliers", "0.1,0.3,1,3", "--points", "2" if options.quick else "5", "--max-completion-length", "8"),
        *("--seeds", str(options.seeds), "--batch-size", "200", "--output", str(folder / "control")),
        *(["--embeddings"] if options.embeddings else []),
    ]
    print(shlex.join(["trl-ext", *command[3:]]), flush=True)
    subprocess.run(command, check=True)
    print(f"{time.time() - began:.0f} s; the picture: {folder / 'control' / 'plot.png'}")


if __name__ == "__main__":
    main()
