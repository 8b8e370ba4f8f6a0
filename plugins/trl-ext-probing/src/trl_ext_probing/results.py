"""The files of a finished probe: `results.json`, `table.md`, `rows.csv` and `plot.png`, the same for all probes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.progress import say
from trl_ext_probing.ranks import is_first
from trl_ext_probing.settings import OutputSettings, ProbeSettings

SCHEMA = 1
"""Of `results.json`; it rises when a key gets another meaning or goes."""


def write_results(
    settings: OutputSettings,
    content: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    table: str,
    draw: Callable[[Path], None],
) -> None:
    """Write the files into `settings.output`, and print the table. The same measurement gives the same bytes.

    `results.json` comes last: where it is, the rest is.

    Args:
        settings: Of the probe; `results.json` has `schema`, `probe`, `command` and `settings` of them.
        content: What it has besides; a number that is not finite becomes null.
        rows: Of `rows.csv`, all with the same keys.
        table: In Markdown.
        draw: Writes the picture to a path; left out, with a message, where matplotlib is not installed.
    """
    if not is_first():
        return
    folder = settings.output
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{table.rstrip()}\n\nMade by `{settings.command}`.\n"
    write(folder / "table.md", text)
    write(folder / "rows.csv", _csv(rows))
    with without_matplotlib_say_so("plot.png"):
        draw(folder / "plot.png")
    own = {name: value for name, value in settings.all.items() if name not in ("output", "overwrite")}
    about = {"schema": SCHEMA, "probe": settings.probe, "command": settings.command, "settings": own}
    write(folder / "results.json", json.dumps(_finite({**about, **content}), indent=1, allow_nan=False) + "\n")
    print(text, end="")


def forget_results(settings: ProbeSettings) -> None:
    """Remove this probe's results where they are to be overwritten: they would stand beside the work of other settings.

    Files of the same names that this probe did not write stay, until its results are there.
    """
    if settings.overwrite and is_first():
        try:
            read_results(settings.output, settings.probe, "--output")
        except ConfigurationError:
            return
        for name in settings.files:
            (settings.output / name).unlink(missing_ok=True)


@contextmanager
def without_matplotlib_say_so(picture: str) -> Iterator[None]:
    """Leave the body where matplotlib is missing, and say so; other missing modules are errors."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say(f"no {picture}: matplotlib is not installed (pip install 'trl-ext-probing[plot]')")


def read_results(folder: Path, probe: str, setting: str) -> dict[str, Any]:
    """The content of a finished probe's `results.json`.

    Args:
        folder: Its output.
        probe: Its name.
        setting: What holds the folder, for the message: "reachability: probe".

    Raises:
        ConfigurationError: There is none, or it is of another probe or schema.
    """
    path = folder / "results.json"
    advice = f"make one with `trl-ext probe {probe}`"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(
            f"{setting}: {str(folder)!r} holds no finished measurement ({error.strerror}: {path.name}); {advice}"
        ) from None
    except ValueError:
        raise ConfigurationError(f"{setting}: {str(path)!r} is no JSON; {advice}") from None
    if not isinstance(content, dict) or (content.get("schema"), content.get("probe")) != (SCHEMA, probe):
        raise ConfigurationError(
            f"{setting}: {str(path)!r} is not of `trl-ext probe {probe}` of this version; {advice}"
        )
    return content


def read_rows(folder: Path, kinds: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """Columns of a finished probe's `rows.csv`; an empty cell is None.

    Args:
        folder: Its output.
        kinds: Column to what makes a value of its text.
    """
    with (folder / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{name: kind(row[name]) if row[name] else None for name, kind in kinds.items()} for row in table]


def slug(name: str) -> str:
    """A name for a file: the end of a long path tells checkpoints apart."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:]


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one move: it is there as a whole, or as it was."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(unfinished, path)


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    listed = list(rows)
    file = io.StringIO()
    table = csv.DictWriter(file, list(listed[0]) if listed else [], lineterminator="\n")
    table.writeheader()
    table.writerows({name: "" if value is None else value for name, value in row.items()} for row in listed)
    return file.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
