"""The from-scratch control as a whole: the measurement, and the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from trl_ext.jobs import Pool
from trl_ext_probing.from_scratch.control_plots import draw
from trl_ext_probing.from_scratch.control_report import describe
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.from_scratch.control_summary import summarize
from trl_ext_probing.from_scratch.procedure import Procedure
from trl_ext_probing.journal import Journal
from trl_ext_probing.progress import Report
from trl_ext_probing.reachability.keys import prompt_key
from trl_ext_probing.results import forget_results, write, write_results


def run(settings: FromScratchSettings) -> None:
    """Train and evaluate what is not there yet, and write the results.

    Raises:
        ConfigurationError: Anything that cannot work, before weights load.
    """
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    procedure = Procedure(settings)
    _ = procedure.floors  # what it refuses, it refuses before a model loads
    with (
        Journal(settings.output / "journal.jsonl", procedure.about(), settings.overwrite) as journal,
        Pool() as pool,
        Report() as report,
    ):
        forget_results(settings)
        if settings.overwrite:
            procedure.forget_runs()
        task = ""
        for name, done, total in procedure.steps(journal, pool):
            if name != task:
                report.start(name, total, done - 1)
                task = name
            report.update(done)
    write_control(procedure)


def write_control(procedure: Procedure) -> None:
    """Write the results, and `contamination.jsonl` with the evaluation samples that the training set holds."""
    settings, summary = procedure.settings, summarize(procedure)
    settings.output.mkdir(parents=True, exist_ok=True)
    lines = [
        {"set": name, "row": row, "key": prompt_key(rows[row]["prompt"]), "training_row": where}
        for name, rows in procedure.sets.items()
        for row, where in procedure.contaminated[name].items()
    ]
    write(settings.output / "contamination.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_results(settings, summary, _rows(summary), describe(settings, summary), partial(draw, settings, summary))


def _rows(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Score and nll of each arm, seed, set and point."""
    for point in summary["points"]:
        for name in summary["sets"]:
            for arm in summary["arms"]:
                pairs = zip(summary["seeds"], point["score"][name][arm], point["nll"][name][arm], strict=True)
                for seed, score, nll in pairs:
                    place = {"step": point["step"], "tokens": point["tokens"]}
                    yield {"set": name, "arm": arm, "seed": seed, **place, "score": score, "nll": nll}
