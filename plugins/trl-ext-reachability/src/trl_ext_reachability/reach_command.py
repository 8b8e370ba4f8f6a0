"""`trl-ext probe reachability`: how often a base model solves prompts, and what training each is ready for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def reachability(
    model: Annotated[str, typer.Option(help="Base model: a path or hub id.")],
    dataset: Annotated[str, typer.Option(help="Prompts: a .jsonl, .json, .csv or .parquet file, or a hub id.")],
    reward: Annotated[str, typer.Option(help="Reward function of TRL's form: module:function or file.py:function.")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("reachability"),
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    columns: Annotated[
        str | None, typer.Option(help="Renaming: question=prompt,solution=completion; `completion` is a demonstration.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first prompts only.", min=1)] = None,
    success: Annotated[float, typer.Option(help="Reward from which a completion counts as correct.")] = 1.0,
    num_generations: Annotated[int, typer.Option(help="Group size of the planned GRPO run.", min=2)] = 8,
    epochs: Annotated[float, typer.Option(help="Epochs of the planned GRPO run.")] = 1.0,
    rollouts: Annotated[int, typer.Option(help="Rollouts of each prompt in the first round.", min=1)] = 8,
    max_rollouts: Annotated[
        int | None,
        typer.Option(help="Most rollouts of a prompt; by default as many as show that it is out of reach.", min=1),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the bounds of each success rate, over all rounds.")] = 0.95,
    max_completion_length: Annotated[int, typer.Option(help="Tokens of a completion, as in GRPOConfig.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling, as in GRPOConfig.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of sampling, as in GRPOConfig.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Of sampling, as in GRPOConfig; 0 for all tokens.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Completions drawn at once, and work lost by a kill.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the completions.")] = 0,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    check_against: Annotated[
        Path | None, typer.Option(help="Folder measured with another seed: predicted against observed there.")
    ] = None,
) -> None:
    """Measure how often a base model solves each prompt, and which training it is ready for; resumes when killed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from trl_ext_reachability import checking
    from trl_ext_reachability.measurement_settings import MeasurementSettings
    from trl_ext_reachability.reach_probe import measure

    settings = MeasurementSettings(
        model, dataset, reward, dataset_name, split, columns, limit, success, num_generations, epochs, rollouts,
        max_rollouts, confidence, max_completion_length, temperature, top_p, top_k, batch_size, seed, dtype,
    )  # fmt: skip
    if check_against is not None:
        checking.comparable(asdict(settings), check_against)  # now, not after the measurement
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        tasks: dict[str, int] = {}
        for name, done, total in measure(settings, output):
            if name not in tasks:
                tasks[name] = bar.add_task(name)
            bar.update(tasks[name], completed=done, total=total)  # type: ignore[arg-type]
    names = ["reachability.md"]
    if check_against is not None:
        checking.check_against(output, check_against)
        names.append("calibration.md")
    for name in names:
        Console().print((output / name).read_text(), markup=False, highlight=False, soft_wrap=True)
