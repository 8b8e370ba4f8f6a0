"""`trl-ext probe passk`: pass@k of a model on a data set, sampled in batches, resumed by appending."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_ext.data import refuse_missing_columns
from trl_ext_mixing.estimators import Estimate, mean_with_interval, pass_at_k
from trl_ext_mixing.sampling import RewardFunction, batches, complete, load_model, load_reward


@dataclass(frozen=True)
class Settings:
    """What decides the samples: a file of samples belongs to one of these."""

    model: str
    dataset: str
    reward: str
    split: str = "train"
    dataset_name: str | None = None
    columns: str | None = None
    limit: int | None = None
    n: int = 32
    temperature: float = 0.6
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64
    solved_at: float = 1.0
    dtype: str = "auto"
    seed: int = 0


def passk(
    model: Annotated[str, typer.Option(help="Model: a path, an adapter's path, or a hub id.")],
    dataset: Annotated[
        str, typer.Option(help="Problems: a .jsonl, .json, .csv or .parquet file, or a hub id, with a column `prompt`.")
    ],
    reward: Annotated[
        str, typer.Option(help="Reward function in TRL's form: package.module.function, or one of TRL's by name.")
    ],
    output: Annotated[Path, typer.Option(help="File of the samples; the results go beside it.")] = Path("passk.jsonl"),
    n: Annotated[int, typer.Option(help="Samples per problem.", min=1)] = 32,
    k: Annotated[str, typer.Option(help="Values of k, with commas; none above n.")] = "1,8,32",
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.", min=0.0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion in tokens.", min=1)] = 512,
    solved_at: Annotated[float, typer.Option(help="Reward from which a sample counts as correct.")] = 1.0,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    columns: Annotated[str | None, typer.Option(help="Renaming of columns: question=prompt.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first problems only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Completions generated at a time.", min=1)] = 64,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """pass@k on problems, unbiased, with confidence intervals; run it again to go on where it was interrupted."""
    from rich.console import Console
    from rich.progress import Progress

    ks = read_ks(k, n)
    settings = Settings(
        model, dataset, reward, split, dataset_name, columns, limit, n, temperature, top_p, max_new_tokens, batch_size,
        solved_at, dtype, seed,
    )  # fmt: skip
    rows = load_rows(settings)
    with Progress() as bar:
        task = bar.add_task("samples", total=len(rows) * n)
        for done in sample(settings, rows, output):
            bar.update(task, completed=done)
    results = estimate(output, ks, confidence)
    report = {
        "settings": asdict(settings),
        "confidence": confidence,
        "pass@k": {x: asdict(e) for x, e in results.items()},
    }
    output.with_suffix(".summary.json").write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    for x, e in results.items():
        console.print(
            f"pass@{x}: {100 * e.mean:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}] ({e.problems} problems, n={n})",
            highlight=False,
        )


def read_ks(text: str, n: int) -> list[int]:
    """The values of k, ascending.

    Raises:
        ValueError: not whole numbers from 1 to n.
    """
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--k {text!r} is not a list of whole numbers such as 1,8,32") from None
    if ks[0] < 1 or ks[-1] > n:
        raise ValueError(f"--k {text!r} with --n {n}: every k is in [1, n]; raise --n or lower --k")
    return ks


def load_rows(settings: Settings) -> list[dict[str, Any]]:
    """The problems.

    Raises:
        ValueError: none, or without a column `prompt`.
    """
    from trl_ext.data import load_dataset_spec, parse_columns

    spec = {
        "path": settings.dataset,
        "name": settings.dataset_name,
        "split": settings.split,
        "columns": parse_columns(settings.columns, "--columns"),
    }
    rows = list(load_dataset_spec(spec))[: settings.limit]
    if not rows:
        raise ValueError(f"{settings.dataset} has no problems")
    if "prompt" not in rows[0]:
        raise ValueError(
            f"{settings.dataset} has no column 'prompt' (there are {', '.join(rows[0])}); "
            f"rename one: --columns {next(iter(rows[0]))}=prompt"
        )
    return rows


def sample(
    settings: Settings,
    rows: Sequence[dict[str, Any]],
    output: Path,
    *,
    loaded: tuple[Any, Any] | None = None,
    reward: RewardFunction | None = None,
) -> Iterator[int]:
    """Draw and judge the samples that the file does not hold yet, a batch at a time.

    The file starts with the settings, then has a line a sample. Each batch has a seed of its own, so an interrupted run
    ends with the samples of an uninterrupted one.

    Args:
        settings: what to sample.
        rows: the problems; the reward function receives their columns.
        output: the file.
        loaded: model and tokenizer, where they are at hand.
        reward: the function, where it is at hand.

    Yields:
        Number of samples in the file.

    Raises:
        ValueError: the file holds samples of other settings.
    """
    held = read_samples(output, settings) if output.exists() else set()
    total = len(rows) * settings.n
    yield len(held)
    if len(held) == total:
        return
    reward = reward or load_reward(settings.reward)
    refuse_missing_columns(reward, rows[0], settings.reward)
    model, tokenizer = loaded or load_model(settings.model, settings.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        if file.tell() == 0:
            file.write(json.dumps({"settings": asdict(settings)}) + "\n")
        for number, pairs in batches(len(rows), settings.n, settings.batch_size):
            if held.issuperset(pairs):
                continue
            completions = complete(
                model,
                tokenizer,
                [rows[i]["prompt"] for i, _ in pairs],
                seed=settings.seed + number,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens,
            )
            rewards = judge(reward, [rows[i] for i, _ in pairs], completions)
            lines = [
                {
                    "problem": i,
                    "sample": j,
                    "reward": value,
                    "solved": value is not None and value >= settings.solved_at,
                }
                | {"completion": completion}
                for (i, j), (completion, _), value in zip(pairs, completions, rewards, strict=True)
                if (i, j) not in held
            ]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            held.update(pairs)
            yield len(held)


def judge(
    reward: RewardFunction, rows: Sequence[dict[str, Any]], completions: Sequence[tuple[Any, list[int]]]
) -> list[float | None]:
    """Call a reward function as TRL does: prompts, completions, token ids and the other columns, as lists.

    Raises:
        ValueError: it gives another number of rewards.
    """
    columns = {
        key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion", "completion_ids")
    }
    values = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[completion for completion, _ in completions],
        completion_ids=[ids for _, ids in completions],
        **columns,
    )
    if len(values) != len(rows):
        raise ValueError(f"the reward function gave {len(values)} rewards for {len(rows)} completions")
    return [None if value is None else float(value) for value in values]


def read_samples(output: Path, settings: Settings) -> set[tuple[int, int]]:
    """The (problem, sample) pairs of a file, whose last line is cut off if it was not written to its end.

    Raises:
        ValueError: samples of other settings.
    """
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0].get("settings") != asdict(settings):
        raise ValueError(f"{output} holds samples of other settings; choose another --output, or delete it")
    return {(line["problem"], line["sample"]) for line in lines[1:]}


def estimate(output: Path, ks: Sequence[int], confidence: float = 0.95) -> dict[int, Estimate]:
    """k to pass@k over the problems of a file of samples."""
    lines = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    drawn: dict[int, list[bool]] = {}
    for line in lines:
        drawn.setdefault(line["problem"], []).append(line["solved"])
    return {k: mean_with_interval([pass_at_k(len(s), sum(s), k) for s in drawn.values()], confidence) for k in ks}
