"""The run of `passk`: every model and journal is looked at before the first model draws, perhaps for hours."""

from __future__ import annotations

import gc
from contextlib import ExitStack

from trl_ext_probing.engines import outstanding
from trl_ext_probing.passk.passk_results import Result, write_passk
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.progress import Report
from trl_ext_probing.rewards import Judge
from trl_ext_probing.rows import load_problems
from trl_ext_probing.sampling import SampledModel, Samples, refuse_missing_templates
from trl_ext_probing.work import open_journals


def run(settings: PasskSettings) -> list[Result]:
    """Draw what is missing of each model's samples, and write the results.

    More samples of each problem are added to those that are there: `n` may grow from run to run.

    Raises:
        ConfigurationError: The data, a reward, a model or a journal cannot be used.
    """
    rows = load_problems(settings)
    draws = outstanding(len(rows), settings.n)
    results = []
    with ExitStack() as stack:
        judge = stack.enter_context(Judge.of(settings.reward, rows[0], settings.weights))
        refuse_missing_templates(settings, rows)
        journals = stack.enter_context(open_journals(settings, settings.model, rows))
        samples = {model: Samples(rows, journal) for model, journal in journals.items()}
        report = stack.enter_context(Report())
        for model, own in samples.items():
            report.follow(model, len(draws), own.draw(draws, SampledModel(settings, model).engine, judge, settings))
            results.append(Result.of(model, journals[model].about, own, settings))
            gc.collect()  # models hold circles of references, and the next one wants the memory
    write_passk(settings, results)
    return results
