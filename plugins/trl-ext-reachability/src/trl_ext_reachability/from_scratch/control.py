"""The from-scratch control as a Python call: measure, and write the files."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

from trl_ext_reachability.from_scratch.control_report import describe
from trl_ext_reachability.from_scratch.control_settings import ControlSettings
from trl_ext_reachability.from_scratch.control_summary import summarize
from trl_ext_reachability.from_scratch.procedure import Procedure, Progress
from trl_ext_reachability.journal import Journal
from trl_ext_reachability.keys import prompt_key
from trl_ext_reachability.pictures import if_matplotlib


def measure(settings: ControlSettings, output: Path) -> Generator[Progress, None, None]:
    """Measure, and write the results at the end; see `Procedure.steps` for what it yields.

    Args:
        settings: what to measure.
        output: folder of the results, and of `journal.jsonl` and `runs`, which an interrupted run continues from.
    """
    procedure = Procedure(settings, output)
    _ = procedure.floors  # what it refuses, it refuses before a model loads
    with Journal(output / "journal.jsonl", procedure.about()) as journal:
        yield from procedure.steps(journal)
    write_results(procedure, output)


def write_results(procedure: Procedure, output: Path) -> None:
    """Write `contamination.jsonl`, `from_scratch.md`, `from_scratch.png` and, last, `from_scratch.json`.

    The same measurement gives the same bytes; each file is there as a whole or not at all.
    """
    summary = summarize(procedure)
    lines = [
        {"set": name, "row": row, "key": prompt_key(rows[row]["prompt"]), "training_row": where}
        for name, rows in procedure.sets.items()
        for row, where in procedure.contaminated[name].items()
    ]
    _write(output / "contamination.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    _write(output / "from_scratch.md", describe(summary).encode())
    with if_matplotlib():
        from trl_ext_reachability.from_scratch.control_plots import draw

        _write(output / "from_scratch.png", draw(summary))
    _write(output / "from_scratch.json", (json.dumps(summary, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
