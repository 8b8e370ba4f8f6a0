"""What averages buy in noisy fine-tuning at a high constant rate: raw, EMA, LAWA and WiSE-FT, on two tasks.

    python examples/averaging.py --output /tmp/averaging       # a few minutes on one CPU core

A tiny model learns to copy letters (the general task) and, from as much data, begins to learn to reverse them (the
target). Then, for each seed, it is fine-tuned to reverse, on demonstrations of which a third are wrong, at a high rate
that never falls. Every weight that can be had from that one run is compared on clean held-out rows of both tasks: the
last weights, the EMA that the plugin kept, the mean of the last checkpoints (LAWA), and points between the start and
the last weights (WiSE-FT) and between the start and the EMA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets, disable_progress_bars
from trl_ext_averaging.offline import average
from trl_ext_averaging.offline.methods import Request
from trl_ext_averaging.offline.metric import held_out_loss

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import Copy, Reverse, save_model, tiny_llama, tiny_tokenizer

GENERAL, TARGET = Copy(length=4), Reverse(length=4)
NOISE, STEPS, EVERY, RATE = 0.33, 500, 20, 2e-3
SHARE = 0.5
ALPHAS = (0.3, 0.5, 0.7, 0.9)


def train(model: str, output: Path, data: Any, **settings: Any) -> SFTTrainer:
    """A run on the CPU whose final model is in `output`."""
    common = {
        "per_device_train_batch_size": 16,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 100,
    }
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(output), **{**common, **settings}),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def fine_tune(start: Path, root: Path, seed: int) -> dict[str, Path]:
    """One noisy run and everything that can be averaged from it, by name."""
    run = root / f"seed-{seed}"
    train(
        str(start),
        run,
        TARGET.dataset(16 * STEPS, seed=seed, noise=NOISE),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        seed=seed,
        save_strategy="steps",
        save_steps=EVERY,
        save_only_model=True,
        plugins=["ema:decay=0.98"],
    )
    last = run / f"checkpoint-{STEPS}"
    models = {"start": start, "raw": last, "EMA": run, "LAWA": run / "lawa"}
    average(Request("lawa", (run,), last=5).plan(), models["LAWA"], overwrite=True)
    for alpha in ALPHAS:
        for name, tuned in (("WiSE-FT", last), ("WiSE-FT of EMA", run)):
            models[f"{name} {alpha}"] = run / f"{name.replace(' ', '-').lower()}-{alpha}"
            average(Request("wise-ft", (start, tuned), alpha=alpha).plan(), models[f"{name} {alpha}"], overwrite=True)
    return models


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Held-out losses of the two tasks against each other: a dot a seed, a cross the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="target task: held-out loss", ylabel="general task: held-out loss")
    for name, marker in (("raw", "o"), ("EMA", "s"), ("LAWA", "^"), ("start", "D")):
        losses = [[run[task] for run in results[name]] for task in ("target", "general")]
        points = axes.scatter(losses[0], losses[1], s=18, marker=marker)
        middle = [statistics.mean(values) for values in losses]
        axes.scatter(middle[0], middle[1], s=140, marker="x", color=points.get_facecolor()[0], label=name)
    for name, end in (("WiSE-FT", "raw"), ("WiSE-FT of EMA", "EMA")):
        path_names = ["start", *(f"{name} {alpha}" for alpha in ALPHAS), end]
        means = [[statistics.mean(r[task] for r in results[n]) for n in path_names] for task in ("target", "general")]
        axes.plot(means[0], means[1], linestyle="--", marker=".", label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plot")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretraining-steps", type=int, default=1500)
    options = parser.parse_args()
    began = time.perf_counter()
    disable_progress_bars()

    start = options.output / "start"
    blank = save_model(tiny_llama(hidden=64, seed=0), tiny_tokenizer(), options.output / "blank")
    train(
        blank,
        start,
        concatenate_datasets(
            [
                GENERAL.dataset(round(16 * options.pretraining_steps * (1 - SHARE)), seed=0),
                TARGET.dataset(round(16 * options.pretraining_steps * SHARE), seed=0),
            ]
        ).shuffle(seed=0),
        max_steps=options.pretraining_steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
    )
    held_out = {
        "target": list(TARGET.dataset(150, split="held_out", seed=1)),
        "general": list(GENERAL.dataset(150, split="held_out", seed=1)),
    }
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name, folder in fine_tune(start, options.output, seed).items():
            losses = {task: held_out_loss(folder, rows) for task, rows in held_out.items()}
            results.setdefault(name, []).append(losses)

    print(f"\nheld-out loss per token, mean and standard deviation over {options.seeds} seeds\n")
    print("| weights | target task | general task |\n|---|---|---|")
    for name, runs in results.items():
        cells = []
        for task in held_out:
            values = [run[task] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")
    (options.output / "averaging.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.output / "averaging.png")
    print(f"\n{time.perf_counter() - began:.0f} s; plot in {options.output / 'averaging.png'}")


if __name__ == "__main__":
    main()
