"""The run of `reachability`: the measurement of each model, and the files."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from typing import Any

from trl_ext_probing.fingerprints import describe_work
from trl_ext_probing.journal import Journal
from trl_ext_probing.progress import Report
from trl_ext_probing.ranks import is_first
from trl_ext_probing.reachability import checking
from trl_ext_probing.reachability.measurement import Measurement
from trl_ext_probing.reachability.reach_plots import draw_reachability
from trl_ext_probing.reachability.reach_report import describe
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.reachability.reach_summary import summarize
from trl_ext_probing.results import forget_results, journal_of, write, write_results
from trl_ext_probing.rewards import Judge
from trl_ext_probing.rows import load_problems
from trl_ext_probing.sampling import SampledModel, refuse_missing_templates


def run(settings: ReachabilitySettings) -> None:
    """Measure all models, and write the results; with `check_against`, the calibration too.

    Raises:
        ConfigurationError: The data, a reward, a model or a journal cannot be used.
    """
    if settings.check_against is not None:
        checking.comparable(settings.all, settings.check_against)  # now, not after the measurement
    rows = load_problems(settings)
    paths = journal_of(settings.output, settings.model)
    measurements, weights = [], {}
    with ExitStack() as stack:
        judge = stack.enter_context(Judge.of(settings.reward, rows[0], settings.weights))
        refuse_missing_templates(settings, rows)
        about = describe_work(settings, settings.model, rows)
        journals = {m: stack.enter_context(Journal(paths[m], about[m], settings.overwrite)) for m in settings.model}
        forget_results(settings)
        report = stack.enter_context(Report())
        for name, journal in journals.items():
            measurement = Measurement(settings, rows, name, journal)
            measurement.run(SampledModel(settings, name), judge, report)
            measurements.append(measurement)
            weights[name] = about[name]["weights"]
            gc.collect()  # models hold circles of references, and the next one wants the memory
    write_reachability(settings, measurements, about)
    if settings.check_against is not None and is_first():
        checking.check_against(settings.output, settings.check_against)


def write_reachability(
    settings: ReachabilitySettings, measurements: list[Measurement], about: dict[str, dict[str, Any]]
) -> None:
    """Write the results of all models.

    Where the data set has demonstrations, `demonstrations.jsonl` gets those of the prompts with that route under the
    first model, for SFT.
    """
    records = [measurement.prompts() for measurement in measurements]
    models = summarize(measurements, records, about)
    first = measurements[0]
    if first.demonstrations and is_first():
        chosen = [first.rows[record["row"]] for record in records[0] if record["route"] == "demonstration"]
        lines = [json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in chosen]
        write(settings.output / "demonstrations.jsonl", "".join(lines))
    budget = {"rounds": settings.totals, "closing_rollouts": settings.closing_rollouts, "closes": settings.closes}
    content = {"data": about[first.model]["data"], "prompts": len(first.rows), **budget, "models": models}
    rows = [record for of_model in records for record in of_model]
    text = describe(settings, content)
    write_results(settings, content, rows, text, lambda path: draw_reachability(settings, models, records, path))
