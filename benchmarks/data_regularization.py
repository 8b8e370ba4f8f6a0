"""What data regularisation costs: one run, all arms on the same general and target batches and from the same weights.

    python benchmarks/data_regularization.py [--device cuda] [--steps 22]

Arms: `plain`, TRL on the general batch of n = 8; `target`, TRL's forward and backward on the target batch of m = 1,
without the optimiser; `two batches`, a plain step with the target's forward and backward beside it and nothing made of
it, and `two streams`, with two of them; then global in two passes (ghost), global derivative, layer-wise exact in one
pass and in two, layer-wise sketched, and half-space. To reach: half-space <= 1.02 of two batches; layer-wise sketched
<= 1.10 of plain + target.

All arms train in one process, a step of each in turn; a ratio is the median over turns, with its 95 % interval. On CPU
one thread's processor time. Plain comes twice: how far the second is from 1 is what the other ratios are good for.
On CUDA all arms are in memory at once: where it is short, the model has fewer layers. Memory is the peak of training
above the level before it, on CPU each arm in a process of its own, and what an arm takes beyond plain in copies of the
gradient; t itself is one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import trl
from arguments import Shape, again, fitting, parameters, parse, parser, report, trained
from datasets import Dataset
from measure import hardware, peak_memory, peaks, ratio, settings, steps_in_turn
from transformers import PrinterCallback
from trl_ext_data_regularization.data_regularization import DataRegularization
from trl_ext_data_regularization.gradient_surgery import GradientSurgery

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import StreamGradient, StreamRequest
from trl_ext.testing import tiny_llama, tiny_tokenizer

GENERAL, TARGET = 8, 1
SHAPES: dict[str, Shape] = {
    "cpu": {"vocab_size": 8192, "hidden": 256, "layers": 4, "length": 256},
    "cuda": {"vocab_size": 32_000, "hidden": 2048, "layers": 16, "length": 512},
    "tiny": {"vocab_size": 300, "hidden": 16, "layers": 1, "length": 16},
}


@dataclass(eq=False)
class MoreBatches:
    """Another batch's forward and backward, or several, and nothing made of them."""

    roles: tuple[str, ...] = ("target",)

    requires_api: ClassVar[str] = "1"

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        return [StreamRequest(role, TARGET) for role in self.roles]

    @hookimpl
    def gradients_ready(self, gradients: Any, streams: Mapping[str, StreamGradient]) -> None:
        """Takes all gradients, and leaves them alone."""


PLAIN, AGAIN, ALONE, BOTH, STREAMS = "plain", "plain, again", "target", "two batches", "two streams"
ARMS: dict[str, Any] = {
    PLAIN: None,
    AGAIN: None,
    ALONE: None,
    BOTH: MoreBatches,
    STREAMS: lambda: MoreBatches(("target", "second")),
    "global two-pass": lambda: DataRegularization(scope="global"),
    "global derivative": lambda: DataRegularization(scope="global", engine="derivative"),
    "layer-wise one pass": lambda: DataRegularization(),
    "layer-wise two passes": lambda: DataRegularization(passes="two"),
    "layer-wise sketched": lambda: DataRegularization(engine="sketch"),
    "half-space": lambda: GradientSurgery(general="train", stream_batch_size=TARGET),
}


def make_model(shape: Shape) -> Any:
    sizes = {name: size for name, size in shape.items() if name != "length"}
    return tiny_llama(**sizes, max_position_embeddings=max(1024, shape["length"]))


def need(shape: Shape, arms: int) -> float:
    """Bytes of so many arms, of two more gradients and of the activations of one."""
    tokens = (GENERAL + TARGET) * shape["length"]
    return trained(parameters(lambda: make_model(shape)), arms + 1) + tokens * 60 * shape["layers"] * shape["hidden"]


def make_trainer(arm: str, shape: Shape, steps: int, device: str, folder: str) -> Any:
    """A trainer of one arm; every arm has the same weights and data."""
    length, rows = shape["length"], TARGET if arm == ALONE else GENERAL
    ids = torch.randint(0, 250, (GENERAL * steps, length), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    common = settings(
        device,
        steps,
        output_dir=folder,
        per_device_train_batch_size=rows,
        max_length=length,
        activation_checkpointing=False,
    )
    with torch.device(device):
        net = make_model(shape)
    given = {"train_dataset": data, "processing_class": tiny_tokenizer()}
    if ARMS[arm] is None:
        trainer = trl.SFTTrainer(net, args=trl.SFTConfig(**common), **given)
    else:
        plugin = ARMS[arm]()
        streams = {request.role: data.select(range(GENERAL)) for request in plugin.streams()}
        args = trl_ext.SFTConfig(**common)
        trainer = trl_ext.SFTTrainer(net, args=args, plugins=[plugin], streams=streams, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_memory(arm: str, shape: Shape, device: str) -> int:
    """Peak bytes of an arm's training of three steps, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(make_trainer(arm, shape, 3, device, folder).train, device)


def main() -> None:
    options = parse(parser(__doc__, SHAPES, 22, ARMS))
    arms = [arm for arm in ARMS if not options.only or arm in (PLAIN, AGAIN, ALONE, BOTH, *options.only)]
    shape = fitting(SHAPES[options.size], "layers", lambda shape: need(shape, len(arms)), options.device)
    if options.measure_memory:
        print(measure_memory(options.measure_memory, shape, options.device))
        return
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make_trainer(arm, shape, options.steps, options.device, f"{folder}/{arm}") for arm in arms}
        times = steps_in_turn(trainers, options.device, without_optimizer=[ALONE])
        del trainers
    memory = peaks(__file__, options, again(options), arms, lambda arm: measure_memory(arm, shape, options.device))
    show(times, memory, shape, options)


def show(times: dict[str, np.ndarray], memory: dict[str, int], shape: Shape, options: argparse.Namespace) -> None:
    """Print the table, and write the figures."""
    plain, alone = times[PLAIN], times[ALONE]
    bases = {
        "plain": plain,
        "plain + target": plain + alone,
        "plain + 2 targets": plain + 2 * alone,
        "two batches": times[BOTH],
    }
    copy = 4 * parameters(lambda: make_model(shape))
    print(f"\n{hardware(options.device)}; {shape}")
    print(f"n = {GENERAL}, m = {TARGET}; {options.steps} steps; one gradient: {copy / 2**20:.0f} MiB\n")
    print(
        "| arm | ms a step | " + " | ".join(f"/ {base}" for base in bases) + " | peak MiB | beyond plain, gradients |"
    )
    print("|---" * (len(bases) + 4) + "|")
    table: dict[str, Any] = {}
    for arm, seconds in times.items():
        ratios, ms = {name: ratio(seconds, base) for name, base in bases.items()}, 1e3 * float(np.median(seconds))
        table[arm] = {"ms": ms, "ratios": {name: asdict(value) for name, value in ratios.items()}}
        row = [*map(str, ratios.values()), "", ""]
        if memory:
            table[arm] |= {"peak_mib": memory[arm] / 2**20, "copies": (memory[arm] - memory[PLAIN]) / copy}
            row[-2:] = [f"{table[arm]['peak_mib']:.0f}", f"{table[arm]['copies']:.2f}"]
        print(f"| {arm} | {ms:.1f} | {' | '.join(row)} |")
    report(options, shape, table, gradient_mib=copy / 2**20)


if __name__ == "__main__":
    main()
