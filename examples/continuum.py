"""The model-capability continuum in small: which objective wins, by how strong the base model is.

    python examples/continuum.py [--seeds 5] [--jobs 2] [--output runs/continuum] [--large]

Base models of increasing pre-training on chains of modular arithmetic are fine-tuned on the same few demonstrations,
half of them wrong, with NLL, -p, -p^10 and NLL thresholded at p >= 0.2 (arXiv 2510.00526). Capability is what `trl-ext
probe capability` measures: the mean probability of the demonstrations' tokens before fine-tuning. Written: a table of
held-out exact match (JSON and Markdown) and a plot of each objective's gain over NLL against capability, of greedy
answers and of sampled ones (temperature 1; in expectation, which is the probability of the right answer).

`--large` takes a larger model, longer chains and more data, for a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OBJECTIVES = {
    "NLL": "nll",
    "-p": "power:alpha=1",
    "-p^10": "power:alpha=10",
    "NLL, p >= 0.2": "threshold:q=0.2,normalization=kept",
}


@dataclass(frozen=True)
class Setup:
    """Sizes of one experiment."""

    chain: int = 2
    modulus: int = 7
    hidden: int = 64
    layers: int = 2
    pretraining: tuple[int, ...] = (0, 100, 300, 500, 900)
    """Optimiser steps after which a base model is taken."""
    pretraining_rows: int = 20_000
    demonstrations: int = 1024
    noise: float = 0.5
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 3e-3
    held_out: int = 128
    use_cpu: bool = True


LARGE = Setup(
    chain=4,
    modulus=10,
    hidden=256,
    layers=4,
    pretraining=(0, 500, 1000, 2000, 4000),
    pretraining_rows=400_000,
    demonstrations=16_384,
    steps=800,
    held_out=1024,
    use_cpu=False,
)


def run_seed(seed: int, setup: Setup) -> list[dict[str, Any]]:
    """Exact match of every base model, before and after each objective, for one seed."""
    import datasets
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, TrainerCallback

    from trl_ext import SFTConfig, SFTTrainer
    from trl_ext.testing import ModularChain, save_model, tiny_llama, tiny_tokenizer

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    task, tokenizer = ModularChain(setup.chain, setup.modulus), tiny_tokenizer()
    # Pre-training sees other prompts than the demonstrations only by chance of the seed; held-out ones it never sees.
    demonstrations = task.dataset(setup.demonstrations, seed=1000 + seed, noise=setup.noise)
    held_out = task.dataset(setup.held_out, split="held_out", seed=seed)
    common = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "bf16": not setup.use_cpu,
        "use_cpu": setup.use_cpu,
        "activation_checkpointing": False,
        "seed": seed,
    }

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        class Keep(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step in setup.pretraining:
                    save_model(model, tokenizer, folder / f"base-{state.global_step}")

            on_train_begin = on_step_end

        SFTTrainer(
            model=tiny_llama(hidden=setup.hidden, layers=setup.layers, seed=seed),
            args=SFTConfig(
                str(folder / "pretraining"),
                max_steps=max(setup.pretraining),
                per_device_train_batch_size=64,
                learning_rate=3e-3,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=20,
                **common,
            ),
            train_dataset=task.dataset(setup.pretraining_rows, seed=seed),
            processing_class=tokenizer,
            callbacks=[Keep()],
        ).train()

        rows = []
        for pretraining in setup.pretraining:
            path = str(folder / f"base-{pretraining}")
            base = AutoModelForCausalLM.from_pretrained(path)
            row = {
                "seed": seed,
                "pretraining": pretraining,
                "capability": capability(path, demonstrations),
                "base": accuracy(base, tokenizer, held_out),
            }
            for name, plugin in OBJECTIVES.items():
                model = AutoModelForCausalLM.from_pretrained(path)
                SFTTrainer(
                    model=model,
                    args=SFTConfig(
                        str(folder / "tuning"),
                        plugins=[plugin],
                        max_steps=setup.steps,
                        per_device_train_batch_size=setup.batch_size,
                        learning_rate=setup.learning_rate,
                        **common,
                    ),
                    train_dataset=demonstrations,
                    processing_class=tokenizer,
                ).train()
                row[name] = accuracy(model, tokenizer, held_out)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def capability(model: str, demonstrations: Any) -> float:
    """Mean probability of the demonstrations' response tokens, by the code of `trl-ext probe capability`."""
    import numpy as np
    from trl_ext_probing.encoding import encode
    from trl_ext_probing.models import load_model
    from trl_ext_probing.scoring import Scorer

    loaded, tokenizer = load_model(model)
    scores = Scorer(loaded).score([encode(tokenizer, row) for row in demonstrations])
    return float(np.exp(np.concatenate([of_row.log_probs for of_row in scores])).mean())


