"""What a step of parallel averaging costs, against a plain GRPO step and a plain SFT step on the same batches.

    python benchmarks/mixing.py                     # CPU
    python benchmarks/mixing.py --device cuda       # one GPU

All variants train in one process, a step of each in turn. Completions have a fixed length, so that every step does the
same work; on CPU one thread, the processor's time, and an allocator that keeps freed memory, as CUDA's does. The ratio
is to GRPO + SFT of the same turn: the median over turns, with its 95 % interval. Memory is the peak of training above
the higher of GRPO and SFT, in copies of the weights.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import trl
from arguments import Shape, again, fitting, parameters, parse, parser, report, trained
from datasets import Dataset
from measure import hardware, keep_freed_memory, peak_memory, peaks, ratio, settings, steps_in_turn

import trl_ext
from trl_ext.testing import tiny_llama, tiny_tokenizer

VARIANTS = ("plain GRPO", "plain SFT", "parallel averaging", "gradient averaging")
SHAPES: dict[str, Shape] = {
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
    "tiny": {
        "hidden": 16,
        "layers": 1,
        "heads": 2,
        "batch": 8,
        "prompt": 8,
        "completion": 4,
        "sft_batch": 2,
        "sft_length": 16,
    },
}
GRPO, SFT = VARIANTS[:2]


def make_model(shape: Shape) -> Any:
    return tiny_llama(hidden=shape["hidden"], layers=shape["layers"], num_attention_heads=shape["heads"])


def need(shape: Shape, variants: int) -> float:
    """Bytes of so many variants, one of them with the other branch's moments and gradients, and of activations."""
    tokens = max(shape["batch"] * (shape["prompt"] + shape["completion"]), shape["sft_batch"] * shape["sft_length"])
    return (
        trained(parameters(lambda: make_model(shape)), variants + 2) + tokens * 60 * shape["layers"] * shape["hidden"]
    )


def make_trainer(variant: str, size: Shape, device: str, steps: int, folder: str) -> Any:
    """A trainer of one variant; every variant has the same weights."""
    with torch.device(device):  # a billion random numbers take a GPU no time
        model = make_model(size)
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
    if variant == SFT:
        config = trl.SFTConfig(folder, per_device_train_batch_size=size["sft_batch"], **both)
        return trl.SFTTrainer(model, args=config, train_dataset=solutions, processing_class=tokenizer)
    given: dict[str, Any] = {"reward_funcs": reward, "train_dataset": prompts, "processing_class": tokenizer}
    if variant == GRPO:
        return trl.GRPOTrainer(model, args=trl.GRPOConfig(folder, **grpo), **given)
    mode = "updates" if variant == "parallel averaging" else "gradients"
    plugin = {"name": "parallel-averaging", "mode": mode, "batch_size": size["sft_batch"]}
    config = trl_ext.GRPOConfig(folder, plugins=[plugin], **grpo)
    return trl_ext.GRPOTrainer(model, args=config, streams={"sft": solutions}, **given)


def measure_memory(variant: str, shape: Shape, device: str) -> int:
    """Peak bytes of three steps."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(make_trainer(variant, shape, device, 3, folder).train, device)


def main() -> None:
    made = parser(__doc__, SHAPES, 62, VARIANTS)
    made.add_argument("--system-malloc", action="store_true", help="on CPU: let glibc give freed memory back")
    options = parse(made)
    if not options.system_malloc:
        keep_freed_memory(options.device)
    variants = [name for name in VARIANTS if not options.only or name in (GRPO, SFT, *options.only)]
    shape = fitting(SHAPES[options.size], "layers", lambda shape: need(shape, len(variants)), options.device)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory, shape, options.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            variant: make_trainer(variant, shape, options.device, options.steps, f"{folder}/{variant}")
            for variant in variants
        }
        times = steps_in_turn(trainers, options.device)
        del trainers
    memory = peaks(
        __file__, options, again(options), variants, lambda variant: measure_memory(variant, shape, options.device)
    )

    copy = 4 * parameters(lambda: make_model(shape))
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters in fp32, {shape}")
    print(f"{options.steps} steps of each\n")
    print("| variant | ms a step | / (GRPO + SFT) | memory above both, copies of the weights |\n|---|---|---|---|")
    table: dict[str, Any] = {}
    for variant in variants:
        time, ms = ratio(times[variant], times[GRPO] + times[SFT]), 1e3 * float(np.median(times[variant]))
        copies = (memory[variant] - max(memory[GRPO], memory[SFT])) / copy if memory else None
        table[variant] = {"ms": ms, "ratios": {"GRPO + SFT": asdict(time)}, "copies": copies}
        print(f"| {variant} | {ms:.1f} | {time} | {'' if copies is None else f'{copies:.2f}'} |")
    report(options, shape, table, parameters=copy // 4)


if __name__ == "__main__":
    main()
