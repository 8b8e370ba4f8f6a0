"""What averaging costs: plain TRL, + ema, + ema in host memory, + four decays, in one run.

    python benchmarks/averaging.py                     # CPU
    python benchmarks/averaging.py --device cuda       # one GPU

Every variant trains the same model on the same random tokens in a process of its own, several times, one after the
other in turn, so that a drift of the machine hits all alike. Time is that of the optimiser steps after a warm-up, on
the CPU the processor time of the process (all threads), which neighbours disturb less; the ratio is the median over
rounds of the ratio to plain TRL in the same round. Memory is the peak above plain TRL, in
copies of the weights in fp32: of the device on CUDA, of the process on the CPU (Linux).
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

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "plain TRL": [],
    "+ ema": [{"name": "ema"}],
    "+ ema, device: cpu": [{"name": "ema", "device": "cpu"}],
    "+ 4 decays": [{"name": "ema", "decay": [0.9, 0.99, 0.999, 0.9999]}],
}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden": 256, "layers": 4, "vocab": 4096, "batch": 8, "length": 128, "dtype": "float32"},
    "cuda": {"hidden": 2048, "layers": 16, "vocab": 32768, "batch": 4, "length": 1024, "dtype": "bfloat16"},
}


def train(variant: str, device: str, steps: int, warm_up: int) -> dict[str, float]:
    """Train one variant in this process: seconds a step, peak bytes, bytes of one fp32 copy of the weights."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    import trl_ext
    from trl_ext.testing import tiny_tokenizer

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
    model = LlamaForCausalLM(config).to(getattr(torch, str(size["dtype"])))
    rows = torch.randint(1, int(size["vocab"]), (steps * int(size["batch"]), int(size["length"])))

    class Clock(TrainerCallback):
        started = finished = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warm_up, steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                now = time.perf_counter() if device == "cuda" else time.process_time()
                self.started, self.finished = self.finished, now

    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": size["batch"],
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
    }
    plugins, clock = VARIANTS[variant], Clock()
    with tempfile.TemporaryDirectory() as folder:
        module, extra = (trl_ext, {"plugins": plugins}) if plugins else (trl, {})
        trainer = module.SFTTrainer(
            model,
            args=module.SFTConfig(folder, **settings, **extra),
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
            processing_class=tiny_tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
    weights = sum(p.numel() for p in model.parameters())
    return {"seconds": (clock.finished - clock.started) / (steps - warm_up), "peak": peak, "copy": 4 * weights}


def hardware(device: str) -> str:
    """The machine in words."""
    import torch

    cpus = os.cpu_count()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{model} x {cpus}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10)
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

    plain = measured["plain TRL"]
    copy, shape = plain[0]["copy"], SIZES[options.device]
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters, {shape}")
    print(f"{options.rounds} rounds of {options.steps} steps, the first {options.warm_up} not counted\n")
    print("| variant | ms a step | time ratio (least - most) | memory, fp32 copies |\n|---|---|---|---|")
    table = {}
    for variant, runs in measured.items():
        ratios = [run["seconds"] / base["seconds"] for run, base in zip(runs, plain, strict=True)]
        memory = (statistics.median(r["peak"] for r in runs) - statistics.median(r["peak"] for r in plain)) / copy
        ms, ratio = statistics.median(run["seconds"] for run in runs) * 1e3, statistics.median(ratios)
        table[variant] = {"ms": ms, "ratio": ratio, "ratios": ratios, "memory": memory}
        print(f"| {variant} | {ms:.1f} | {ratio:.3f} ({min(ratios):.3f} - {max(ratios):.3f}) | {memory:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
