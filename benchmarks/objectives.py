"""What every objective costs: one run, ratios against plain TRL's nll on the same data and weights.

    python benchmarks/objectives.py [--device cuda] [--steps 22] [--only power "iw-sft, cached"]

All arms train in one process, a step of each in turn, so that a slow moment of the machine meets all of them; a ratio
is the median over turns, with its 95 % interval. Plain nll is measured twice: how far the second is from 1 is what the
other ratios are good for. On CPU one thread, and the processor's time (other processes do not count). On CUDA the
wall's, and memory for all arms at once: where it is short, the model has fewer layers. Activation checkpointing is on,
as TRL has it by default. Memory is the peak of training above the level before it, on CPU each arm in a process of its
own; a reference's weights count, since they are taken when training starts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from arguments import Shape, again, fitting, parameters, parse, parser, report, trained
from datasets import Dataset
from measure import against_plain, hardware, peak_memory, peaks, settings, steps_in_turn
from peft import LoraConfig
from transformers import PrinterCallback
from trl_ext_probing.capability.log_prob_cache import write_cache
from trl_ext_probing.capability.sample_keys import sample_key, vocabulary_digest

import trl_ext
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

PLAIN, PLAIN_AGAIN, PLAIN_LORA = "plain nll", "plain nll, again", "plain nll, LoRA"
# Without a reference; then the reference cached, then live.
ARMS: dict[str, str | None] = {
    PLAIN: None,
    PLAIN_AGAIN: None,
    **{name: name for name in ("nll", "power", "log1mp", "focal", "huber", "dft", "chord-phi", "eaft", "deft", "idft")},
    **{name: name for name in ("talr", "entropy", "gem", "auto")},
    "eaft, whole": "eaft:gate=whole",
    "gem, linear": "gem:h=linear",
    "threshold": "threshold",
    "threshold, kept": "threshold:normalization=kept",
    "mixture": "mixture:first=power:alpha=10,second=nll,weight=linear:0:1",
    "iw-sft, cached": "iw-sft:reference=cache:{folder}/cache.safetensors",
    "rho1, cached": "rho1:reference=cache:{folder}/cache.safetensors",
    "iw-sft, start": "iw-sft:reference=start",
    "iw-sft, model": "iw-sft:reference=model:{folder}/model",
    "psft": "psft",
    "asft, start": "asft:reference=start",
    PLAIN_LORA: None,
    "iw-sft, base, LoRA": "iw-sft:reference=base",
}
SHAPES: dict[str, Shape] = {
    # The LM head has a tenth of the parameters, as in models of 3 B.
    "cpu": {"vocab": 4096, "hidden": 256, "layers": 12, "batch": 4, "length": 256},
    # Qwen2-0.5B's vocabulary, width and depth.
    "cuda": {"vocab": 151_936, "hidden": 896, "layers": 24, "batch": 8, "length": 2048},
    "tiny": {"vocab": 300, "hidden": 16, "layers": 1, "batch": 2, "length": 16},
}


def prepare(shape: Shape, steps: int, folder: Path) -> None:
    """Data, a copy of the model, and a cache of log-probabilities (any numbers will do: only reading them is timed)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 250, (shape["batch"] * steps, shape["length"]), generator=generator).numpy()
    Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / "data"))
    save_model(make_model(shape), tiny_tokenizer(), folder / "model")
    values = [np.full(shape["length"] - 1, -5.0, dtype=np.float32) for _ in rows]
    metadata = {"vocabulary": vocabulary_digest(tiny_tokenizer()), "model": "none"}
    write_cache(folder / "cache.safetensors", [sample_key(row, row) for row in rows], values, metadata)


def make_model(shape: Shape) -> Any:
    return tiny_llama(shape["vocab"], hidden=shape["hidden"], layers=shape["layers"], max_position_embeddings=4096)


def need(shape: Shape, arms: int) -> float:
    """Bytes of so many arms, one of them with a copy of its weights, and of tiles of logits."""
    a_token = 40 * shape["hidden"] * 4 + 6 * shape["layers"] * shape["hidden"]
    activations = shape["batch"] * shape["length"] * a_token
    return trained(parameters(lambda: make_model(shape)), arms + 1) + activations + 4 * 2**30


def make_trainer(arm: str, shape: Shape, steps: int, device: str, folder: Path) -> Any:
    """A trainer of one arm; every arm has the same weights and data."""
    plugin, lora, output = ARMS[arm], arm.endswith("LoRA"), str(folder / arm)
    common = settings(device, steps, per_device_train_batch_size=shape["batch"], max_length=shape["length"])
    with torch.device(device):
        model = make_model(shape)
    given: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.load_from_disk(str(folder / "data")),
        "processing_class": tiny_tokenizer(),
        "peft_config": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    }
    if plugin is None:
        trainer = trl.SFTTrainer(args=trl.SFTConfig(output, **common), **given)
    else:
        plugins = [plugin.format(folder=folder)]
        trainer = trl_ext.SFTTrainer(args=trl_ext.SFTConfig(output, plugins=plugins, **common), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_memory(arm: str, shape: Shape, device: str, folder: Path) -> int:
    """Peak bytes of an arm's training of three steps, in this process."""
    return peak_memory(make_trainer(arm, shape, 3, device, folder).train, device)


def main() -> None:
    made = parser(__doc__, SHAPES, 22, ARMS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parse(made)
    arms = [arm for arm in ARMS if not options.only or arm in (PLAIN, *options.only)]
    shape = fitting(SHAPES[options.size], "layers", lambda shape: need(shape, len(arms)), options.device)
    if options.measure_memory:
        print(measure_memory(options.measure_memory, shape, options.device, options.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(shape, max(options.steps, 3), folder)
        trainers = {arm: make_trainer(arm, shape, options.steps, options.device, folder) for arm in arms}
        times = steps_in_turn(trainers, options.device)
        del trainers
        arguments = [*again(options), "--folder", str(folder)]
        memory = peaks(
            __file__, options, arguments, arms, lambda arm: measure_memory(arm, shape, options.device, folder)
        )
    table: dict[str, Any] = {}
    print(f"{hardware(options.device)}, {shape}\n")
    print("| objective | ms a step | time | peak MiB | memory |\n|---|---|---|---|---|")
    for arm in arms:
        plain = PLAIN_LORA if arm.endswith("LoRA") and PLAIN_LORA in arms else PLAIN
        table[arm], row = against_plain(arm, plain, times, memory)
        print(row)
    report(options, shape, table)


if __name__ == "__main__":
    main()
