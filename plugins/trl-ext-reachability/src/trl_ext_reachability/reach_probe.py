"""The probe `reachability` as a Python call: measure, and write the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path

from trl_ext.errors import ConfigurationError
from trl_ext_reachability.digests import digest_files
from trl_ext_reachability.journal import Journal
from trl_ext_reachability.keys import prompt_key
from trl_ext_reachability.measurement import Measurement, load_rows
from trl_ext_reachability.measurement_settings import MeasurementSettings
from trl_ext_reachability.pictures import if_matplotlib
from trl_ext_reachability.reach_report import describe
from trl_ext_reachability.reach_summary import summarize


def measure(settings: MeasurementSettings, output: Path) -> Generator[tuple[str, int, int], None, None]:
    """Measure, and write the results after the last batch; see `Measurement.run` for what it yields.

    Args:
        settings: what to measure.
        output: folder of the results, and of `journal.jsonl`, which an interrupted run continues from.

    Raises:
        ConfigurationError: this is one of several processes, or the journal is of another measurement.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("probe reachability runs in one process; start it without a launcher")
    measurement = Measurement(settings, load_rows(settings))
    keys = "".join(prompt_key(row) for row in measurement.rows)
    about = {
        **settings.as_dict(),
        "the model's files": digest_files(Path(settings.model)),
        "data": hashlib.sha256(keys.encode()).hexdigest(),
    }
    with Journal(output / "journal.jsonl", about) as journal:
        yield from measurement.run(journal)
    write_results(measurement, output)


def write_results(measurement: Measurement, output: Path) -> None:
    """Write `prompts.jsonl`, `reachability.md`, `reachability.png` and, last, `reachability.json`.

    Where the data set has demonstrations, `demonstrations.jsonl` gets those of the prompts with that route, for SFT.

    The same measurement gives the same bytes.
    """
    prompts = measurement.prompts()
    summary = summarize(measurement, prompts)
    (output / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    if (measurement.demonstrated | measurement.too_long).any():
        chosen = [measurement.rows[record["row"]] for record in prompts if record["route"] == "demonstration"]
        lines = [json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in chosen]
        (output / "demonstrations.jsonl").write_text("".join(lines))
    (output / "reachability.md").write_text(describe(summary))
    with if_matplotlib():
        from trl_ext_reachability.reach_plots import draw_reachability

        draw_reachability(summary, prompts, output / "reachability.png")
    (output / "reachability.json").write_text(json.dumps(summary, indent=1) + "\n")
