"""What averaging costs: plain TRL, + ema, + ema in host memory, + four decays, in one run.

    python benchmarks/averaging.py                     # CPU
    python benchmarks/averaging.py --device cuda       # one GPU

All variants train the same model on the same random tokens in one process, a step of each in turn; on CPU one thread,
and the processor's time. On CUDA a turn is eight steps, since an update runs beside the next step; at its end, what is
still under way is waited for. A ratio is the median over turns, with its 95 % interval. Plain TRL comes twice: how far
the second is from 1 is what the other ratios are good for. So the average's update is timed on its own, too, in a few
more steps, each of which waits for it. Memory is the peak of training above that of plain TRL, in copies of the weights
in fp32.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import trl
from arguments import Shape, again, fitting, parameters, parse, parser, report
from datasets import Dataset
from measure import hardware, peak_memory, peaks, ratio, settings, steps_in_turn, timed_method
from transformers import LlamaConfig, LlamaForCausalLM
from trl_ext_averaging.online import OnlineAverage

import trl_ext
from trl_ext.testing import tiny_tokenizer

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "plain TRL": [],
    "plain TRL, again": [],
    "+ ema": [{"name": "ema"}],
    "+ ema, device: cpu": [{"name": "ema", "device": "cpu"}],
    "+ 4 decays": [{"name": "ema", "decay": [0.9, 0.99, 0.999, 0.9999]}],
}
PLAIN, AGAIN = list(VARIANTS)[:2]
PER_TURN = {"cpu": 1, "cuda": 8, "tiny": 2}
SHAPES: dict[str, Shape] = {
    "cpu": {"hidden": 256, "layers": 4, "vocab": 4096, "batch": 16, "length": 256, "dtype": "float32"},
    "cuda": {"hidden": 2048, "layers": 16, "vocab": 32768, "batch": 4, "length": 1024, "dtype": "bfloat16"},
    "tiny": {"hidden": 64, "layers": 1, "vocab": 300, "batch": 2, "length": 16, "dtype": "float32"},
}


def make_model(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=4 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64,
        num_key_value_heads=shape["hidden"] // 64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(getattr(torch, shape["dtype"]))


def need(shape: Shape, variants: Iterable[str]) -> float:
    """Bytes of so many variants in bf16, of their averages, and of the activations of one."""
    count, copies = (
        parameters(lambda: make_model(shape)),
        sum(variant.startswith("+ 4") * 4 + 1 for variant in variants),
    )
    activations = shape["batch"] * shape["length"] * (40 * shape["layers"] * shape["hidden"] + 8 * shape["vocab"])
    return count * (6.0 * len(list(variants)) + 4 * copies) + activations


def make_trainer(variant: str, shape: Shape, device: str, steps: int, folder: str) -> Any:
    """A trainer of one variant; every variant has the same weights and data."""
    with torch.device(device):
        model = make_model(shape)
    rows = torch.randint(1, shape["vocab"], (steps * shape["batch"], shape["length"]))
    common = settings(
        device,
        steps,
        per_device_train_batch_size=shape["batch"],
        learning_rate=1e-4,
        bf16=False,
        gradient_checkpointing=False,
    )
    plugins = VARIANTS[variant]
    module, extra = (trl_ext, {"plugins": plugins}) if plugins else (trl, {})
    return module.SFTTrainer(
        model,
        args=module.SFTConfig(folder, **common, **extra),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=tiny_tokenizer(),
    )


def make_trainers(variants: Iterable[str], shape: Shape, device: str, steps: int, folder: str) -> dict[str, Any]:
    return {name: make_trainer(name, shape, device, steps, f"{folder}/{name}") for name in variants}


def measure_memory(variant: str, shape: Shape, device: str) -> int:
    """Peak bytes of three steps."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(make_trainer(variant, shape, device, 3, folder).train, device)


def measure_times(variants: list[str], shape: Shape, turns: int, per_turn: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of a step of each variant, by turn, with the updates that it began."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(variants, shape, device, turns * per_turn, folder)

        def settle(variant: str) -> None:
            for plugin in trainers[variant].ext_plugins if VARIANTS[variant] else ():
                plugin.instance.state_dict()  # waits for the copies

        return steps_in_turn(trainers, device, per_turn=per_turn, settle=settle)


def measure_updates(variants: list[str], shape: Shape, device: str) -> dict[str, float]:
    """Seconds of an update alone, of the variants that have one."""
    gc.collect()  # what has been timed needs its memory no more
    averaging = [variant for variant in variants if VARIANTS[variant]]
    updates = timed_method(OnlineAverage, "weights_updated", device, settle=lambda plugin: plugin.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(averaging, shape, device, 6, folder)
        steps_in_turn(trainers, device)
        return {
            variant: float(
                np.median([seconds for plugin in trainer.ext_plugins for seconds in updates[id(plugin.instance)]])
            )
            for variant, trainer in trainers.items()
        }


def main() -> None:
    options = parse(parser(__doc__, SHAPES, 42, VARIANTS))
    variants = [name for name in VARIANTS if not options.only or name in (PLAIN, AGAIN, *options.only)]
    shape = fitting(SHAPES[options.size], "layers", lambda shape: need(shape, variants), options.device)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory, shape, options.device)))
        return
    times = measure_times(variants, shape, options.steps, PER_TURN[options.size], options.device)
    updates = measure_updates(variants, shape, options.device)
    memory = peaks(
        __file__, options, again(options), variants, lambda variant: measure_memory(variant, shape, options.device)
    )

    copy = 4 * parameters(lambda: make_model(shape))
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters, {shape}")
    print(f"{options.steps} turns of each\n")
    print(
        "| variant | ms a step | time ratio | update alone, ms (share) | memory, fp32 copies |\n|---|---|---|---|---|"
    )
    table: dict[str, Any] = {}
    for variant in variants:
        time, ms, update = ratio(times[variant], times[PLAIN]), 1e3 * float(np.median(times[variant])), 0.0
        table[variant] = {"ms": ms, "ratios": {"plain": asdict(time)}}
        if variant in updates:
            update = updates[variant] / float(np.median(times[PLAIN]))
            table[variant] |= {"update_ms": 1e3 * updates[variant], "update_share": update}
        copies = (memory[variant] - memory[PLAIN]) / copy if memory else None
        table[variant]["copies"] = copies
        row = [f"{1e3 * updates.get(variant, 0):.2f} ({update:.2%})", "" if copies is None else f"{copies:.2f}"]
        print(f"| {variant} | {ms:.1f} | {time} | {' | '.join(row)} |")
    report(options, shape, table, parameters=copy // 4)


if __name__ == "__main__":
    main()
