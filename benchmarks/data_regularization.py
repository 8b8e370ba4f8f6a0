"""What data regularisation costs: one run, ratios against the two-batch step on the same data and weights.

    python benchmarks/data_regularization.py [--device cuda --size large] [--rounds 6] [--steps 8]

Arms: `plain`, TRL on the general batch of n = 8; `target`, TRL on the target batch of m = 1 alone; `two batches`, plain
with the target's forward and backward and nothing made of it, which is what half-space and the rest are compared
with; then global two-pass (ghost), global derivative, layer-wise exact in one pass and in two, layer-wise sketched, and
half-space. Times are per optimiser step, arms in turn, round by round; ratios are of medians. Memory is the peak above
the level before training: of the allocator on CUDA, and not measured on CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, logging
from transformers.utils.logging import disable_progress_bar
from trl_ext_data_regularization.plugin import DataRegularization
from trl_ext_data_regularization.surgery import GradientSurgery

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import StreamGradient, StreamRequest
from trl_ext.testing import tiny_llama, tiny_tokenizer

GENERAL, TARGET = 8, 1
SHAPES = {
    "small": {"hidden": 128, "layers": 4, "length": 128},
    "large": {"hidden": 2048, "layers": 16, "length": 512, "vocab_size": 32_000},  # about 1 B parameters
}


@dataclass(eq=False)
class TwoBatches:
    """The second batch's forward and backward, and nothing made of it."""

    requires_api: ClassVar[str] = "1"

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        return [StreamRequest("target", TARGET)]

    @hookimpl
    def gradients_ready(self, gradients: Any, streams: Mapping[str, StreamGradient]) -> None:
        """Takes both gradients, and leaves them alone."""


ARMS: dict[str, Any] = {
    "plain": None,
    "target": None,
    "two batches": TwoBatches,
    "global two-pass": lambda: DataRegularization(scope="global"),
    "global derivative": lambda: DataRegularization(scope="global", engine="derivative"),
    "layer-wise one pass": lambda: DataRegularization(),
    "layer-wise two passes": lambda: DataRegularization(passes="two"),
    "layer-wise sketched": lambda: DataRegularization(engine="sketch"),
    "half-space": lambda: GradientSurgery(general="train", stream_batch_size=TARGET),
}


class StepTimes(TrainerCallback):
    """Wall seconds of each optimiser step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.began)


def run(arm: str, options: argparse.Namespace, data: Dataset, start: Mapping[str, Any]) -> tuple[list[float], float]:
    """Seconds of each step after the first two, and the peak of memory in MiB."""
    shape = {k: v for k, v in SHAPES[options.size].items() if k != "length"}
    with torch.device(options.device):
        net = tiny_llama(**shape)
    net.load_state_dict(start)
    cls, config = (trl.SFTTrainer, trl.SFTConfig) if ARMS[arm] is None else (trl_ext.SFTTrainer, trl_ext.SFTConfig)
    extra = {} if ARMS[arm] is None else {"plugins": [ARMS[arm]()], "streams": {"target": data}}
    times = StepTimes(options.device)
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder,
            max_steps=options.steps + 2,
            per_device_train_batch_size=TARGET if arm == "target" else GENERAL,
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10**6,
            max_length=SHAPES[options.size]["length"],
        )
        trainer = cls(net, args=args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[times], **extra)
        trainer.remove_callback(PrinterCallback)
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        trainer.train()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if options.device == "cuda" else float("nan")
    return times.seconds[2:], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bar()
    length = SHAPES[options.size]["length"]
    data = Dataset.from_list([{"text": chr(97 + i % 26) * (2 * length)} for i in range(64)])
    shape = {k: v for k, v in SHAPES[options.size].items() if k != "length"}
    with torch.device(options.device):
        start = tiny_llama(**shape).state_dict()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for arm in ARMS:
            times, peaks[arm] = run(arm, options, data, start)
            seconds[arm] += times
    median = {arm: statistics.median(times) for arm, times in seconds.items()}
    both = median["plain"] + median["target"]
    gradient = sum(t.numel() * t.element_size() for t in start.values()) / 2**20
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.device}, {options.size}")
    print(f"n = {GENERAL}, m = {TARGET}, {length} tokens each; one gradient copy: {gradient:.0f} MiB")
    print("| arm | ms a step | / plain | / (plain + target) | / two batches | peak MiB |")
    print("|---|---|---|---|---|---|")
    for arm, value in median.items():
        ratios = " | ".join(f"{value / base:.3f}" for base in (median["plain"], both, median["two batches"]))
        print(f"| {arm} | {1e3 * value:.1f} | {ratios} | {peaks[arm]:.0f} |")
    if options.output:
        record = {"settings": {**vars(options), "output": str(options.output)}, "seconds": seconds, "peak_mib": peaks}
        options.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
