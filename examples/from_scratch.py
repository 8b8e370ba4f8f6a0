"""What did pre-training give a fine-tuning run? The from-scratch control on chains of sums and products modulo 10.

    python examples/from_scratch.py            # CPU minutes: base model, data, YAML, then `trl-ext probe from-scratch`
    python examples/from_scratch.py --quick    # few steps, to see that it works

A small model is pre-trained on chains of one to four operations. The fine-tuning run has chains of two operations only.
In distribution: chains of two that no training had. Out of distribution: chains of three and four. Run again after an
interruption, it goes on where it was; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
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
learning_rate: 1.0e-3
lr_scheduler_type: cosine
warmup_steps: {warmup}
logging_steps: 50
bf16: false
use_cpu: true
report_to: none
activation_checkpointing: false
"""


def chains(lengths: tuple[int, ...], size: int, split: Any = "train", seed: int = 0) -> list[dict[str, Any]]:
    """`size` chains of each length, mixed."""
    rows = [row for n in lengths for row in ModularChain(steps=n).dataset(size, split=split, seed=seed)]
    random.Random(seed).shuffle(rows)
    return [{key: row[key] for key in ("prompt", "completion", "answer")} for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(folder: Path, steps: int, size: int) -> None:
    """The base model, which then knows chains of one to four operations."""
    model = tiny_llama(hidden=64, seed=1)
    args = SFTConfig(
        str(folder / "pretraining"),
        max_steps=steps,
        per_device_train_batch_size=128,
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
    rows = Dataset.from_list(chains((1, 2, 3, 4), size, seed=1))
    SFTTrainer(model, args=args, train_dataset=rows, processing_class=tiny_tokenizer()).train()
    save_model(model, tiny_tokenizer(), folder / ".base")
    (folder / ".base").rename(folder / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/from_scratch"))
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options = parser.parse_args()
    folder, began = options.output / ("quick" if options.quick else "full"), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    base_steps, base_rows, steps, rows, size = (4, 64, 4, 64, 8) if options.quick else (1000, 16_384, 400, 3072, 100)
    if not (folder / "base").is_dir():
        pretrain(folder, base_steps, base_rows)
    held_out = chains((2,), 3 * size, "held_out")
    write(folder / "train.jsonl", chains((2,), rows))
    write(folder / "in.jsonl", held_out[size:])
    write(folder / "validation.jsonl", held_out[:size])
    write(folder / "out.jsonl", chains((3, 4), size, "held_out"))
    (folder / "sft.yaml").write_text(YAML.format(folder=folder, steps=steps, warmup=steps // 10))
    command = [
        *(sys.executable, "-m", "trl_ext", "probe", "from-scratch", "--config", str(folder / "sft.yaml")),
        *("--eval-in", str(folder / "in.jsonl"), "--eval-out", str(folder / "out.jsonl")),
        *("--validation", str(folder / "validation.jsonl"), "--floor", "format", "--embeddings"),
        *("--lr-multipliers", "0.3,1,3,10", "--points", "2" if options.quick else "5", "--max-completion-length", "8"),
        *("--eval-batch-size", "200", "--output", str(folder / "control")),
    ]
    print(shlex.join(["trl-ext", *command[3:]]), flush=True)
    subprocess.run(command, check=True)
    print(f"{time.time() - began:.0f} s; the picture: {folder / 'control' / 'from_scratch.png'}")


if __name__ == "__main__":
    main()
