"""What the layer and an objective cost: one run, ratios against plain TRL on the same data and weights.

    python benchmarks/core.py [--device cuda] [--steps 40] [--only label_rank,top20_log_probs]

Arms: plain `trl.SFTTrainer` (nll); `trl_ext.SFTTrainer` without plugins; with `power`; TRL's deprecated
`compute_loss_func` route with the same loss on full logits; nll that asks the fused head for an output of TRL's or one
of ours. Plain nll comes twice: how far the second is from 1 is what
the other ratios are good for. All arms train in one process, a step of each in turn; a ratio is the median over turns,
with its 95 % interval. On CPU one thread, and the processor's time. Memory is the peak of training above the level
before it, as the allocator counts it; each arm in a process of its own.

The layer's own cost is far below the noise of whole steps, so it is measured on a model whose step takes next to
nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from measure import hardware, in_own_process, one_thread, peak_memory, ratio, settings, steps_in_turn
from transformers import PrinterCallback, logging
from transformers.utils.logging import disable_progress_bar

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import TokenRecord
from trl_ext.testing import tiny_llama, tiny_tokenizer

PLAIN, PLAIN_AGAIN = "plain nll", "plain nll, again"
HEAD = ("log_sum_sq_probs", "label_rank", "top20_log_probs")
ARMS = (PLAIN, PLAIN_AGAIN, "no plugins", "power", "compute_loss_func", *HEAD)


@dataclass(eq=False)
class Asking:
    """NLL, with one more output of the fused head."""

    fused_outputs: tuple[str, ...] = field(init=False, default=())

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> torch.Tensor:
        return -tokens.log_probs


def full_logits_power(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """1 - p from full logits, as a user of `compute_loss_func` would write it."""
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    log_probs = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (-torch.expm1(log_probs) * (targets != -100)).sum() / num_items_in_batch


def make_trainer(arm: str, shape: dict[str, int], steps: int, device: str, folder: str) -> Any:
    """A trainer of one arm; every arm has the same weights and data."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, shape["vocab"] - 3, (shape["batch"] * steps, shape["length"]), generator=generator)
    common = settings(
        device,
        steps,
        per_device_train_batch_size=shape["batch"],
        max_length=shape["length"],
        activation_checkpointing=False,
    )
    model = tiny_llama(shape["vocab"], hidden=shape["hidden"], layers=shape["layers"])
    given: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
        "processing_class": tiny_tokenizer(),
    }
    if arm.startswith("plain nll") or arm == "compute_loss_func":
        extra = {"compute_loss_func": full_logits_power} if arm == "compute_loss_func" else {}
        trainer = trl.SFTTrainer(args=trl.SFTConfig(folder, **common), **given, **extra)
    else:
        plugins = ["power:alpha=1"] if arm == "power" else None
        asking = Asking()
        asking.fused_outputs = (arm,)
        instances = [asking] if arm in HEAD else []
        args = trl_ext.SFTConfig(folder, plugins=plugins, **common)
        trainer = trl_ext.SFTTrainer(args=args, plugins=instances, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_times(arms: tuple[str, ...], shape: dict[str, int], steps: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of each arm's steps, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        return steps_in_turn({arm: make_trainer(arm, shape, steps, device, f"{folder}/{arm}") for arm in arms}, device)


def measure_memory(arm: str, shape: dict[str, int], steps: int, device: str) -> int:
    """Peak bytes of an arm's training, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(make_trainer(arm, shape, steps, device, folder).train, device)


def measure_layer(plain: float, device: str) -> dict[str, float]:
    """What the layer takes without plugins, and its share of a `plain` step of so many seconds."""
    nothing = {"vocab": 64, "hidden": 8, "layers": 1, "batch": 1, "length": 8}
    layer = measure_times((PLAIN, "no plugins"), nothing, 1000, device)
    cost = float(np.median(layer["no plugins"] - layer[PLAIN]))
    print(f"the layer without plugins: {cost * 1e6:.1f} us a step = {cost / plain:.4%} of plain nll")
    return {"us_per_step": cost * 1e6, "share_of_plain_step": cost / plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", help="arms to measure beside plain nll, with commas; the layer is left out then")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--measure-memory", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    one_thread(options.device)
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
    arms = tuple(arm for arm in ARMS if not options.only or arm in (PLAIN, PLAIN_AGAIN, *options.only.split(",")))
    times = measure_times(arms, shape, options.steps, options.device)
    plain = times[PLAIN]
    common = ["--device", options.device, "--shape", json.dumps(shape), "--steps", "3"]
    memory = {arm: in_own_process(__file__, *common, "--measure-memory", arm) / 2**20 for arm in arms}
    figures: dict[str, Any] = {"hardware": hardware(options.device), "shape": shape, "arms": {}}
    print(f"{figures['hardware']}, {shape}")
    print(f"{'arm':20} {'ms a step':>10} {'time ratio':>21} {'peak MiB':>9} {'memory ratio':>13}")
    for arm in arms:
        row = {
            "step_ms": np.median(times[arm]) * 1e3,
            "time_ratio": str(ratio(times[arm], plain)),
            "peak_mib": memory[arm],
            "memory_ratio": memory[arm] / memory[PLAIN],
        }
        figures["arms"][arm] = row
        print("{:20} {:10.2f} {:>21} {:9.0f} {:13.3f}".format(arm, *row.values()))

    if not options.only:
        figures["layer"] = measure_layer(float(np.median(plain)), options.device)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
