"""The journals of a probe's models, all of which are looked at before the first model loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.fingerprints import rows_fingerprint, weights_fingerprint
from trl_ext_probing.journal import Journal
from trl_ext_probing.results import forget_results, slug
from trl_ext_probing.settings import ModelSettings


@contextmanager
def open_journals(
    settings: ModelSettings, models: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Journal]]:
    """The journal of each model; results that --overwrite replaces are gone then.

    Raises:
        ConfigurationError: There is no such model, or a journal cannot be used.
    """
    paths, about = journal_of(settings.output, models), describe_work(settings, models, rows)
    with ExitStack() as stack:
        journals = {m: stack.enter_context(Journal(paths[m], about[m], settings.overwrite)) for m in models}
        forget_results(settings)
        yield journals


def journal_of(output: Path, models: Iterable[str]) -> dict[str, Path]:
    """The journal of each model.

    Raises:
        ConfigurationError: Two names give one file.
    """
    files: dict[str, Path] = {}
    for model in models:
        path = output / f"journal.{slug(model)}.jsonl"
        if path in files.values():
            raise ConfigurationError(f"--model {model!r}: its journal would be {path}, as another model's; rename it")
        files[model] = path
    return files


def describe_work(
    settings: ModelSettings, models: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the journal of each model belongs to: the settings, and the content of the rows and weights that they name.

    Of a model behind a server, whose weights cannot be looked at, the name alone.

    Raises:
        ConfigurationError: There is no such model.
    """
    data = rows_fingerprint(rows)
    remote = getattr(settings, "engine", "") == "server"
    weights = {model: {"model": model} if remote else weights_fingerprint(model) for model in models}
    return {model: {"settings": settings.deciding, "data": data, "weights": weights[model]} for model in models}
