"""What the layer and an objective cost: one run, ratios against plain TRL on the same data and weights.

    python benchmarks/core.py [--device cuda] [--rounds 6] [--steps 8]

Arms: plain `trl.SFTTrainer` (nll); `trl_ext.SFTTrainer` without plugins; with `power`; TRL's deprecated
`compute_loss_func` route with the same loss on full logits. Times are per optimiser step (from `on_step_begin` to
`on_step_end`), arms in turn, round by round; ratios are of medians. Memory is the peak during training above the level
before it: of the allocator on CUDA, of the resident set, sampled, on CPU; each arm in a process of its own.

The layer's own cost is far below the noise of whole steps, so it is measured on a model whose step takes next to
nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, logging
from transformers.utils.logging import disable_progress_bar

import trl_ext
from trl_ext.testing import tiny_llama, tiny_tokenizer

ARMS = ("plain nll", "no plugins", "power", "compute_loss_func")


class StepTimes(TrainerCallback):
    """Wall and processor seconds of each optimiser step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = self._now()
        self.wall.append(wall - self._start[0])
        self.cpu.append(cpu - self._start[1])


def full_logits_power(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """1 - p from full logits, as a user of `compute_loss_func` would write it."""
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    log_probs = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (-torch.expm1(log_probs) * (targets != -100)).sum() / num_items_in_batch


def make_trainer(arm: str, shape: dict[str, int], steps: int, device: str, folder: str) -> Any:
    """A trainer of one arm; every arm has the same weights and data."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, shape["vocab"] - 3, (shape["batch"] * steps, shape["length"]), generator=generator)
    common: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": shape["batch"],
        "max_length": shape["length"],
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": steps,
        "disable_tqdm": True,
    }
    model = tiny_llama(shape["vocab"], hidden=shape["hidden"], layers=shape["layers"])
    given: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
        "processing_class": tiny_tokenizer(),
    }
    if arm in ("plain nll", "compute_loss_func"):
        extra = {"compute_loss_func": full_logits_power} if arm == "compute_loss_func" else {}
        trainer = trl.SFTTrainer(args=trl.SFTConfig(folder, **common), **given, **extra)
    else:
        plugins = ["power:alpha=1"] if arm == "power" else None
        trainer = trl_ext.SFTTrainer(args=trl_ext.SFTConfig(folder, plugins=plugins, **common), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_times(
    arms: tuple[str, ...], shape: dict[str, int], rounds: int, steps: int, device: str
) -> dict[str, StepTimes]:
    """Per-step times of each arm, in turn; the first step of each round is left out."""
    times = {arm: StepTimes(device) for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make_trainer(arm, shape, steps, device, folder) for arm in arms}
        for round_ in range(rounds + 1):
            for arm, trainer in trainers.items():
                clock = StepTimes(device)
                trainer.add_callback(clock)
                trainer.train()
                trainer.remove_callback(clock)
                if round_ > 0:  # the first round warms up
                    times[arm].wall += clock.wall[1:]
                    times[arm].cpu += clock.cpu[1:]
    return times


def peak_memory(arm: str, shape: dict[str, int], steps: int, device: str) -> float:
    """MiB that training adds, in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--measure-memory", arm, "--shape", json.dumps(shape)]
    out = subprocess.run([*command, "--steps", str(steps)], check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def measure_memory(arm: str, shape: dict[str, int], steps: int, device: str) -> float:
    """What `peak_memory` runs: the peak during training above the level before it, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arm, shape, steps, device, folder)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trainer.train()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        process, peak, done = psutil.Process(), 0, threading.Event()
        before = process.memory_info().rss

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.0005):
                peak = max(peak, process.memory_info().rss)

        sampler = threading.Thread(target=sample)
        sampler.start()
        trainer.train()
        done.set()
        sampler.join()
        return (peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--measure-memory", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    if options.measure_memory:
        print(measure_memory(options.measure_memory, json.loads(options.shape), options.steps, options.device))
        return

    big = {
        "vocab": 151_936,
        "hidden": 896,
        "layers": 24,
        "batch": 8,
        "length": 2048,
    }  # Qwen2-0.5B's vocabulary and width
    small = {"vocab": 32_000, "hidden": 128, "layers": 2, "batch": 4, "length": 128}
    shape = big if options.device == "cuda" else small
    times = run_times(ARMS, shape, options.rounds, options.steps, options.device)
    plain = statistics.median(times["plain nll"].wall)
    memory = {arm: peak_memory(arm, shape, 3, options.device) for arm in ARMS}
    figures: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "shape": shape,
        "arms": {},
    }
    print(f"{figures['hardware']}, {figures['threads']} threads, {shape}")
    print(f"{'arm':20} {'ms a step':>10} {'time ratio':>11} {'peak MiB':>9} {'memory ratio':>13}")
    for arm in ARMS:
        median = statistics.median(times[arm].wall)
        row = {
            "step_ms": median * 1e3,
            "time_ratio": median / plain,
            "peak_mib": memory[arm],
            "memory_ratio": memory[arm] / memory["plain nll"],
        }
        figures["arms"][arm] = row
        print("{:20} {:10.2f} {:11.4f} {:9.0f} {:13.3f}".format(arm, *row.values()))

    nothing = {"vocab": 64, "hidden": 8, "layers": 1, "batch": 1, "length": 8}
    layer = run_times(("plain nll", "no plugins"), nothing, 4 * options.rounds, 40, options.device)
    cost = statistics.median(layer["no plugins"].cpu) - statistics.median(layer["plain nll"].cpu)
    figures["layer"] = {"cpu_us_per_step": cost * 1e6, "share_of_plain_step": cost / plain}
    print(f"the layer without plugins: {cost * 1e6:.1f} us of processor time a step = {cost / plain:.4%} of plain nll")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
