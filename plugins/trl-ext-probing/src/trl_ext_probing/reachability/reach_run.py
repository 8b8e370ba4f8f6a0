"""The run of `reachability`: the measurement of each model, and the files."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack

from trl_ext_probing.progress import Report
from trl_ext_probing.ranks import is_first
from trl_ext_probing.reachability import checking
from trl_ext_probing.reachability.measurement import Measurement
from trl_ext_probing.reachability.reach_plots import draw_reachability
from trl_ext_probing.reachability.reach_report import describe
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.reachability.reach_summary import summarize
from trl_ext_probing.results import write, write_results
from trl_ext_probing.rewards import Judge
from trl_ext_probing.rows import load_problems
from trl_ext_probing.sampling import SampledModel, refuse_missing_templates
from trl_ext_probing.work import open_journals


def run(settings: ReachabilitySettings) -> None:
    """Measure all models, and write the results; with `check_against`, the calibration too.

    Raises:
        ConfigurationError: The data, a reward, a model or a journal cannot be used.
    """
    if settings.check_against is not None:
        checking.comparable(settings.all, settings.check_against)  # now, not after the measurement
    rows = load_problems(settings)
    measurements = []
    with ExitStack() as stack:
        judge = stack.enter_context(Judge.of(settings.reward, rows[0], settings.weights))
        refuse_missing_templates(settings, rows)
        journals = stack.enter_context(open_journals(settings, settings.model, rows))
        report = stack.enter_context(Report())
        for name, journal in journals.items():
            measurements.append(Measurement(settings, rows, name, journal))
            measurements[-1].run(SampledModel(settings, name), judge, report)
            gc.collect()  # models hold circles of references, and the next one wants the memory
    write_reachability(settings, measurements)
    if settings.check_against is not None and is_first():
        checking.check_against(settings.output, settings.check_against)


def write_reachability(settings: ReachabilitySettings, measurements: list[Measurement]) -> None:
    """Write the results of all models.

    Where the data set has demonstrations, `demonstrations.jsonl` gets those of the prompts with that route under the
    first model, for SFT.
    """
    records = [measurement.prompts() for measurement in measurements]
    models = summarize(measurements, records)
    first = measurements[0]
    if first.demonstrations and is_first():
        chosen = [first.rows[record["row"]] for record in records[0] if record["route"] == "demonstration"]
        lines = [json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in chosen]
        write(settings.output / "demonstrations.jsonl", "".join(lines))
    budget = {"rounds": settings.totals, "closing_rollouts": settings.closing_rollouts, "closes": settings.closes}
    content = {"data": first.journal.about["data"], "prompts": len(first.rows), **budget, "models": models}
    rows = [record for of_model in records for record in of_model]
    text = describe(settings, content)
    write_results(settings, content, rows, text, lambda path: draw_reachability(settings, models, records, path))
