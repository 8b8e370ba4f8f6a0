"""The diagnostics in the run folder, and what to make of them: a plot by layer, a table of samples.

    python -m trl_ext_data_regularization.kept_report RUN [--rows 10]

reads `RUN/data_regularization`, prints the samples most often kept and most often dropped, and writes `kept.png`. The
plugin writes there with `table=true`, each rank for its own samples: `kept-00000.csv`, a row per optimiser step and a
column per layer, the share of the general samples that the layer kept; and `samples-00000.csv`, a row per sample.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext_data_regularization.diagnostics import Recorder

FOLDER = "data_regularization"


@dataclass(frozen=True)
class Sample:
    """What became of one general sample."""

    id: str
    """A hash of its token ids (`diagnostics.sample_id`)."""
    seen: int
    """Times it was in a window."""
    kept: float
    """Share of its appearances and layers that kept it."""
    weight: float
    """Mean weight over appearances and layers; 1 is what plain training gives."""
    text: str
    """Its beginning."""


@dataclass(frozen=True)
class Kept:
    """Shares of the general samples kept: `shares[i][l]` in layer l at step `steps[i]`."""

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]


def samples_of(recorder: Recorder, tokenizer: Any = None) -> list[Sample]:
    """A recorder's samples, the most often kept first."""

    def text(tokens: list[int]) -> str:
        return str(tokens) if tokenizer is None else tokenizer.decode(tokens)

    found = [
        Sample(name, one.times, one.kept / one.times, one.weight / one.times, text(one.tokens))
        for name, one in recorder.seen.items()
    ]
    return _ranked(found)


def kept_of(recorder: Recorder) -> Kept:
    """A recorder's shares kept."""
    recorder.settle()
    history = recorder.history
    return Kept(
        tuple(recorder.names),
        tuple(step for step, _ in history),
        tuple(tuple(share.tolist()) for _, share in history),
    )


def extremes(samples: Sequence[Sample], rows: int = 10) -> list[Sample]:
    """The `rows` samples most often kept, and the `rows` most often dropped."""
    ranked = _ranked(samples)
    return ranked if len(ranked) <= 2 * rows else ranked[:rows] + ranked[-rows:]


def _ranked(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda one: (-one.kept, one.id))


# -- files -----------------------------------------------------------------------------------------------------------


def write(run: str | Path, rank: int, kept: Kept, samples: Sequence[Sample]) -> None:
    """Write one rank's files into a run folder, in place of older ones."""
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    shares = [[step, *(f"{x:.6g}" for x in row)] for step, row in zip(kept.steps, kept.shares, strict=True)]
    _write(folder / f"kept-{rank:05d}.csv", ["step", *kept.layers], shares)
    rows = [[one.id, one.seen, f"{one.kept:.6g}", f"{one.weight:.6g}", one.text] for one in _ranked(samples)]
    _write(folder / f"samples-{rank:05d}.csv", ["id", "seen", "kept", "weight", "text"], rows)


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    temporary.replace(path)


def read(run: str | Path) -> tuple[Kept, list[Sample]]:
    """The shares kept, as a mean over ranks, and all ranks' samples, the most often kept first.

    Args:
        run: the run's output folder.

    Raises:
        FileNotFoundError: the run left no diagnostics.
    """
    folder = Path(run) / FOLDER
    kept = [_read(path) for path in sorted(folder.glob("kept-*.csv"))]
    if not kept:
        raise FileNotFoundError(
            f"{folder} holds no kept-*.csv: train with data-regularization:table=true, and give the run's output folder"
        )
    layers = tuple(kept[0][0][1:])
    by_step: dict[int, list[list[float]]] = defaultdict(list)
    for _, *rows in kept:
        for step, *shares in rows:
            by_step[int(step)].append([float(x) for x in shares])
    steps = tuple(sorted(by_step))
    means = tuple(tuple(sum(column) / len(column) for column in zip(*by_step[step], strict=True)) for step in steps)
    found: dict[str, Sample] = {}
    for path in sorted(folder.glob("samples-*.csv")):
        for id_, seen, share, weight, text in _read(path)[1:]:
            one = Sample(id_, int(seen), float(share), float(weight), text)
            found[id_] = _merged(found[id_], one) if id_ in found else one
    return Kept(layers, steps, means), _ranked(list(found.values()))


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _merged(a: Sample, b: Sample) -> Sample:
    seen = a.seen + b.seen
    kept, weight = (a.seen * a.kept + b.seen * b.kept) / seen, (a.seen * a.weight + b.seen * b.weight) / seen
    return Sample(a.id, seen, kept, weight, a.text)


# -- what to make of them --------------------------------------------------------------------------------------------


def plot(kept: Kept, path: str | Path) -> None:
    """Draw the share kept by each layer over training: one row of colour per layer. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.16 * max(len(kept.layers), 6)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        list(zip(*kept.shares, strict=True)),
        aspect="auto",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(min(kept.steps) - 0.5, max(kept.steps) + 0.5, len(kept.layers) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(kept.layers)), kept.layers, fontsize=6)
    axes.set_xlabel("optimiser step")
    figure.colorbar(image, label="share of general samples kept")
    figure.savefig(path, dpi=150)


def as_table(samples: Sequence[Sample], rows: int = 10) -> str:
    """The extremes in Markdown."""
    lines = ["| id | seen | kept | weight | text |", "|---|---|---|---|---|"]
    for one in extremes(samples, rows):
        text = " ".join(one.text.split()).replace("|", "\\|")
        lines.append(f"| {one.id} | {one.seen} | {one.kept:.2f} | {one.weight:.2f} | {text} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m trl_ext_data_regularization.kept_report",
        description=__doc__,
    )
    parser.add_argument("run", type=Path, help="the run's output folder")
    parser.add_argument("--rows", type=int, default=10, help="samples to show at each end")
    options = parser.parse_args(arguments)
    try:
        kept, samples = read(options.run)
    except FileNotFoundError as error:
        parser.error(str(error))
    print(as_table(samples, options.rows))
    picture = options.run / FOLDER / "kept.png"
    plot(kept, picture)
    print(f"\nshare kept by layer, over {len(kept.steps)} steps: {picture}")


if __name__ == "__main__":
    main()
