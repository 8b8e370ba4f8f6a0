"""What the layer and an objective cost: one run, ratios against plain TRL on the same data and weights.

    python benchmarks/core.py [--device cuda] [--steps 40] [--only label_rank top20_log_probs]

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

import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import trl
from arguments import Shape, again, fitting, parameters, parse, parser, report, trained
from datasets import Dataset
from measure import against_plain, hardware, peak_memory, peaks, settings, steps_in_turn
from transformers import PrinterCallback

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import TokenRecord
from trl_ext.testing import tiny_llama, tiny_tokenizer

PLAIN, PLAIN_AGAIN = "plain nll", "plain nll, again"
HEAD = ("log_sum_sq_probs", "label_rank", "top20_log_probs")
ARMS = (PLAIN, PLAIN_AGAIN, "no plugins", "power", "compute_loss_func", *HEAD)
SHAPES: dict[str, Shape] = {
    "cpu": {"vocab": 32_000, "hidden": 128, "layers": 2, "batch": 4, "length": 128},
    # Qwen2-0.5B's vocabulary, width and depth.
    "cuda": {"vocab": 151_936, "hidden": 896, "layers": 24, "batch": 8, "length": 2048},
    "tiny": {"vocab": 300, "hidden": 16, "layers": 1, "batch": 2, "length": 16},
}


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


def make_model(shape: Shape) -> Any:
    return tiny_llama(shape["vocab"], hidden=shape["hidden"], layers=shape["layers"], max_position_embeddings=2048)


def need(shape: Shape, arms: int) -> float:
    """Bytes of so many arms; full logits and what is made of them take most."""
    a_token = 28 * shape["vocab"] + 40 * shape["layers"] * shape["hidden"]
    return trained(parameters(lambda: make_model(shape)), arms) + shape["batch"] * shape["length"] * a_token


def make_trainer(arm: str, shape: Shape, steps: int, device: str, folder: str) -> Any:
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
    with torch.device(device):  # half a billion random numbers take a GPU no time
        model = make_model(shape)
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


def measure_times(arms: list[str], shape: Shape, steps: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of each arm's steps, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        return steps_in_turn({arm: make_trainer(arm, shape, steps, device, f"{folder}/{arm}") for arm in arms}, device)


def measure_memory(arm: str, shape: Shape, device: str) -> int:
    """Peak bytes of an arm's training of three steps, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(make_trainer(arm, shape, 3, device, folder).train, device)


def measure_layer(plain: float, steps: int, device: str) -> dict[str, float]:
    """What the layer takes without plugins, and its share of a `plain` step of so many seconds."""
    nothing = {"vocab": 64, "hidden": 8, "layers": 1, "batch": 1, "length": 8}
    layer = measure_times([PLAIN, "no plugins"], nothing, steps, device)
    cost = float(np.median(layer["no plugins"] - layer[PLAIN]))
    print(f"the layer without plugins: {cost * 1e6:.1f} us a step = {cost / plain:.4%} of plain nll")
    return {"us_per_step": cost * 1e6, "share_of_plain_step": cost / plain}


def main() -> None:
    made = parser(__doc__, SHAPES, 40, ARMS)
    made.add_argument("--layer-steps", type=int, default=1000, help="of the model whose step takes nothing; 0 for none")
    options = parse(made)
    arms = [arm for arm in ARMS if not options.only or arm in (PLAIN, PLAIN_AGAIN, *options.only)]
    shape = fitting(SHAPES[options.size], "batch", lambda shape: need(shape, len(arms)), options.device)
    if options.measure_memory:
        print(measure_memory(options.measure_memory, shape, options.device))
        return
    times = measure_times(arms, shape, options.steps, options.device)
    memory = peaks(__file__, options, again(options), arms, lambda arm: measure_memory(arm, shape, options.device))
    table: dict[str, Any] = {}
    print(f"{hardware(options.device)}, {shape}\n")
    print("| arm | ms a step | time ratio | peak MiB | memory ratio |\n|---|---|---|---|---|")
    for arm in arms:
        table[arm], row = against_plain(arm, PLAIN, times, memory)
        print(row)
    layer_steps = 0 if options.only else options.layer_steps
    layer = measure_layer(float(np.median(times[PLAIN])), layer_steps, options.device) if layer_steps else {}
    report(options, shape, table, layer=layer)


if __name__ == "__main__":
    main()
