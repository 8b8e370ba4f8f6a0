"""16 trusted samples and a general mixture of which a known share is relevant: who learns the target task?

    python examples/data_regularization.py                  # CPU minutes: six methods, five seeds, synthetic tasks
    python examples/data_regularization.py --gsm8k DIR      # general: gsm8k; target: 16 of its percentage problems

The target task is to copy letters. A quarter of the general samples are of that task; a quarter answer its prompts with
the letters reversed, which works against it; half are sums, which have nothing to do with it. For each seed a model
first learns from other samples of such a mixture, so that it knows the tasks and not which one is wanted. From there:
full training on the mixture, global and layer-wise selection, target only, and the projections onto the cone and the
hull (extensions, layer-wise).

Seeds are processes of one thread each. Every finished training is a line of `results.jsonl` in the output folder, and
the same command goes on where an interrupted one stopped. Written beside it: `held_out_loss.png`, the held-out target
loss over training, and `table.md`. Relevant among kept: of what a method keeps (samples x layers), the share that
belongs to the target task; a random rule gives the base rate. Relevant weight is the same by weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl_ext_data_regularization.data_regularization import DataRegularization
from trl_ext_data_regularization.diagnostics import sample_id

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import Addition, Copy, tiny_llama, tiny_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "full": {"rule": "full"},
    "global": {"scope": "global"},
    "layer-wise": {},
    "target-only": {"rule": "target"},
    "cone": {"rule": "cone"},
    "hull": {"rule": "hull"},
}
TARGET_SAMPLES = 16
SETTINGS: dict[str, tuple[Any, Any]] = {  # of the synthetic tasks, and of gsm8k
    "general": (800, 800),
    "target_batch": (4, 4),
    "steps": (400, 60),
    "rate": (3e-3, 1e-3),
    "base_steps": (150, 150),
    "base_rate": (5e-3, 5e-3),
    "base_batch": (32, 16),
    "hidden": (32, 64),
    "max_length": (64, 512),
}
Rows = list[dict[str, Any]]

# -- data ------------------------------------------------------------------------------------------------------------


def synthetic(seed: int, size: int) -> tuple[Rows, Rows, Rows, Rows]:
    """General mixture, target samples, held-out samples of the target task, and another mixture to start from."""
    task = Copy(length=4)

    def rows(data: Any, relevant: bool, backwards: bool = False) -> Rows:
        turn = -1 if backwards else 1
        return [{"prompt": r["prompt"], "completion": r["completion"][::turn], "relevant": relevant} for r in data]

    def mixture(seed: int, size: int) -> Rows:
        quarter = size // 4
        return [
            *rows(task.dataset(quarter, seed=seed + 2), True),
            *rows(task.dataset(quarter, seed=seed + 1), False, backwards=True),
            *rows(Addition(digits=2).dataset(size - 2 * quarter, seed=seed + 3), False),
        ]

    target = rows(task.dataset(TARGET_SAMPLES, seed=1000 * seed + 4), True)
    held_out = rows(task.dataset(128, split="held_out", seed=seed), True)
    return mixture(1000 * seed, size), target, held_out, mixture(1000 * seed + 500, 5 * size)


def gsm8k(folder: Path, seed: int, size: int) -> tuple[Rows, Rows, Rows, Rows]:
    """The same from gsm8k: problems with a percentage are relevant, 16 of them are the target. No sample is in two."""

    def read(name: str) -> Rows:
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
    rest = [row for row in train if row not in target]
    return rest[:size], target, test[:64], rest[size : 3 * size]


# -- training --------------------------------------------------------------------------------------------------------


def arguments(folder: str, seed: int, options: argparse.Namespace, **more: Any) -> Any:
    """What the trainings have in common."""
    return SFTConfig(
        folder,
        max_length=options.max_length,
        bf16=options.bf16,
        use_cpu=options.device == "cpu",
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        **more,
    )


def pretrain(seed: int, rows: Rows, options: argparse.Namespace) -> Any:
    """A tiny model that has seen a mixture like the general data: it knows the tasks, and not which one is wanted."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), hidden=options.hidden, layers=2, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        own = {"per_device_train_batch_size": options.base_batch, "learning_rate": options.base_rate}
        args = arguments(folder, seed, options, max_steps=options.base_steps, **own)
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def run(name: str, seed: int, data: tuple[Rows, Rows, Rows], start: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One training: the held-out target loss by step, and what share of the kept was relevant."""
    general, target, held_out = (Dataset.from_list(rows) for rows in data)
    plugin = DataRegularization(table=True, stream_batch_size=options.target_batch, **METHODS[name])
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            folder,
            seed,
            options,
            max_steps=options.steps,
            logging_steps=options.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=64,
            learning_rate=options.rate,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=max(options.steps // options.evaluations, 1),
            eval_on_start=True,
        )
        trainer = SFTTrainer(
            options.model or copy.deepcopy(start),
            args=args,
            train_dataset=general,
            eval_dataset=held_out,
            processing_class=None if options.model else tiny_tokenizer(),
            plugins=[plugin],
            streams={"target": target},
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
    relevant = {sample_id(row["input_ids"]) for row in trainer.train_dataset if row["relevant"]}
    seen = plugin.recorder.seen
    shares: dict[str, float | None] = {}
    for what in ("kept", "weight"):
        by_sample = {key: getattr(one, what) for key, one in seen.items()}
        total = sum(by_sample.values())
        ours = sum(x for key, x in by_sample.items() if key in relevant)
        shares[f"relevant_{what}"] = ours / total if total else None
    curve = [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    base_rate = sum(row["relevant"] for row in data[0]) / len(data[0])
    seconds = time.process_time() - began
    return {"method": name, "seed": seed, "curve": curve, **shares, "base_rate": base_rate, "seconds": seconds}


def run_seed(seed: int, methods: list[str], journal: Path, options: argparse.Namespace) -> int:
    """Train the methods from one start, and note each in the journal."""
    torch.set_num_threads(1)
    disable_progress_bars()
    disable_progress_bar()
    size = options.general
    *data, others = gsm8k(options.gsm8k, seed, size) if options.gsm8k else synthetic(seed, size)
    start = None if options.model else pretrain(seed, others, options)
    parent = multiprocessing.parent_process()
    for name in methods:
        if parent is not None and not parent.is_alive():
            return seed  # whoever started this is gone, and may be starting again
        line = json.dumps(run(name, seed, (data[0], data[1], data[2]), start, options))
        with journal.open("a") as file:
            file.write(line + "\n")
    return seed


# -- results ---------------------------------------------------------------------------------------------------------


def read_journal(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings done so far; a new journal begins with the settings.

    Raises:
        SystemExit: the journal is of other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n")
    first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    if first["settings"] != settings:
        raise SystemExit(f"{path} holds results of other settings: {first['settings']}; give another --output")
    return lines


def table(results: list[dict[str, Any]]) -> str:
    """A line per method, mean and standard deviation over seeds."""
    full = {r["seed"]: r["curve"][-1][1] for r in results if r["method"] == "full"}
    lines = ["| method | final loss | lowest loss | final below full's | relevant among kept | relevant weight |"]
    lines.append("|---" * 6 + "|")
    for name in [name for name in METHODS if any(r["method"] == name for r in results)]:
        mine = [r for r in results if r["method"] == name]
        paired = [r["curve"][-1][1] < full[r["seed"]] for r in mine if r["seed"] in full]
        cells = [
            _spread([r["curve"][-1][1] for r in mine]),
            _spread([min(loss for _, loss in r["curve"]) for r in mine]),
            "" if name == "full" else f"{sum(paired)} of {len(paired)} seeds",
            *(_spread([r[key] for r in mine if r[key] is not None]) for key in ("relevant_kept", "relevant_weight")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    base_rate = _spread([r["base_rate"] for r in results if r["method"] == results[0]["method"]])
    return "\n".join(lines) + f"\n\nBase rate of relevant samples: {base_rate}\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "none kept"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The curves: mean over seeds, with the range between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in [name for name in METHODS if any(r["method"] == name for r in results)]:
        curves = [r["curve"] for r in results if r["method"] == name]
        steps = [step for step, _ in curves[0]]
        losses = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        (line,) = axes.plot(steps, [statistics.mean(at) for at in losses], label=name)
        low, high = [min(at) for at in losses], [max(at) for at in losses]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes.set(yscale="log", xlabel="optimiser step", ylabel="held-out target loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="folder with gsm8k's train.jsonl and test.jsonl")
    parser.add_argument("--model", help="a model id or path in place of the tiny model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each on one thread")
    for name, (synthetic_tasks, with_gsm8k) in SETTINGS.items():
        text = f"default {synthetic_tasks}, or {with_gsm8k} with --gsm8k"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(synthetic_tasks), help=text)
    parser.add_argument("--evaluations", type=int, default=20, help="of the held-out loss, during a training")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/data_regularization"))
    options = parser.parse_args()
    for name, values in SETTINGS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[bool(options.gsm8k)])
    journal = options.output / "results.jsonl"
    apart = ("output", "jobs", "seeds", "methods")  # which may differ between two calls that share a journal
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in apart}
    done = {(r["method"], r["seed"]) for r in read_journal(journal, settings)}
    left = {seed: [name for name in options.methods if (name, seed) not in done] for seed in range(options.seeds)}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        tasks = [(seed, names, journal, options) for seed, names in left.items() if names]
        pool.starmap(run_seed, tasks, 1)
    results = read_journal(journal, settings)
    (options.output / "table.md").write_text(table(results))
    plot(results, options.output / "held_out_loss.png")
    print(table(results))


if __name__ == "__main__":
    main()