def accuracy(model: Any, tokenizer: Any, rows: Any) -> dict[str, float]:
    """Exact match of greedy answers, and of sampled ones in expectation: the mean probability of the right answer."""
    import torch

    from trl_ext.testing import exact_match

    total = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.float().log_softmax(-1)
        total += log_probs[range(len(answer)), answer].sum().exp().item()
    return {"greedy": exact_match(model, tokenizer, rows), "sampled": total / len(rows)}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def summarize(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    """Per base model: means over seeds of greedy or sampled exact match, and the gains over NLL, paired by seed."""
    by_level = defaultdict(list)
    for row in rows:
        by_level[row["pretraining"]].append(row)
    summary = []
    for level, group in sorted(by_level.items()):
        entry: dict[str, Any] = {"pretraining": level, "seeds": len(group)}
        entry["capability"] = mean_and_error([row["capability"] for row in group])
        for name in ("base", *OBJECTIVES):
            entry[name] = mean_and_error([row[name][how] for row in group])
        for name in OBJECTIVES:
            entry[f"gain of {name}"] = mean_and_error([row[name][how] - row["NLL"][how] for row in group])
        summary.append(entry)
    return summary


def as_table(summary: list[dict[str, Any]], how: str) -> str:
    """The means in Markdown, with standard errors."""
    names = ("capability", "base", *OBJECTIVES)
    lines = [f"Held-out exact match, {how} answers:\n", "| pre-training steps | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for entry in summary:
        cells = " | ".join(f"{entry[name][0]:.3f} ± {entry[name][1]:.3f}" for name in names)
        lines.append(f"| {entry['pretraining']} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(summaries: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Gain over NLL against capability, with standard errors over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (how, summary) in zip(figure.subplots(1, 2, sharex=True), summaries.items(), strict=True):
        axes.axhline(0, color="0.6", linestyle="--", label="NLL")
        for name in list(OBJECTIVES)[1:]:
            x = [entry["capability"][0] for entry in summary]
            gains = [entry[f"gain of {name}"] for entry in summary]
            axes.errorbar(x, [g for g, _ in gains], yerr=[e for _, e in gains], marker="o", capsize=3, label=name)
        axes.set(xlabel="capability: mean p of the demonstrations before fine-tuning")
        axes.set(ylabel="gain in held-out exact match over NLL", title=f"{how} answers")
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/continuum"))
    parser.add_argument("--large", action="store_true", help="the larger setup, on a GPU")
    options = parser.parse_args()
    setup = LARGE if options.large else Setup()
    options.output.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        rows = [row for rows in pool.starmap(run_seed, [(s, setup) for s in range(options.seeds)], 1) for row in rows]
    summaries = {how: summarize(rows, how) for how in ("greedy", "sampled")}
    results = {"setup": asdict(setup), "objectives": OBJECTIVES, "rows": rows, "summaries": summaries}
    (options.output / "continuum.json").write_text(json.dumps(results, indent=1) + "\n")
    table = "\n".join(as_table(summary, how) for how, summary in summaries.items())
    (options.output / "continuum.md").write_text(table)
    plot(summaries, options.output / "continuum.png")
    print(table)


if __name__ == "__main__":
    main()
