"""What a step of parallel averaging costs, against a plain GRPO step and a plain SFT step on the same batches.

    python benchmarks/mixing.py                     # CPU
    python benchmarks/mixing.py --device cuda       # one GPU

Every variant trains the same model in a process of its own, several times, one after the other in turn, so that a drift
of the machine hits all alike. Completions have a fixed length, so that every step does the same work. Time is that of
the optimiser steps after a warm-up, on the CPU the processor time of the process (all threads), which neighbours
disturb less. The ratio is parallel / (GRPO + SFT) in the same round. Memory is the peak above that of plain GRPO, in
copies of the weights: of the device on CUDA, of the process on the CPU (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("plain GRPO", "plain SFT", "parallel averaging", "gradient averaging")
SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden": 256,
        "layers": 4,
        "batch": 16,
        "prompt": 64,
        "completion": 32,
        "sft_batch": 16,
        "sft_length": 192,
    },
    "cuda": {
        "hidden": 2048,
        "layers": 16,
        "batch": 32,
        "prompt": 256,
        "completion": 256,
        "sft_batch": 16,
        "sft_length": 512,
    },
}


def train(variant: str, device: str, steps: int, warm_up: int) -> dict[str, float]:
    """Train one variant in this process: seconds a step, peak bytes, bytes of one copy of the weights."""
    import random

    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    import trl_ext
    from trl_ext.testing import tiny_llama, tiny_tokenizer

    size = SIZES[device]
    model = tiny_llama(hidden=size["hidden"], layers=size["layers"])
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=length))

    prompts = Dataset.from_list([{"prompt": text(size["prompt"])} for _ in range(256)])
    solutions = Dataset.from_list([{"text": text(size["sft_length"] - 1)} for _ in range(steps * size["sft_batch"])])

    class Clock(TrainerCallback):
        started = finished = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warm_up, steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                now = time.perf_counter() if device == "cuda" else time.process_time()
                self.started, self.finished = self.finished, now

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(ids) % 7 / 6 for ids in completion_ids]

    settings: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": 1e-5,
        "bf16": False,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
    }
    grpo = settings | {
        "per_device_train_batch_size": size["batch"],
        "num_generations": 8,
        "max_completion_length": size["completion"],
        "generation_kwargs": {"min_new_tokens": size["completion"]},
    }
    clock = Clock()
    common: dict[str, Any] = {"processing_class": tiny_tokenizer(), "callbacks": [clock]}
    with tempfile.TemporaryDirectory() as folder:
        if variant == "plain SFT":
            config = trl.SFTConfig(folder, per_device_train_batch_size=size["sft_batch"], **settings)
            trainer = trl.SFTTrainer(model, args=config, train_dataset=solutions, **common)
        elif variant == "plain GRPO":
            trainer = trl.GRPOTrainer(
                model, reward_funcs=reward, args=trl.GRPOConfig(folder, **grpo), train_dataset=prompts, **common
            )
        else:
            mode = "updates" if variant == "parallel averaging" else "gradients"
            plugin = {"name": "parallel-averaging", "mode": mode, "batch_size": size["sft_batch"]}
            trainer = trl_ext.GRPOTrainer(
                model,
                reward_funcs=reward,
                args=trl_ext.GRPOConfig(folder, plugins=[plugin], **grpo),
                train_dataset=prompts,
                streams={"sft": solutions},
                **common,
            )
        trainer.train()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": (clock.finished - clock.started) / (steps - warm_up), "peak": peak, "copy": copy}


def hardware(device: str) -> str:
    """The machine in words."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{cpu} x {os.cpu_count()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(train(options.variant, options.device, options.steps, options.warm_up)))
        return

    measured: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    common = ["--device", options.device, "--steps", str(options.steps), "--warm-up", str(options.warm_up)]
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *common, "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            measured[variant].append(json.loads(done.stdout.splitlines()[-1]))

    grpo, sft = measured["plain GRPO"], measured["plain SFT"]
    copy = grpo[0]["copy"]
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters in fp32, {SIZES[options.device]}")
    print(f"{options.rounds} rounds of {options.steps} steps, the first {options.warm_up} not counted\n")
    print("| variant | ms a step | / (GRPO + SFT) (least - most) | memory above plain GRPO, copies of the weights |")
    print("|---|---|---|---|")
    table = {}
    for variant, runs in measured.items():
        ratios = [run["seconds"] / (a["seconds"] + b["seconds"]) for run, a, b in zip(runs, grpo, sft, strict=True)]
        memory = (statistics.median(r["peak"] for r in runs) - statistics.median(r["peak"] for r in grpo)) / copy
        ms, ratio = statistics.median(run["seconds"] for run in runs) * 1e3, statistics.median(ratios)
        table[variant] = {"ms": ms, "ratio": ratio, "ratios": ratios, "memory": memory}
        print(f"| {variant} | {ms:.1f} | {ratio:.3f} ({min(ratios):.3f} - {max(ratios):.3f}) | {memory:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
