"""What a step of parallel averaging costs, against a plain GRPO step and a plain SFT step on the same batches.

    python benchmarks/mixing.py                     # CPU
    python benchmarks/mixing.py --device cuda       # one GPU

All variants train in one process, a step of each in turn. Completions have a fixed length, so that every step does the
same work; on CPU one thread, the processor's time, and an allocator that keeps freed memory, as CUDA's does. The ratio
is to GRPO + SFT of the same turn: the median over turns, with its 95 % interval. Memory is the peak of training above
the higher of GRPO and SFT, in copies of the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from measure import hardware, keep_freed_memory, one_thread, peak_memory, peaks, ratio, settings, steps_in_turn

import trl_ext
from trl_ext.testing import tiny_llama, tiny_tokenizer

VARIANTS = ("plain GRPO", "plain SFT", "parallel averaging", "gradient averaging")
SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden": 256,
        "layers": 4,
        "heads": 4,
        "batch": 32,
        "prompt": 64,
        "completion": 48,
        "sft_batch": 32,
        "sft_length": 256,
    },
    "cuda": {
        "hidden": 2048,
        "layers": 16,
        "heads": 16,
        "batch": 32,
        "prompt": 256,
        "completion": 64,
        "sft_batch": 16,
        "sft_length": 512,
    },
}


def make_trainer(variant: str, device: str, steps: int, folder: str) -> Any:
    """A trainer of one variant; every variant has the same weights."""
    size = SIZES[device]
    with torch.device(device):  # a billion random numbers take a GPU no time
        model = tiny_llama(hidden=size["hidden"], layers=size["layers"], num_attention_heads=size["heads"])
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=length))

    prompts = Dataset.from_list([{"prompt": text(size["prompt"])} for _ in range(256)])
    solutions = Dataset.from_list([{"text": text(size["sft_length"] - 1)} for _ in range(steps * size["sft_batch"])])

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(ids) % 7 / 6 for ids in completion_ids]

    both = settings(device, steps, learning_rate=1e-5, gradient_checkpointing=False)
    grpo = both | {
        "per_device_train_batch_size": size["batch"],
        "num_generations": 8,
        "max_completion_length": size["completion"],
        "generation_kwargs": {"min_new_tokens": size["completion"]},
    }
    tokenizer = tiny_tokenizer()
    if variant == "plain SFT":
        config = trl.SFTConfig(folder, per_device_train_batch_size=size["sft_batch"], **both)
        return trl.SFTTrainer(model, args=config, train_dataset=solutions, processing_class=tokenizer)
    given: dict[str, Any] = {"reward_funcs": reward, "train_dataset": prompts, "processing_class": tokenizer}
    if variant == "plain GRPO":
        return trl.GRPOTrainer(model, args=trl.GRPOConfig(folder, **grpo), **given)
    mode = "updates" if variant == "parallel averaging" else "gradients"
    plugin = {"name": "parallel-averaging", "mode": mode, "batch_size": size["sft_batch"]}
    config = trl_ext.GRPOConfig(folder, plugins=[plugin], **grpo)
    return trl_ext.GRPOTrainer(model, args=config, streams={"sft": solutions}, **given)


def measure_memory(variant: str, device: str) -> list[int]:
    """Peak bytes of three steps, and the bytes of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, device, 3, folder)
        copy = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        return [peak_memory(trainer.train, device), copy]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=62, help="of each variant; the first two do not count")
    parser.add_argument("--system-malloc", action="store_true", help="on CPU: let glibc give freed memory back")
    parser.add_argument("--no-gradients", action="store_true", help="leave out mode=gradients")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure-memory", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.system_malloc:
        keep_freed_memory(options.device)
    one_thread(options.device)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory, options.device)))
        return
    variants = VARIANTS[:-1] if options.no_gradients else VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            variant: make_trainer(variant, options.device, options.steps, f"{folder}/{variant}") for variant in variants
        }
        seconds = steps_in_turn(trainers, options.device)
        del trainers
    memory = peaks(__file__, options.device, variants, lambda variant: measure_memory(variant, options.device))

    copy, apart = memory["plain GRPO"][1], max(memory[variant][0] for variant in ("plain GRPO", "plain SFT"))
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters in fp32, {SIZES[options.device]}")
    print(f"{options.steps} steps of each\n")
    print("| variant | ms a step | / (GRPO + SFT) | memory above both, copies of the weights |\n|---|---|---|---|")
    table = {}
    for variant in variants:
        copies, ms = (memory[variant][0] - apart) / copy, 1e3 * float(np.median(seconds[variant]))
        share = str(ratio(seconds[variant], seconds["plain GRPO"] + seconds["plain SFT"]))
        table[variant] = {"ms": ms, "ratio": share, "memory": copies}
        print(f"| {variant} | {ms:.1f} | {share} | {copies:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
