"""What data regularisation costs: one run, all arms on the same general and target batches and from the same weights.

    python benchmarks/data_regularization.py [--device cuda --size large] [--steps 22]

Arms: `plain`, TRL on the general batch of n = 8; `target`, TRL's forward and backward on the target batch of m = 1,
without the optimiser; `two batches`, a plain step with the target's forward and backward beside it and nothing made of
it; then global in two passes (ghost), global derivative, layer-wise exact in one pass and in two, layer-wise sketched,
and half-space. To reach: half-space <= 1.02 of two batches; layer-wise sketched <= 1.15 of plain + target.

All arms train in one process, a step of each in turn; a ratio is the median over turns, with its 95 % interval. On CPU
one thread's processor time. Plain comes twice: how far the second is from 1 is what the other ratios are good for.
Memory is the peak of training above the level before it, each arm in a process of its own, and what an arm takes
beyond plain in copies of the gradient; t itself is one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import trl
from datasets import Dataset, disable_progress_bars
from measure import hardware, in_own_process, one_thread, peak_memory, ratio, settings, steps_in_turn
from transformers import PrinterCallback, logging
from transformers.utils.logging import disable_progress_bar
from trl_ext_data_regularization.data_regularization import DataRegularization
from trl_ext_data_regularization.gradient_surgery import GradientSurgery

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import StreamGradient, StreamRequest
from trl_ext.testing import tiny_llama, tiny_tokenizer

GENERAL, TARGET = 8, 1
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 8192, "hidden": 256, "layers": 4, "length": 256},
    "large": {
        "vocab_size": 32_000,
        "hidden": 2048,
        "layers": 16,
        "length": 512,
    },  # all arms at once: choose some with --only
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


PLAIN, AGAIN, ALONE, BOTH = "plain", "plain, again", "target", "two batches"
ARMS: dict[str, Any] = {
    PLAIN: None,
    AGAIN: None,
    ALONE: None,
    BOTH: TwoBatches,
    "global two-pass": lambda: DataRegularization(scope="global"),
    "global derivative": lambda: DataRegularization(scope="global", engine="derivative"),
    "layer-wise one pass": lambda: DataRegularization(),
    "layer-wise two passes": lambda: DataRegularization(passes="two"),
    "layer-wise sketched": lambda: DataRegularization(engine="sketch"),
    "half-space": lambda: GradientSurgery(general="train", stream_batch_size=TARGET),
}


def make_trainer(arm: str, steps: int, options: argparse.Namespace) -> Any:
    """A trainer of one arm; every arm has the same weights and data."""
    shape = dict(SHAPES[options.size])
    length, rows = shape.pop("length"), TARGET if arm == ALONE else GENERAL
    ids = torch.randint(0, 250, (GENERAL * steps, length), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    common = settings(
        options.device,
        steps,
        output_dir=options.folder,
        per_device_train_batch_size=rows,
        max_length=length,
        activation_checkpointing=False,
    )
    with torch.device(options.device):
        net = tiny_llama(**shape, max_position_embeddings=max(1024, length))
    given = {"train_dataset": data, "processing_class": tiny_tokenizer()}
    if ARMS[arm] is None:
        trainer = trl.SFTTrainer(net, args=trl.SFTConfig(**common), **given)
    else:
        streams = {"target": data.select(range(GENERAL))}
        args = trl_ext.SFTConfig(**common)
        trainer = trl_ext.SFTTrainer(net, args=args, plugins=[ARMS[arm]()], streams=streams, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradient_mib(options: argparse.Namespace) -> float:
    """One copy of the gradient, in MiB."""
    with torch.device("meta"):
        net = tiny_llama(**{k: v for k, v in SHAPES[options.size].items() if k != "length"})
    return sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--steps", type=int, default=22, help="of each arm; the first two do not count")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), help="beside the first four")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--measure-memory", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    disable_progress_bars()
    one_thread(options.device)
    arms = [arm for arm in ARMS if arm in (PLAIN, AGAIN, ALONE, BOTH, *options.only)]
    with tempfile.TemporaryDirectory() as options.folder:
        if options.measure_memory:
            print(peak_memory(make_trainer(options.measure_memory, 3, options).train, options.device))
            return
        trainers = {arm: make_trainer(arm, options.steps, options) for arm in arms}
        times = steps_in_turn(trainers, options.device, without_optimizer=[ALONE])
        del trainers
    size = ["--device", options.device, "--size", options.size]
    measured = [] if options.no_memory else arms
    peaks = {arm: in_own_process(__file__, *size, "--measure-memory", arm) / 2**20 for arm in measured}
    report(times, peaks, options)


def report(times: dict[str, np.ndarray], peaks: dict[str, float], options: argparse.Namespace) -> None:
    """Print the table, and write the figures."""
    bases = {"plain": times[PLAIN], "plain + target": times[PLAIN] + times[ALONE], "two batches": times[BOTH]}
    copy = gradient_mib(options)
    print(f"\n{hardware(options.device)}; {options.size}: {SHAPES[options.size]}")
    print(f"n = {GENERAL}, m = {TARGET}; {options.steps} steps; one gradient: {copy:.0f} MiB\n")
    print("| arm | ms a step | / plain | / (plain + target) | / two batches | peak MiB | beyond plain, gradients |")
    print("|---" * 7 + "|")
    figures: dict[str, Any] = {}
    for arm, seconds in times.items():
        ratios = {name: str(ratio(seconds, base)) for name, base in bases.items()}
        ms = 1e3 * float(np.median(seconds))
        figures[arm] = {"ms": ms, "ratios": ratios, "peak_mib": peaks.get(arm)}
        memory = [f"{peaks[arm]:.0f}", f"{(peaks[arm] - peaks[PLAIN]) / copy:.2f}"] if peaks else ["", ""]
        print(f"| {arm} | {ms:.1f} | {' | '.join([*ratios.values(), *memory])} |")
    if options.output:
        facts = {"hardware": hardware(options.device), "shape": SHAPES[options.size], "gradient_mib": copy}
        options.output.write_text(json.dumps({**facts, "arms": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
