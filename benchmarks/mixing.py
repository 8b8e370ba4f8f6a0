"""What a step of parallel averaging costs, against a plain GRPO step and a plain SFT step on the same batches.

    python benchmarks/mixing.py                     # CPU
    python benchmarks/mixing.py --device cuda       # one GPU

Every variant trains the same model in a process of its own, several times, one after the other in turn, so that a drift
of the machine hits all alike. Completions have a fixed length, so that every step does the same work, and a variant's
time is its fastest optimiser step; on CPU one thread, and the processor's time. The ratio is to GRPO + SFT. Memory is
the peak of training above that of GRPO or SFT, whichever is higher, in copies of the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import StepTimes, hardware, in_own_process, one_thread, peak_memory

VARIANTS = ("plain GRPO", "plain SFT", "parallel averaging", "gradient averaging")
SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden": 256,
        "layers": 4,
        "batch": 32,
        "prompt": 64,
        "completion": 48,
        "sft_batch": 32,
        "sft_length": 256,
    },
    "cuda": {
        "hidden": 2048,
        "layers": 16,
        "batch": 32,
        "prompt": 256,
        "completion": 256,
        "sft_batch": 16,
        "sft_length": 512,
    },
}


def train(variant: str, device: str, steps: int, warm_up: int, memory: bool) -> dict[str, float]:
    """Train one variant in this process.

    Returns:
        the seconds of the fastest step, or with `memory` the peak bytes; and the bytes of one copy of the weights.
    """
    import random

    import trl
    from datasets import Dataset

    import trl_ext
    from trl_ext.testing import tiny_llama, tiny_tokenizer

    size = SIZES[device]
    model = tiny_llama(hidden=size["hidden"], layers=size["layers"])
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=length))

    prompts = Dataset.from_list([{"prompt": text(size["prompt"])} for _ in range(256)])
    solutions = Dataset.from_list([{"text": text(size["sft_length"] - 1)} for _ in range(steps * size["sft_batch"])])

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(ids) % 7 / 6 for ids in completion_ids]

    settings: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": 1e-5,
        "bf16": False,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
    }
    grpo = settings | {
        "per_device_train_batch_size": size["batch"],
        "num_generations": 8,
        "max_completion_length": size["completion"],
        "generation_kwargs": {"min_new_tokens": size["completion"]},
    }
    clock = StepTimes(device)
    common: dict[str, Any] = {"processing_class": tiny_tokenizer(), "callbacks": [clock]}
    with tempfile.TemporaryDirectory() as folder:
        if variant == "plain SFT":
            config = trl.SFTConfig(folder, per_device_train_batch_size=size["sft_batch"], **settings)
            trainer = trl.SFTTrainer(model, args=config, train_dataset=solutions, **common)
        elif variant == "plain GRPO":
            trainer = trl.GRPOTrainer(
                model, reward_funcs=reward, args=trl.GRPOConfig(folder, **grpo), train_dataset=prompts, **common
            )
        else:
            mode = "updates" if variant == "parallel averaging" else "gradients"
            plugin = {"name": "parallel-averaging", "mode": mode, "batch_size": size["sft_batch"]}
            trainer = trl_ext.GRPOTrainer(
                model,
                reward_funcs=reward,
                args=trl_ext.GRPOConfig(folder, plugins=[plugin], **grpo),
                train_dataset=prompts,
                streams={"sft": solutions},
                **common,
            )
        if memory:
            found: dict[str, float] = {"peak": peak_memory(trainer.train, device)}
        else:
            trainer.train()
            found = {"seconds": min(clock.seconds[warm_up:])}
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    return found | {"copy": copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=6)
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
    for _ in range(options.rounds):
        for variant in VARIANTS:
            seconds[variant].append(in_own_process(__file__, *timed, "--variant", variant)["seconds"])
    fastest = {variant: min(times) for variant, times in seconds.items()}
    short = ["--device", options.device, "--steps", "3", "--memory"]
    peaks = {variant: in_own_process(__file__, *short, "--variant", variant) for variant in VARIANTS}

    copy = peaks["plain GRPO"]["copy"]
    apart = max(peaks[variant]["peak"] for variant in ("plain GRPO", "plain SFT"))
    print(f"{hardware(options.device)}; {copy / 4e6:.1f} M parameters in fp32, {SIZES[options.device]}")
    print(f"{options.rounds} rounds of {options.steps} steps, the first {options.warm_up} not counted\n")
    print("| variant | ms a step | / (GRPO + SFT) | memory above both, copies of the weights |\n|---|---|---|---|")
    table = {}
    for variant in VARIANTS:
        memory = (peaks[variant]["peak"] - apart) / copy
        ms, ratio = fastest[variant] * 1e3, fastest[variant] / (fastest["plain GRPO"] + fastest["plain SFT"])
        table[variant] = {"ms": ms, "ratio": ratio, "memory": memory}
        print(f"| {variant} | {ms:.1f} | {ratio:.3f} | {memory:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware(options.device), **table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
