"""What a GRPO step costs with each method of trl-ext-policy, against a plain one on the same batch.

    python benchmarks/policy.py                     # CPU
    python benchmarks/policy.py --device cuda       # one GPU

All train in one process, a step of each in turn, at the size of `benchmarks/mixing.py`. Completions have a fixed
length, so that every step does the same work: generation, rewards, advantages, loss and update. On CPU one thread, the
processor's time, and an allocator that keeps freed memory, as CUDA's does. The ratio is to the plain step of the same
turn: the median over turns, with its 95 % interval.
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
from measure import hardware, keep_freed_memory, one_thread, ratio, settings, steps_in_turn
from mixing import SHAPES, make_model

import trl_ext
from trl_ext.testing import tiny_tokenizer

PLAIN = "plain GRPO"
METHODS = {
    "gfpo": "gfpo:k=4",
    "pkpo": "pkpo",
    "pass-at-k": "pass-at-k:success=0.5",
    "gtpo": "gtpo",
    "entropy-reward": "entropy-reward:success=0.5",
    "entropy-advantage": "entropy-advantage",
    "clip-cov": "clip-cov",
    "kl-cov": "kl-cov",
}


def make_trainer(arm: str, device: str, steps: int, folder: str) -> Any:
    """A trainer of one arm; all start from the same weights.

    Args:
        arm: name of a method, or `PLAIN`.
        device: "cpu" or "cuda".
        steps: optimiser steps.
        folder: to write into.
    """
    size, rng = SHAPES[device], random.Random(0)
    torch.manual_seed(0)
    with torch.device(device):
        model = make_model(size)
    prompts = [{"prompt": "".join(rng.choices("abcdefgh ", k=size["prompt"]))} for _ in range(256)]

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(ids) % 7 / 6 for ids in completion_ids]

    config = settings(
        device,
        steps,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        per_device_train_batch_size=size["batch"],
        num_generations=8,
        max_completion_length=size["completion"],
        generation_kwargs={"min_new_tokens": size["completion"]},
    )
    given: dict[str, Any] = {
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list(prompts),
        "processing_class": tiny_tokenizer(),
    }
    if arm == PLAIN:
        return trl.GRPOTrainer(model, args=trl.GRPOConfig(folder, **config), **given)
    return trl_ext.GRPOTrainer(model, args=trl_ext.GRPOConfig(folder, plugins=[METHODS[arm]], **config), **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=32, help="of each arm; the first two do not count")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    keep_freed_memory(options.device)
    one_thread(options.device)
    with tempfile.TemporaryDirectory() as folder:
        arms = [PLAIN, *METHODS]
        trainers = {arm: make_trainer(arm, options.device, options.steps, f"{folder}/{arm}") for arm in arms}
        seconds = steps_in_turn(trainers, options.device)
    print(f"{hardware(options.device)}; {SHAPES[options.device]}, {options.steps} steps of each\n")
    print("| arm | ms a step | / plain GRPO |\n|---|---|---|")
    table = {}
    for arm in arms:
        ms, share = 1e3 * float(np.median(seconds[arm])), str(ratio(seconds[arm], seconds[PLAIN]))
        table[arm] = {"ms": ms, "ratio": share}
        print(f"| {arm} | {ms:.1f} | {share} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
