"""What averaging costs: plain TRL, + ema, + ema in host memory, + four decays, in one run.

    python benchmarks/averaging.py                     # CPU
    python benchmarks/averaging.py --device cuda       # one GPU

All variants train the same model on the same random tokens in one process, a step of each in turn; on CPU one thread,
and the processor's time. A ratio is the median over turns, with its 95 % interval. Plain TRL comes twice: how far the
second is from 1 is what the other ratios are good for; the average's update is therefore timed on its own, too. Memory
is the peak of training above that of plain TRL, in copies of the weights in fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from measure import hardware, one_thread, peak_memory, peaks, ratio, settings, steps_in_turn, timed_method
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
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden": 256, "layers": 4, "vocab": 4096, "batch": 16, "length": 256, "dtype": "float32"},
    "cuda": {"hidden": 2048, "layers": 16, "vocab": 32768, "batch": 4, "length": 1024, "dtype": "bfloat16"},
}


def make_trainer(variant: str, device: str, steps: int, folder: str) -> Any:
    """A trainer of one variant; every variant has the same weights and data."""
    size = SIZES[device]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=4 * size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["hidden"] // 64,
        num_key_value_heads=size["hidden"] // 64,
        pad_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, str(size["dtype"])))
    rows = torch.randint(1, int(size["vocab"]), (steps * int(size["batch"]), int(size["length"])))

    common = settings(
        device,
        steps,
        per_device_train_batch_size=size["batch"],
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


def measure_memory(variant: str, device: str) -> list[int]:
    """Peak bytes of three steps, and the bytes of the weights in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, device, 3, folder)
        copy = 4 * sum(p.numel() for p in trainer.model.parameters())
        return [peak_memory(trainer.train, device), copy]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=42, help="of each variant; the first two do not count")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure-memory", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    one_thread(options.device)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory, options.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        updates = timed_method(OnlineAverage, "weights_updated", options.device)
        trainers = {variant: make_trainer(variant, options.device, options.steps, folder) for variant in VARIANTS}
        seconds = steps_in_turn(trainers, options.device)
        own = {
            variant: [update for plugin in trainers[variant].ext_plugins for update in updates[id(plugin.instance)]]
            for variant, plugins in VARIANTS.items()
            if plugins
        }
        del trainers
    memory = peaks(__file__, options.device, VARIANTS, lambda variant: measure_memory(variant, options.device))

    plain, (plain_peak, copy) = seconds["plain TRL"], memory["plain TRL"]
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters, {SIZES[options.device]}")
    print(f"{options.steps} steps of each\n")
    print(
        "| variant | ms a step | time ratio | update alone, ms (share) | memory, fp32 copies |\n|---|---|---|---|---|"
    )
    table = {}
    for variant in VARIANTS:
        copies, ms = (memory[variant][0] - plain_peak) / copy, 1e3 * float(np.median(seconds[variant]))
        update = float(np.median(own.get(variant, [0.0])))
        share, whole = update / float(np.median(plain)), str(ratio(seconds[variant], plain))
        table[variant] = {"ms": ms, "ratio": whole, "update_ms": update * 1e3, "update_share": share, "memory": copies}
        print(f"| {variant} | {ms:.1f} | {whole} | {update * 1e3:.2f} ({share:.2%}) | {copies:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
