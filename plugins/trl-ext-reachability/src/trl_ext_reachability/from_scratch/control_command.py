"""`trl-ext probe from-scratch`: a fine-tuning run from pre-trained and from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def from_scratch(
    config: Annotated[str, typer.Option(help="The run: a YAML as `trl-ext sft --config` takes it.")],
    eval_in: Annotated[
        str | None, typer.Option(help="Prompts like the training's: a data file or hub id; `completion` gives the nll.")
    ] = None,
    eval_out: Annotated[str | None, typer.Option(help="Prompts unlike the training's.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Data whose nll chooses learning rates; --eval-in by default.")
    ] = None,
    eval_split: Annotated[str, typer.Option(help="Split of these data sets.")] = "train",
    columns: Annotated[str | None, typer.Option(help="Renaming of their columns: question=prompt.")] = None,
    reward: Annotated[
        str, typer.Option(help="Score: a reward function of TRL's form, module:function or file.py:function.")
    ] = "trl_ext_reachability.answer_rewards:exact",
    floor: Annotated[str, typer.Option(help="Score without knowledge: majority, format, or a number.")] = "majority",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="A third arm: random weights with the pre-trained embeddings.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Trainings of each arm; at least 3.")] = 3,
    learning_rates: Annotated[str | None, typer.Option(help="Rates to search, for every arm: 1e-5,1e-4.")] = None,
    lr_multipliers: Annotated[
        str | None, typer.Option(help="Rates to search, as multiples of the YAML's; 0.3,1,3,10,30 by default.")
    ] = None,
    search_seeds: Annotated[int, typer.Option(help="Seeds of the search.")] = 1,
    search_share: Annotated[float, typer.Option(help="Share of the training that the search takes.")] = 1.0,
    points: Annotated[int, typer.Option(help="Evaluations on the way, the end included.")] = 5,
    ngram: Annotated[int, typer.Option(help="Words in a row that make a sample contaminated.")] = 13,
    samples: Annotated[int, typer.Option(help="Completions per prompt; 0 decodes greedily.", min=0)] = 0,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_completion_length: Annotated[int, typer.Option(help="Tokens of a completion.", min=1)] = 256,
    eval_batch_size: Annotated[int, typer.Option(help="Completions at a time.", min=1)] = 64,
    confidence: Annotated[float, typer.Option(help="Of the intervals over seeds.")] = 0.95,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("from-scratch"),
) -> None:
    """Fine-tune from pre-trained and from random weights, and tell what pre-training gave; resumes when killed."""
    import datasets
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from transformers.utils import logging

    from trl_ext_reachability.from_scratch.control import measure
    from trl_ext_reachability.from_scratch.control_settings import ControlSettings

    settings = ControlSettings(
        config=config,
        eval_in=eval_in,
        eval_out=eval_out,
        validation=validation,
        eval_split=eval_split,
        columns=columns,
        reward=reward,
        floor=floor,
        embeddings=embeddings,
        seeds=seeds,
        learning_rates=learning_rates,
        lr_multipliers=lr_multipliers,
        search_seeds=search_seeds,
        search_share=search_share,
        points=points,
        ngram=ngram,
        samples=samples,
        temperature=temperature,
        max_completion_length=max_completion_length,
        eval_batch_size=eval_batch_size,
        confidence=confidence,
    )
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    # Trainings write to standard output, which goes to their log meanwhile.
    console = Console(stderr=True)
    with Progress(
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        tasks: dict[str, int] = {}
        for name, done, total in measure(settings, output):
            if name not in tasks:
                tasks[name] = bar.add_task(name)
            bar.update(tasks[name], completed=done, total=total)  # type: ignore[arg-type]
    Console().print((output / "from_scratch.md").read_text(), markup=False, highlight=False, soft_wrap=True)
