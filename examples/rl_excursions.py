"""RL, SFT, SFT then RL, and both in one step, from checkpoints along a short pre-training (after arXiv:2606.04272).

    python examples/rl_excursions.py            # CPU, tiny models
    python examples/rl_excursions.py --gpu      # larger model, longer chains, more steps

A model is pre-trained on general text (copying letters) with a share of worked chains of modular arithmetic. From its
checkpoints each recipe trains on the same few problems, with one solution each. Reported on held-out problems, means
over seeds: pass@1, pass@8 and pass@32 (unbiased, T = 0.6), and the change of the negative log-likelihood of the general
text. The paper's setting is a 1B model on GSM8K; what a tiny model shows need not be what that one does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel
from trl_ext_mixing.drift import compare, score
from trl_ext_mixing.estimators import pass_at_k
from trl_ext_mixing.sampling import complete

from trl_ext import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_ext.testing import Copy, ModularChain, tiny_llama, tiny_tokenizer

RECIPES = ("base", "SFT", "RL", "SFT, then RL", "parallel")
KS = (1, 8, 32)


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    hidden: int
    layers: int
    chain: int
    """Operations of a problem."""
    checkpoints: tuple[int, ...]
    """Steps of pre-training at which the recipes start."""
    batch: int
    problems: int
    """Training problems, with one solution each."""
    steps: int
    """Optimiser steps of each recipe; SFT then RL takes half of them for each."""
    held_out: int
    generations: int
    learning_rate: float


CPU = Size(64, 2, 3, (400, 800, 1200), 64, 256, 300, 64, 8, 2e-4)
GPU = Size(512, 8, 4, (500, 1000, 2000, 4000), 128, 512, 400, 256, 16, 1e-4)


@dataclass(frozen=True)
class Run:
    """Data and settings of one seed."""

    size: Size
    seed: int
    device: str

    @property
    def task(self) -> ModularChain:
        return ModularChain(steps=self.size.chain)

    def general(self, rows: int, seed: int) -> Dataset:
        return Copy().dataset(rows, "language_modeling", seed=seed).select_columns(["text"])

    def pretraining(self) -> Dataset:
        rows = self.size.batch * self.size.checkpoints[-1]
        worked = self.task.dataset(rows // 3, "language_modeling", seed=self.seed + 100).select_columns(["text"])
        return concatenate_datasets([self.general(rows - rows // 3, self.seed + 200), worked]).shuffle(self.seed)

    def problems(self) -> Dataset:
        return self.task.dataset(self.size.problems, "prompt_completion", seed=self.seed + 300)

    def settings(self, folder: str, steps: int) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": self.size.learning_rate,
            "per_device_train_batch_size": self.size.batch,
            "bf16": False,
            "use_cpu": self.device == "cpu",
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 20,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": self.seed,
        }


def sft(run: Run, model: PreTrainedModel, data: Dataset, steps: int, rate: float | None = None) -> None:
    """Train the model on text or on prompts with completions."""
    with tempfile.TemporaryDirectory() as folder:
        settings = run.settings(folder, steps) | {"lr_scheduler_type": "constant"}
        config = SFTConfig(**settings | ({"learning_rate": rate} if rate else {}))
        SFTTrainer(model, args=config, train_dataset=data, processing_class=tiny_tokenizer()).train()


def rl(run: Run, model: PreTrainedModel, steps: int, parallel: bool = False) -> None:
    """Train the model with GRPO on the problems, with their solutions as the SFT stream where `parallel`."""
    data = run.problems()
    plugin = {"name": "parallel-averaging", "batch_size": run.size.batch}
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **run.settings(folder, steps),
            lr_scheduler_type="constant",
            num_generations=run.size.generations,
            max_completion_length=2 * run.size.chain + 2,
            plugins=[plugin] if parallel else [],
        )
        GRPOTrainer(
            model,
            reward_funcs=[run.task.reward],
            args=config,
            train_dataset=data.remove_columns("completion"),
            processing_class=tiny_tokenizer(),
            streams={"sft": data} if parallel else None,
        ).train()


def apply(recipe: str, run: Run, model: PreTrainedModel) -> None:
    """Train the model by one of `RECIPES`; each takes the same number of optimiser steps."""
    steps = run.size.steps
    if recipe == "SFT":
        sft(run, model, run.problems(), steps)
    elif recipe == "RL":
        rl(run, model, steps)
    elif recipe == "SFT, then RL":
        sft(run, model, run.problems(), steps // 2)
        rl(run, model, steps - steps // 2)
    elif recipe == "parallel":
        rl(run, model, steps, parallel=True)


def pass_rates(run: Run, model: PreTrainedModel) -> dict[str, float]:
    """pass@k on held-out problems."""
    rows = run.task.dataset(run.size.held_out, "prompt_only", split="held_out", seed=0)
    prompts, answers = list(rows["prompt"]), list(rows["answer"])
    solved = [0] * len(prompts)
    n = max(KS)
    for draw in range(n):
        drawn = complete(
            model, tiny_tokenizer(), prompts, seed=draw, temperature=0.6, top_p=1.0,
            max_new_tokens=2 * run.size.chain + 2,
        )  # fmt: skip
        right = run.task.reward([text for text, _ in drawn], answers)
        solved = [s + int(r) for s, r in zip(solved, right, strict=True)]
    return {f"pass@{k}": statistics.mean(pass_at_k(n, c, k) for c in solved) for k in KS}


def measure(run: Run, recipe: str, model: PreTrainedModel, base: PreTrainedModel) -> dict[str, float]:
    """pass@k, and the drift from the checkpoint that the recipe started at."""
    model.eval()
    general = list(run.general(200, seed=7))
    before, after = (
        [s for batch in score(m, tiny_tokenizer(), general, batch_size=100) for s in batch] for m in (base, model)
    )
    return {**pass_rates(run, model), "drift": compare(before, after)["nll"].change}


def fresh(run: Run, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model with these weights."""
    model = tiny_llama(hidden=run.size.hidden, layers=run.size.layers)
    model.load_state_dict(weights)
    return model.to(run.device)


