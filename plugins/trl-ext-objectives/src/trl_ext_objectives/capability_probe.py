"""`trl-ext probe capability`: measure a base model's probabilities of a data set's response tokens.

Examples go through TRL's own preparation and collation, so that what is measured is what would be trained on. They come
in the data set's order, a chunk at a time; inside a chunk, batches hold examples of similar length. Each finished chunk
is a file in `OUTPUT/parts`, which is what an interrupted run resumes from; the results depend on the chunks alone.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trl_ext_objectives.capability import SHARE_ABOVE, Capability, Tally, recommend
from trl_ext_objectives.figures import draw_capability
from trl_ext_objectives.log_prob_cache import write_cache
from trl_ext_objectives.scoring import ROW, CapabilitySettings, ChunkScores, Scorer


def capability(
    model: Annotated[str, typer.Option(help="Base model: a path or hub id.")],
    dataset: Annotated[str, typer.Option(help="Training data: a .jsonl, .json, .csv or .parquet file, or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("capability"),
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    columns: Annotated[str | None, typer.Option(help="Renaming: question=prompt,answer=completion.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure the first examples only.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Truncation in tokens, as in SFTConfig.", min=2)] = 1024,
    completion_only: Annotated[
        bool | None, typer.Option(help="Measure completions only; by default where the data has prompts.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, padding included.", min=1)] = 16_384,
    chunk: Annotated[int, typer.Option(help="Examples between two points to resume from.", min=1)] = 512,
    log_probs: Annotated[
        Path | None, typer.Option(help="Also keep each token's log-probability here: a reference for objectives.")
    ] = None,
) -> None:
    """Measure how likely a base model finds a data set's responses, and recommend an objective."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    settings = CapabilitySettings(
        model=model,
        dataset=dataset,
        dataset_name=dataset_name,
        split=split,
        columns=columns,
        limit=limit,
        max_length=max_length,
        completion_only=completion_only,
        dtype=dtype,
        batch_tokens=batch_tokens,
        chunk=chunk,
        log_probs=log_probs is not None,
    )
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("examples", total=None)
        for done, total in measure(settings, output, log_probs):
            bar.update(task, completed=done, total=total)
    Console().print((output / "capability.md").read_text(), markup=False, highlight=False, soft_wrap=True)


def measure(
    settings: CapabilitySettings, output: Path, log_probs: Path | None = None
) -> Iterator[tuple[int, int | None]]:
    """Measure chunk by chunk, and write the results after the last one.

    Args:
        settings: what to measure.
        output: folder of the results: `capability.json`, `capability.md`, `examples.csv`, `capability.png`.
        log_probs: file for the cached log-probabilities (`trl_ext_objectives.log_prob_cache`).

    Yields:
        Examples done, and their number where it is known.

    Raises:
        ValueError: the folder holds another measurement, or there is nothing to measure.
    """
    parts = output / "parts"
    about = asdict(settings)
    done = _resume(parts, about) * settings.chunk
    rows = _load(settings)
    total = len(rows)
    yield min(done, total), total
    if done < total:
        with tempfile.TemporaryDirectory() as scratch:
            scorer = Scorer(settings, rows, done, Path(scratch))
            for index, chunk in itertools.groupby(scorer.examples(), key=lambda row: row[ROW] // settings.chunk):
                scorer.score(list(chunk)).save(parts / f"{index:08d}.npz")
                done = (index + 1) * settings.chunk
                yield min(done, total), total
    write_results(output, about, log_probs)
    shutil.rmtree(parts)


def _resume(parts: Path, about: dict[str, Any]) -> int:
    """Number of finished chunks; starts the folder where there is none."""
    note = parts / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != about:
        raise ValueError(f"{parts} holds a measurement with other settings; choose another --output, or delete it")
    parts.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about, indent=1) + "\n")
    finished = [int(part.stem) for part in parts.glob("*.npz")]
    return max(finished) + 1 if finished else 0


def _load(settings: CapabilitySettings) -> Any:
    from trl_ext.data import load_dataset_spec, parse_columns

    spec = {
        "path": settings.dataset,
        "name": settings.dataset_name,
        "split": settings.split,
        "columns": parse_columns(settings.columns, "--columns"),
    }
    rows = load_dataset_spec(spec)
    rows = rows if settings.limit is None else rows.take(settings.limit)
    if len(rows) == 0:
        raise ValueError(f"{settings.dataset} has no examples")
    return rows


def write_results(output: Path, about: dict[str, Any], log_probs: Path | None) -> None:
    """Put the parts together: the same parts give the same bytes."""
    chunks = [ChunkScores.load(part) for part in sorted((output / "parts").glob("*.npz"))]
    tally = Tally()
    for chunk in chunks:
        tally.add(chunk.histogram, chunk.tokens, chunk.sum_p, chunk.sum_nll)
    result = tally.summarize(about)
    with (output / "examples.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["example", "tokens", "mean_p", "mean_nll"])
        for chunk in chunks:
            for row, n, p, nll in zip(chunk.rows, chunk.tokens, chunk.sum_p, chunk.sum_nll, strict=True):
                table.writerow([row, n, f"{p / n:.6f}", f"{nll / n:.6f}"])
    if log_probs is not None:
        keys = [tuple(key) for chunk in chunks for key in chunk.keys.tolist()]
        values = [value for chunk in chunks for value in np.split(chunk.log_probs, chunk.tokens.cumsum()[:-1])]
        write_cache(log_probs, keys, values, {"vocabulary": chunks[0].vocabulary, "model": about["model"]})
    (output / "capability.md").write_text(describe(result))
    draw_capability(result, output / "capability.png")
    result.save(output / "capability.json")  # last: where it is, the rest is


def describe(result: Capability) -> str:
    """The capability as a table, the recommendation, and where its evidence ends, in Markdown."""
    advice = recommend(result.mean_p)
    levels = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    step = len(result.quantiles) - 1
    lines = [
        f"# Capability of {result.about['model']} on {result.about['dataset']}",
        "",
        f"{result.tokens:,} response tokens of {result.examples:,} examples.",
        "",
        "| | tokens | examples (mean p of each) |",
        "|---|---|---|",
        f"| mean p | {result.mean_p:.4f} +- {result.standard_error:.4f} | {np.mean(result.example_quantiles):.4f} |",
        *(
            f"| {level:.0%} quantile | {result.quantiles[round(level * step)]:.4f} "
            f"| {result.example_quantiles[round(level * step)]:.4f} |"
            for level in levels
        ),
        f"| share with p >= {SHARE_ABOVE} | {result.share_above:.4f} | |",
        f"| mean NLL (nats) | {result.nll:.4f} | |",
        "",
        f"Position: {advice.region}. Recommended objective: `{advice.objective}`.",
        f"Reason: {advice.reason}.",
        "",
        f"Where the evidence ends: {advice.limits}",
        "",
    ]
    return "\n".join(lines)
