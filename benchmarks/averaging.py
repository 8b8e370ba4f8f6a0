"""What averaging costs: plain TRL, + ema, + ema in host memory, + four decays, in one run.

    python benchmarks/averaging.py                     # CPU
    python benchmarks/averaging.py --device cuda       # one GPU

Every variant trains the same model on the same random tokens in a process of its own, several times, one after the
other in turn, so that a drift of the machine hits all alike. A variant's time is its fastest optimiser step; on CPU one
thread, and the processor's time. Plain TRL comes twice: how far the second is from 1 is what the other ratios are good
for; the average's update is therefore timed on its own, too. Memory is the peak of training above that of plain TRL, in
copies of the weights in fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import StepTimes, hardware, in_own_process, one_thread, peak_memory, timed_method

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


def train(variant: str, device: str, steps: int, warm_up: int, memory: bool) -> dict[str, float]:
    """Train one variant in this process.

    Returns:
        the seconds of the fastest step, or with `memory` the peak bytes; and the bytes of one fp32 copy of the weights.
    """
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl_ext_averaging.online import OnlineAverage

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
    plugins, clock = VARIANTS[variant], StepTimes(device)
    own = timed_method(OnlineAverage, "weights_updated", device)
    with tempfile.TemporaryDirectory() as folder:
        module, extra = (trl_ext, {"plugins": plugins}) if plugins else (trl, {})
        trainer = module.SFTTrainer(
            model,
            args=module.SFTConfig(folder, **settings, **extra),
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
            processing_class=tiny_tokenizer(),
            callbacks=[clock],
        )
        if memory:
            found: dict[str, float] = {"peak": peak_memory(trainer.train, device)}
        else:
            trainer.train()
            found = {"seconds": min(clock.seconds[warm_up:]), "own": min(own[warm_up:], default=0.0)}
    weights = sum(p.numel() for p in model.parameters())
    return found | {"copy": 4 * weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    one_thread(options.device)
    if options.variant:
        print(json.dumps(train(options.variant, options.device, options.steps, options.warm_up, options.memory)))
        return

    timed = ["--device", options.device, "--steps", str(options.steps), "--warm-up", str(options.warm_up)]
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    own: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            run = in_own_process(__file__, *timed, "--variant", variant)
            seconds[variant].append(run["seconds"])
            own[variant].append(run["own"])
    fastest = {variant: min(times) for variant, times in seconds.items()}
    short = ["--device", options.device, "--steps", "3", "--memory"]
    peaks = {variant: in_own_process(__file__, *short, "--variant", variant) for variant in VARIANTS}

    copy, shape = peaks["plain TRL"]["copy"], SIZES[options.device]
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters, {shape}")
    print(f"{options.rounds} rounds of {options.steps} steps, the first {options.warm_up} not counted\n")
    print(
        "| variant | ms a step | time ratio | update alone, ms (share) | memory, fp32 copies |\n|---|---|---|---|---|"
    )
    table = {}
    for variant in VARIANTS:
        memory = (peaks[variant]["peak"] - peaks["plain TRL"]["peak"]) / copy
        ms, ratio = fastest[variant] * 1e3, fastest[variant] / fastest["plain TRL"]
        update = min(own[variant])
        share = update / fastest["plain TRL"]
        table[variant] = {"ms": ms, "ratio": ratio, "update_ms": update * 1e3, "update_share": share, "memory": memory}
        print(f"| {variant} | {ms:.1f} | {ratio:.3f} | {update * 1e3:.2f} ({share:.2%}) | {memory:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