def excursions(run: Run, file: Any) -> None:
    """All recipes from all checkpoints of one seed; a line of results each."""
    model = tiny_llama(hidden=run.size.hidden, layers=run.size.layers, seed=run.seed).to(run.device)
    data, done = run.pretraining(), 0
    for checkpoint in run.size.checkpoints:
        part = data.select(range(done * run.size.batch, checkpoint * run.size.batch))
        sft(run, model, part, checkpoint - done, rate=2e-3 if run.device == "cpu" else 5e-4)
        done = checkpoint
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        base = fresh(run, weights).eval()
        for recipe in RECIPES:
            trained = fresh(run, weights)
            apply(recipe, run, trained)
            result = measure(run, recipe, trained, base)
            line = {"seed": run.seed, "checkpoint": checkpoint, "recipe": recipe, **result}
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
            file.write(json.dumps(line) + "\n")
            file.flush()


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, with the standard error of pass@32 and drift."""
    rows = ["| checkpoint | recipe | pass@1 | pass@8 | pass@32 | drift of general nll |", "|---|---|---|---|---|---|"]
    for checkpoint in sorted({line["checkpoint"] for line in lines}):
        for recipe in RECIPES:
            found = [line for line in lines if (line["checkpoint"], line["recipe"]) == (checkpoint, recipe)]
            cells = []
            for name in ("pass@1", "pass@8", "pass@32", "drift"):
                values = [line[name] for line in found]
                scale = 1 if name == "drift" else 100
                error = statistics.stdev(values) / len(values) ** 0.5 * scale if len(values) > 1 else float("nan")
                digits = 3 if name == "drift" else 1
                cells.append(f"{statistics.mean(values) * scale:.{digits}f} ± {error:.{digits}f}")
            rows.append(f"| {checkpoint} | {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """pass@1, pass@32 and drift against the checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5))
    checkpoints = sorted({line["checkpoint"] for line in lines})
    for axis, name in zip(axes, ("pass@1", "pass@32", "drift"), strict=True):
        for recipe in RECIPES:
            means = [
                statistics.mean(x[name] for x in lines if (x["checkpoint"], x["recipe"]) == (checkpoint, recipe))
                for checkpoint in checkpoints
            ]
            axis.plot(checkpoints, means, marker="o", label=recipe)
        axis.set_xlabel("pre-training steps")
        axis.set_title("change of general nll" if name == "drift" else name)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the size for one GPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/rl_excursions"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.gpu:
        torch.set_num_threads(1)  # the tensors are too small for more
    with (options.output / "results.jsonl").open("w") as file:
        for seed in range(options.seeds):
            excursions(Run(GPU if options.gpu else CPU, seed, "cuda" if options.gpu else "cpu"), file)
    lines = [json.loads(line) for line in (options.output / "results.jsonl").read_text().splitlines()]
    (options.output / "table.md").write_text(table(lines))
    plot(lines, options.output / "plot.png")
    print(table(lines))
    print(f"processor time: {time.process_time() / 60:.1f} minutes")


if __name__ == "__main__":
    main()
