"""RL, SFT, SFT then RL, and both in one step, from checkpoints along a short pre-training (after arXiv:2606.04272).

    python examples/rl_excursions.py            # CPU, tiny models
    python examples/rl_excursions.py --gpu      # one GPU: a larger model, twice the problems and larger batches

A model is pre-trained on general text (copying letters) with a share of worked chains of modular arithmetic. From its
checkpoints each recipe trains on the same few problems, with one solution each. Reported on held-out problems, means
over seeds: pass@1, pass@8 and pass@32 (unbiased, T = 0.6), and the change of the negative log-likelihood of the general
text. The paper's setting is a 1B model on GSM8K; what a tiny model shows need not be what that one does.

Results go to `runs/rl_excursions/cpu` (or `gpu`) line by line. The same command goes on where it was interrupted, and
with more `--seeds` adds to what is there; `--seeds 0` only writes the table and the plot of the lines so far.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from trl_ext_probing.encoding import encode
from trl_ext_probing.engines import engine
from trl_ext_probing.passk.estimator import pass_at_k
from trl_ext_probing.scoring import Scorer

from trl_ext import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_ext.testing import Copy, ModularChain, tiny_llama, tiny_tokenizer

# Batches of SFT and of RL, in multiples of `Size.steps`. `parallel` takes one of each in every step.
RECIPES = {
    "base": (0.0, 0.0),
    "SFT": (1.0, 0.0),
    "RL": (0.0, 1.0),
    "SFT, then RL (half of each)": (0.5, 0.5),
    "SFT, then RL": (1.0, 1.0),
    "parallel": (1.0, 1.0),
}
KS = (1, 8, 32)
MEASURES = ("pass@1", "pass@8", "pass@32", "drift")
Line = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    hidden: int
    layers: int
    chain: int  # operations of a problem
    base_rate: float  # learning rate of the pre-training
    checkpoints: tuple[int, ...]  # steps of pre-training at which the recipes start
    batch: int  # texts, solutions or completions of a step
    problems: int  # for training, with one solution each
    steps: int
    held_out: int
    generations: int
    learning_rate: float


CPU = Size(64, 2, 3, 2e-3, (400, 800), 64, 64, 200, 128, 8, 2e-4)
GPU = Size(256, 4, 3, 1e-3, (400, 1000), 128, 128, 100, 256, 16, 2e-4)


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


def sft(run: Run, model: PreTrainedModel, data: Dataset, steps: int, **settings: Any) -> None:
    """Train the model on text or on prompts with completions."""
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(**run.settings(folder, steps) | settings)
        SFTTrainer(model, args=config, train_dataset=data, processing_class=tiny_tokenizer()).train()


def rl(run: Run, model: PreTrainedModel, steps: int, parallel: bool = False) -> None:
    """Train the model with GRPO on the problems, with their solutions as the SFT stream where `parallel`."""
    data = run.problems()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **run.settings(folder, steps),
            num_generations=run.size.generations,
            max_completion_length=2 * run.size.chain + 2,
            plugins=[f"parallel-averaging:batch_size={run.size.batch}"] if parallel else [],
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
    """Train the model by one of `RECIPES`."""
    sft_steps, rl_steps = batches(recipe, run.size)
    if sft_steps and recipe != "parallel":
        sft(run, model, run.problems(), sft_steps)
    if rl_steps:
        rl(run, model, rl_steps, parallel=recipe == "parallel")


def batches(recipe: str, size: Size) -> tuple[int, int]:
    """Batches of SFT and of RL that the recipe takes."""
    sft_share, rl_share = RECIPES[recipe]
    return round(sft_share * size.steps), round(rl_share * size.steps)


def pass_rates(run: Run, model: PreTrainedModel) -> dict[str, float]:
    """pass@k on held-out problems, from max(KS) samples of each."""
    rows = run.task.dataset(run.size.held_out, "prompt_only", split="held_out", seed=0)
    n = max(KS)
    sampler = engine("transformers", model=model.eval(), tokenizer=tiny_tokenizer(), batch_size=1024)
    solved = [0] * len(rows)
    for c in sampler.generate(list(rows["prompt"]), n=n, max_tokens=2 * run.size.chain + 2, temperature=0.6):
        solved[c.prompt_index] += int(run.task.reward([c.text], [rows[c.prompt_index]["answer"]])[0])
    return {f"pass@{k}": statistics.mean(pass_at_k(n, c, k) for c in solved) for k in KS}


def measure(run: Run, model: PreTrainedModel, base: PreTrainedModel) -> dict[str, float]:
    """pass@k, and the drift from the checkpoint that the recipe started at."""
    general = [encode(tiny_tokenizer(), row) for row in run.general(200, seed=7)]
    before, after = (Scorer(m).score(general) for m in (base, model))
    moved = sum(float(x.log_probs.sum() - y.log_probs.sum()) for x, y in zip(before, after, strict=True))
    return {**pass_rates(run, model), "drift": moved / sum(example.labels for example in general)}


def fresh(run: Run, weights: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """A model with these weights, or those of the seed."""
    model = tiny_llama(hidden=run.size.hidden, layers=run.size.layers, seed=run.seed)
    if weights:
        model.load_state_dict(weights)
    return model.to(run.device)


def pretrained(run: Run, folder: Path) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The checkpoints and their weights, from the folder where an earlier run has left them."""
    weights, done = None, 0
    for checkpoint in run.size.checkpoints:
        path = folder / f"seed{run.seed}_step{checkpoint}.safetensors"
        if not path.exists():
            model = fresh(run, weights)
            part = run.pretraining().select(range(done * run.size.batch, checkpoint * run.size.batch))
            sft(run, model, part, checkpoint - done, learning_rate=run.size.base_rate, lr_scheduler_type="constant")
            save_file(model.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)  # a name stands for a whole file
        weights, done = load_file(path), checkpoint
        yield checkpoint, weights


