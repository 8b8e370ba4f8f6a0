"""The base-model barrier in GRPO: outcome against process rewards, on problems that the base model never solves.

    python examples/reachability_grpo.py [--seeds 3] [--output runs/reachability_grpo] [--large]

A small transformer is trained to copy words from text in which most letters slip to the next one of the alphabet, so
that a step (a letter) is right with probability 0.4 and a long word next to never. The same problem with all but the
last few letters given as a hint is in reach. GRPO then trains on whole words: with a reward for the whole answer, with
the plugin `process-reward`, which rewards each right letter after right ones (arXiv 2603.06957), and with the outcome's
reward on hints of all lengths. All arms have the same base model, number of rollouts and settings.

Written: results.json, report.md and plots. "Solved" is the mean probability of the right answer on held-out words: the
expected share that answers sampled at temperature 1 solve. `--large` is for a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
ARMS = ("outcome", "process", "outcome, with hints")
PROCESS = {"name": "process-reward", "split": "token", "solution": "answer"}
ALPHABET = "abcdefgh"


@dataclass(frozen=True)
class Setup:
    """Sizes of one experiment."""

    letters: int = 16
    slip: float = 0.6  # share of the letters that are wrong in the base model's training text
    in_reach: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # letters left to copy in the problems in reach
    hidden: int = 64
    layers: int = 2
    base_rows: int = 8000
    base_steps: int = 250
    base_rate: float = 3e-3
    prompts: int = 256
    held_out: int = 48  # held-out words, with hints of every length
    steps: int = 100
    batch_size: int = 64
    num_generations: int = 8
    learning_rate: float = 1e-3
    evaluate_every: int = 10
    probed: int = 32  # training prompts that the probe looks at
    most_rollouts: int = 1024  # of each of them
    use_cpu: bool = True


LARGE = Setup(
    letters=48, in_reach=tuple(range(1, 9)), hidden=256, layers=4, base_rows=200_000, base_steps=3000, base_rate=1e-3,
    prompts=4096, held_out=256, steps=400, batch_size=512, num_generations=16, learning_rate=3e-4,
    most_rollouts=8192, use_cpu=False,
)  # fmt: skip


def problems(setup: Setup, left: int, size: int, seed: int, split: Any = "train") -> list[Row]:
    """Words to copy, the first letters given but for the last `left`; with `prompt`, `completion` and `answer`."""
    from trl_ext.testing import Copy

    rows = Copy(setup.letters, ALPHABET).dataset(size, split=split, seed=seed)
    given = setup.letters - left
    pairs = [(row["prompt"] + row["answer"][:given], row["answer"][given:]) for row in rows]
    return [{"prompt": prompt, "completion": answer, "answer": answer} for prompt, answer in pairs]


def common(setup: Setup, seed: int) -> dict[str, Any]:
    """Settings of both trainers."""
    return {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "bf16": not setup.use_cpu,
        "use_cpu": setup.use_cpu,
        "activation_checkpointing": False,
        "seed": seed,
    }


def train_base(setup: Setup, seed: int, folder: Path) -> str:
    """Supervised training on words with slips."""
    from datasets import Dataset

    from trl_ext import SFTConfig, SFTTrainer
    from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

    rng = random.Random(seed)
    follows = dict(zip(ALPHABET, ALPHABET[1:] + ALPHABET[0], strict=True))
    rows = problems(setup, setup.letters, setup.base_rows, seed)
    for row in rows:
        row["completion"] = "".join(follows[c] if rng.random() < setup.slip else c for c in row["answer"])
    trainer = SFTTrainer(
        model=tiny_llama(hidden=setup.hidden, layers=setup.layers, seed=seed),
        args=SFTConfig(
            str(folder / "sft"),
            max_steps=setup.base_steps,
            per_device_train_batch_size=64,
            learning_rate=setup.base_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            **common(setup, seed),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return save_model(trainer.model, tiny_tokenizer(), folder / "base")


def likelihoods(model: str, rows: Sequence[Row]) -> np.ndarray:
    """(rows,) probability of the right answer at temperature 1, by teacher forcing."""
    from trl_ext_probing.encoding import Encoded, drawn_ids, prompt_ids
    from trl_ext_probing.models import load_model
    from trl_ext_probing.scoring import Scorer

    loaded, tokenizer = load_model(model, "float32")
    heads = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    answers = [drawn_ids(tokenizer, row["prompt"], row["answer"], [tokenizer.eos_token_id]) for row in rows]
    examples = [Encoded(head + answer, len(head)) for head, answer in zip(heads, answers, strict=True)]
    return np.array([float(np.exp(scores.log_probs.sum(dtype=float))) for scores in Scorer(loaded).score(examples)])


def train_arm(
    setup: Setup, seed: int, base: str, arm: str, test: Mapping[str, Sequence[Row]], folder: Path
) -> list[dict[str, float]]:
    """GRPO from the base model; the share solved of each test set on the way."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl_ext_probing.answers import exact_text

    from trl_ext import GRPOConfig, GRPOTrainer
    from trl_ext.testing import save_model, tiny_tokenizer

    curve: list[dict[str, float]] = []

    class Evaluate(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % setup.evaluate_every == 0:
                path = save_model(model, tiny_tokenizer(), folder / "current")
                curve.append(
                    {"step": state.global_step} | {k: float(likelihoods(path, v).mean()) for k, v in test.items()}
                )

        on_train_begin = on_step_end

    rows = problems(setup, setup.letters, setup.prompts, 1000 + seed)
    if "hints" in arm:
        # A hint for each, from all but one letter to none: as many prompts as without.
        rows = [problems(setup, 1 + i % setup.letters, setup.prompts, 1000 + seed)[i] for i in range(setup.prompts)]
    GRPOTrainer(
        model=base,
        reward_funcs=exact_text,
        args=GRPOConfig(
            str(folder / "grpo"),
            plugins=[PROCESS] if arm == "process" else [],
            max_steps=setup.steps,
            per_device_train_batch_size=setup.batch_size,
            num_generations=setup.num_generations,
            max_completion_length=setup.letters + 1,
            learning_rate=setup.learning_rate,
            lr_scheduler_type="constant",
            **common(setup, seed),
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("completion"),
        callbacks=[Evaluate()],
    ).train()
    return curve


def probe(setup: Setup, model: str, rows: Sequence[Row], folder: Path, **settings: Any) -> dict[str, Any]:
    """What `trl-ext probe reachability` finds; the folder keeps it."""
    from trl_ext_probing.commands import reachability

    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"num_generations": setup.num_generations, "batch_size": 512, "max_completion_length": setup.letters + 1}
    plan["epochs"] = setup.steps * setup.batch_size / setup.num_generations / setup.prompts
    named = {"model": [model], "dataset": str(data), "reward": ["trl_ext_probing.answers:exact_text"], "output": folder}
    reachability(**named, dtype="float32", **plan, **settings)
    (summary,) = json.loads((folder / "results.json").read_text())["models"]
    with (folder / "rows.csv").open() as file:
        successes = sum(int(record["successes"]) for record in csv.DictReader(file))
    return {"rollouts": summary["rollouts"], "successes": successes, "routes": summary["routes"]}


def run_seed(setup: Setup, seed: int, output: Path) -> dict[str, Any]:
    """Everything for one seed: base model, probe, and the arms."""
    start = time.perf_counter()
    hinted = [row for n in setup.in_reach for row in problems(setup, n, setup.held_out, seed, "held_out")]
    test = {"whole words": problems(setup, setup.letters, setup.held_out, seed, "held_out"), "in reach": hinted}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = train_base(setup, seed, folder)
        train = problems(setup, setup.letters, setup.prompts, 1000 + seed)[: setup.probed]
        probed = probe(setup, base, train, folder / "train", seed=seed, max_rollouts=setup.most_rollouts)
        result = {
            "seed": seed,
            "probe of whole words": probed,
            "curves": {arm: train_arm(setup, seed, base, arm, test, folder) for arm in ARMS},
        }
        shutil.copy(folder / "train" / "plot.png", output / f"seed{seed}-reachability.png")
    ends = ", ".join(f"{arm} {curve[-1]['whole words']:.3g}" for arm, curve in result["curves"].items())
    print(f"seed {seed}: whole words {ends} ({time.perf_counter() - start:.0f} s)", flush=True)
    return result


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{np.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def report(setup: Setup, results: Sequence[Mapping[str, Any]]) -> str:
    """The tables in Markdown."""
    drawn, solved = (sum(r["probe of whole words"][k] for r in results) for k in ("rollouts", "successes"))
    routes = [r["probe of whole words"]["routes"] for r in results]
    lines = [
        f"{len(results)} seeds: mean [least, most].",
        "",
        f"Probe of whole words before training: {solved:,} of {drawn:,} rollouts solved; routes: "
        + ", ".join(f"{route} {sum(r[route] for r in routes)}" for route in routes[0] if any(r[route] for r in routes)),
        "",
        f"Share solved after {setup.steps} steps of GRPO:",
        "",
        "| reward | whole words: before | after | in reach: before | after |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        ends = [[r["curves"][arm][i][name] for r in results] for name in ("whole words", "in reach") for i in (0, -1)]
        lines.append(f"| {arm} | " + " | ".join(map(spread, ends)) + " |")
    return "\n".join([*lines, ""])


def draw(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    """The training curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("whole words", "in reach"), strict=True):
        for arm in ARMS:
            steps = [point["step"] for point in results[0]["curves"][arm]]
            values = np.array([[point[name] for point in r["curves"][arm]] for r in results])
            (line,) = axis.plot(steps, values.mean(0), label=arm)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xlabel="step of GRPO", ylabel="share solved", title=f"Held-out: {name}")
        axis.legend(title=f"{len(results)} seeds: mean and range")
    figure.savefig(output / "training.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/reachability_grpo"))
    parser.add_argument("--large", action="store_true", help="the larger setup, on a GPU")
    options = parser.parse_args()
    setup = LARGE if options.large else Setup()
    quiet(setup)
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        results.append(run_seed(setup, seed, options.output))
        content = {"setup": asdict(setup), "results": results}
        (options.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.output / "report.md").write_text(report(setup, results))
        draw(results, options.output)
    print((options.output / "report.md").read_text())


def quiet(setup: Setup) -> None:
    """Less output, and one thread on a CPU."""
    import datasets
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if setup.use_cpu:
        torch.set_num_threads(1)


if __name__ == "__main__":
    main()
