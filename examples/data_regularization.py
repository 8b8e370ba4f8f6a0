"""16 trusted samples and a general mixture of which a known share is relevant: who learns the target task?

    python examples/data_regularization.py                       # CPU minutes: six methods, five seeds
    python examples/data_regularization.py --gsm8k DIR           # general: gsm8k; target: 16 of its percentage problems

The target task is to copy letters. A quarter of the general samples are of that task; a quarter answer its prompts with
the letters reversed, which works against it; half are sums, which have nothing to do with it. For each seed a model
first learns from other samples of such a mixture, so that it knows the tasks and not which one is wanted. From there:
full training on the mixture, global and layer-wise selection, target only, and the projections onto the cone and the
hull (extensions, layer-wise). Written: the held-out target loss over training and the share of the weight that falls on
relevant samples (a random rule gives the base rate), as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl_ext_data_regularization.diagnostics import sample_id
from trl_ext_data_regularization.plugin import DataRegularization

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import Addition, Copy, tiny_llama, tiny_tokenizer

TARGET_SAMPLES, RELEVANT_SHARE = 16, 0.25
METHODS: dict[str, dict[str, Any]] = {
    "full": {"rule": "full"},
    "global": {"scope": "global"},
    "layer-wise": {},
    "target-only": {"rule": "target"},
    "cone": {"rule": "cone"},
    "hull": {"rule": "hull"},
}


def rows(data: Dataset, relevant: bool) -> Dataset:
    """Prompt, completion and whether the sample belongs to the target task."""
    picked = data.select_columns(["prompt", "completion"])
    return picked.add_column("relevant", [relevant] * len(picked))


def synthetic(seed: int, size: int = 800) -> tuple[Dataset, Dataset, Dataset]:
    """General mixture, target samples and held-out samples of the target task."""
    task, quarter = Copy(length=4), size // 4
    against = task.dataset(quarter, seed=seed + 1).map(lambda row: {"completion": row["completion"][::-1]})
    parts = [
        rows(task.dataset(quarter, seed=seed + 2), True),
        rows(against, False),
        rows(Addition(digits=2).dataset(size - 2 * quarter, seed=seed + 3), False),
    ]
    target = rows(task.dataset(TARGET_SAMPLES, seed=seed + 4), True)
    return concatenate_datasets(parts), target, rows(task.dataset(128, split="held_out", seed=seed), True)


def gsm8k(folder: Path, seed: int, size: int = 800) -> tuple[Dataset, Dataset, Dataset]:
    """The same from gsm8k: problems with a percentage are relevant, 16 of them are the target."""

    def read(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        return [
            {
                "prompt": f"{line['question']}\n",
                "completion": line["answer"],
                "relevant": "%" in line["question"] or "percent" in line["question"],
            }
            for line in lines
        ]

    train, test = read("train.jsonl"), [row for row in read("test.jsonl") if row["relevant"]]
    random.Random(seed).shuffle(train)
    target = [row for row in train if row["relevant"]][:TARGET_SAMPLES]
    general = [row for row in train if row not in target][:size]
    return Dataset.from_list(general), Dataset.from_list(target), Dataset.from_list(test[:64])


def pretrain(seed: int, general: Dataset, options: argparse.Namespace) -> Any:
    """A tiny model that has seen a mixture like the general data: it knows the tasks, and not which one is wanted."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), hidden=options.hidden, layers=2, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model,
            args=SFTConfig(
                folder,
                max_steps=options.base_steps,
                per_device_train_batch_size=32,
                learning_rate=options.base_rate,
                save_strategy="no",
                logging_steps=options.base_steps,
                max_length=options.max_length,
                bf16=options.bf16,
                use_cpu=options.device == "cpu",
                activation_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=general,
            processing_class=tokenizer,
        ).train()
    return model


def run(
    name: str, seed: int, data: tuple[Dataset, Dataset, Dataset], start: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """One training: the held-out target loss by step, and the share of the weight on relevant samples."""
    general, target, held_out = data
    model = options.model or copy.deepcopy(start)
    plugin = DataRegularization(table=True, stream_batch_size=1, **METHODS[name])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=64,
                learning_rate=options.rate,
                lr_scheduler_type="constant",
                eval_strategy="steps",
                eval_steps=max(options.steps // 20, 1),
                save_strategy="no",
                logging_steps=options.steps,
                max_length=options.max_length,
                bf16=options.bf16,
                use_cpu=options.device == "cpu",
                activation_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=general,
            eval_dataset=held_out,
            processing_class=None if options.model else tiny_tokenizer(),
            plugins=[plugin],
            streams={"target": target},
        )
        trainer.train()
    curve = [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    prepared = trainer.train_dataset
    relevant = {sample_id(row["input_ids"]) for row in prepared if row["relevant"]}
    weight = {key: one.weight for key, one in plugin.recorder.seen.items()}
    total = sum(weight.values())
    share = sum(w for key, w in weight.items() if key in relevant) / total if total > 0 else None
    return {"method": name, "seed": seed, "curve": curve, "relevant_weight": share}


def summary(results: list[dict[str, Any]]) -> list[str]:
    """A line per method: final and lowest loss, and the share of relevant weight, mean and deviation over seeds."""
    lines = ["| method | final loss | lowest loss | relevant weight |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["method"] for r in results):
        mine = [r for r in results if r["method"] == name]
        shares = [r["relevant_weight"] for r in mine if r["relevant_weight"] is not None]
        cells = [
            _spread([r["curve"][-1][1] for r in mine]),
            _spread([min(loss for _, loss in r["curve"]) for r in mine]),
            _spread(shares) if shares else "no general data",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The curves: mean over seeds, with the range between them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(r["method"] for r in results):
        curves = [r["curve"] for r in results if r["method"] == name]
        steps = [step for step, _ in curves[0]]
        losses = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        (line,) = axes.plot(steps, [statistics.mean(at) for at in losses], label=name)
        axes.fill_between(
            steps, [min(at) for at in losses], [max(at) for at in losses], color=line.get_color(), alpha=0.15
        )
    axes.set_yscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("held-out target loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="folder with gsm8k's train.jsonl and test.jsonl")
    parser.add_argument("--model", help="a model id or path in place of the tiny model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--base-steps", type=int, default=600, help="steps that the tiny model's start is trained for")
    parser.add_argument("--base-rate", type=float, default=5e-3)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/data_regularization"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began, results, base_rates = time.time(), [], []
    for seed in range(options.seeds):
        data = gsm8k(options.gsm8k, seed) if options.gsm8k else synthetic(1000 * seed)
        base_rates.append(sum(data[0]["relevant"]) / len(data[0]))
        others = gsm8k(options.gsm8k, seed + 10**6) if options.gsm8k else synthetic(1000 * seed + 500, size=4000)
        start = None if options.model else pretrain(seed, others[0], options)
        results += [run(name, seed, data, start, options) for name in options.methods]
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        record = {"settings": settings, "base_rate": statistics.mean(base_rates), "results": results}
        (options.output / "results.json").write_text(json.dumps(record, indent=1))
    plot(results, options.output / "held_out_loss.png")
    print("\n".join(summary(results)))
    print(f"base rate of relevant samples: {statistics.mean(base_rates):.3f}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