def excursions(run: Run, folder: Path) -> None:
    """All recipes from all checkpoints of one seed; a line of results each, but for those that are there already."""
    done = {(line["seed"], line["checkpoint"], line["recipe"]) for line in results(folder)}
    for checkpoint, weights in pretrained(run, folder):
        for recipe in RECIPES:
            if (run.seed, checkpoint, recipe) in done:
                continue
            began = time.perf_counter()
            apply(recipe, run, model := fresh(run, weights))
            line = {"seed": run.seed, "checkpoint": checkpoint, "recipe": recipe}
            line |= measure(run, model, fresh(run, weights)) | {"seconds": round(time.perf_counter() - began, 1)}
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            (folder / "table.md").write_text(table(results(folder), run.size))


def results(folder: Path) -> list[Line]:
    """The lines so far."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def found(lines: Sequence[Line], checkpoint: int, recipe: str) -> dict[int, Line]:
    """The lines of a recipe from a checkpoint, by seed."""
    return {x["seed"]: x for x in lines if (x["checkpoint"], x["recipe"]) == (checkpoint, recipe)}


def cell(name: str, values: Sequence[float], each: bool = False) -> str:
    """Mean ± standard error over seeds, pass@k in percent; with `each` the values of the seeds as well."""
    scale, form = (1, ".3f") if name == "drift" else (100, ".1f")
    form = "+" + form if each else form
    values = [value * scale for value in values]
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {format(statistics.stdev(values) / len(values) ** 0.5, form.lstrip('+'))}"
    return text + (f" ({', '.join(format(value, form) for value in values)})" if each else "")


def table(lines: Sequence[Line], size: Size) -> str:
    """The recipes with their batches, and what `parallel` has over each of them, paired by seed."""
    head = " | ".join(MEASURES)
    rows = [f"| checkpoint | recipe | SFT + RL batches | seeds | {head} |", "|---" * 8 + "|"]
    pairs = [f"| checkpoint | parallel minus | {head} |", "|---" * 6 + "|"]
    for checkpoint in sorted({line["checkpoint"] for line in lines}):
        best = found(lines, checkpoint, "parallel")
        for recipe in RECIPES:
            seeds = found(lines, checkpoint, recipe)
            if seeds:
                cells = [cell(name, [line[name] for line in seeds.values()]) for name in MEASURES]
                budget = "{} + {}".format(*batches(recipe, size))
                rows.append(f"| {checkpoint} | {recipe} | {budget} | {len(seeds)} | " + " | ".join(cells) + " |")
            both = [seed for seed in sorted(seeds) if seed in best]
            if both and recipe != "parallel":
                cells = [cell(name, [best[s][name] - seeds[s][name] for s in both], each=True) for name in MEASURES]
                pairs.append(f"| {checkpoint} | {recipe} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", *pairs]) + "\n"


def plot(lines: Sequence[Line], path: Path) -> None:
    """pass@1, pass@32 and drift against the checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), ("pass@1", "pass@32", "drift"), strict=True):
        for recipe in RECIPES:
            of = {c: found(lines, c, recipe) for c in sorted({line["checkpoint"] for line in lines})}
            means = {c: statistics.mean(x[name] for x in seeds.values()) for c, seeds in of.items() if seeds}
            axis.plot(list(means), list(means.values()), marker="o", label=recipe)
        axis.set_xlabel("pre-training steps")
        axis.set_title("change of general nll" if name == "drift" else name)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the size for one GPU")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... up to this many")
    parser.add_argument("--output", type=Path, default=Path("runs/rl_excursions"))
    options = parser.parse_args()
    if options.gpu and options.seeds and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device here; leave --gpu out for the size for a CPU")
    size, device = (GPU, "cuda") if options.gpu else (CPU, "cpu")
    (folder := options.output / ("gpu" if options.gpu else "cpu")).mkdir(parents=True, exist_ok=True)
    settings = folder / "size.json"
    if settings.exists() and json.loads(settings.read_text()) != json.loads(json.dumps(asdict(size))):
        parser.error(f"{folder} holds results of another size (size.json); name another --output, or delete it")
    settings.write_text(json.dumps(asdict(size)) + "\n")
    if not options.gpu:
        torch.set_num_threads(1)  # the tensors are too small for more
    for seed in range(options.seeds):
        excursions(Run(size, seed, device), folder)
    lines = results(folder)
    (folder / "table.md").write_text(table(lines, size))
    plot(lines, folder / "plot.png")
    print(table(lines, size))
    print(f"processor time: {time.process_time() / 60:.1f} minutes")


if __name__ == "__main__":
    main()
