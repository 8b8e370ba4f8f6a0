"""What a comparison measures of each model: `loss`, `passk`, `drift`, or a function of the user's."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from trl_ext.errors import ConfigurationError
from trl_ext_probing.config_files import probe_settings, refuse_keys
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.functions import load_function
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.settings import Option, ScoringSettings

Better = Literal["lower", "higher"]
Values = dict[str, float]
"""Metric to its value."""


class Measure(ABC):
    """One measure, as the file has it.

    Args:
        where: The file and the key, for messages.
        given: Its options.

    Raises:
        ConfigurationError: The options are none of this measure.
    """

    def __init__(self, where: str, given: Any) -> None:
        self.where = where
        self.given = given

    @abstractmethod
    def refuse(self, model: str) -> None:
        """Look at the data and functions, before anything is trained.

        Args:
            model: The one before any training.

        Raises:
            ConfigurationError: They cannot be used.
        """

    @property
    def data(self) -> dict[str, Any] | None:
        """The data set that decides the values, as `load_dataset_spec` names it."""
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that are known beforehand; none where what is measured decides. With `by`, more follow the comma."""
        return ()

    @abstractmethod
    def measure(self, model: str, base: str, folder: Path) -> Values:
        """Measure a saved model.

        Args:
            model: Its folder.
            base: The model before any training; it may be the same.
            folder: For what the measure keeps on its way, from which it goes on.
        """

    def better(self, metric: str) -> Better:
        """Which values are good."""
        return "lower"

    def unit(self, metric: str) -> str:
        """What a value is a number of, for headings and axes; "" where it is not known."""
        return ""


@dataclass(frozen=True, kw_only=True)
class LossSettings(ScoringSettings):
    """Held-out loss."""

    by: Annotated[str | None, Option(help="A column: the loss of the rows of each of its values as well.")] = None


class _OfProbe(Measure):
    """A measure whose options are those of a probe."""

    kind: ClassVar[type[Any]]

    def __init__(self, where: str, given: Any) -> None:
        if not isinstance(given, dict):
            raise ConfigurationError(f"{where}: {given!r} is no mapping of options, of which `dataset` has to be there")
        super().__init__(where, given)
        self.settings("model", "base", Path("probe"))

    def settings(self, model: str, base: str, folder: Path) -> Any:
        own = {"base": base} if "base" in self.kind.__dataclass_fields__ else {}
        return probe_settings(self.where, self.kind, self.given, model=[model], output=folder, **own)

    @property
    def data(self) -> dict[str, Any] | None:
        """The data set."""
        names = ("dataset", "dataset_config", "split", "columns", "limit")
        return {name: self.given[name] for name in names if name in self.given}


class Loss(_OfProbe):
    """Negative log-likelihood of held-out data in nats per label token, of all rows and of those of each kind."""

    kind = LossSettings
    metrics = ("nll",)

    def refuse(self, model: str) -> None:
        """Load the data, and look for the column."""
        from trl_ext_probing.scored_data import Data

        settings = self.settings(model, model, Path("probe"))
        data = Data(settings)
        if settings.by is not None and settings.by not in data.rows.column_names:
            names = ", ".join(data.rows.column_names)
            raise ConfigurationError(f"{self.where}: by: the data has no column {settings.by!r}; it has {names}")
        data.check_tokenizers([model])

    def measure(self, model: str, base: str, folder: Path) -> Values:
        """`nll`, and with `by` one `nll, COLUMN=VALUE` for each value."""
        from trl_ext_probing.scored_data import Data, score_models

        settings = self.settings(model, base, folder)
        data = Data(settings)
        (scores,) = score_models(settings, [model], data)
        nll, tokens = scores.column("sum_nll"), scores.column("tokens")
        values = {"nll": float(nll.sum() / tokens.sum())}
        if settings.by is not None:
            kinds = np.array([str(row[settings.by]) for row in data.rows])
            for kind in sorted(set(kinds[tokens > 0])):
                chosen = kinds == kind
                values[f"nll, {settings.by}={kind}"] = float(nll[chosen].sum() / tokens[chosen].sum())
        return values

    def unit(self, metric: str) -> str:
        """Of a mean over tokens."""
        return "nats per token"


class Passk(_OfProbe):
    """`trl-ext probe passk`: the share of problems that are solved within k tries."""

    kind = PasskSettings

    def __init__(self, where: str, given: Any) -> None:
        super().__init__(where, given)
        if given.get("engine") == "server":
            raise ConfigurationError(f"{where}: engine: a server has one model, and a comparison measures several")

    def refuse(self, model: str) -> None:
        """Load the problems and the rewards."""
        from trl_ext_probing.rewards import Judge
        from trl_ext_probing.rows import load_problems
        from trl_ext_probing.sampling import refuse_missing_templates

        settings = self.settings(model, model, Path("probe"))
        rows = load_problems(settings)
        with Judge.of(settings.reward, rows[0], settings.weights):
            pass
        refuse_missing_templates(settings, rows)

    def measure(self, model: str, base: str, folder: Path) -> Values:
        """`pass@K` for each k."""
        from trl_ext_probing.passk.passk_run import run

        (result,) = run(self.settings(model, base, folder))
        return {f"pass@{k}": estimate.bounds[0] for k, estimate in result.estimates.items()}

    @property
    def metrics(self) -> tuple[str, ...]:
        """`pass@K` for each k."""
        return tuple(f"pass@{k}" for k in self.settings("model", "base", Path("probe")).ks)

    def better(self, metric: str) -> Better:
        """More solved problems."""
        return "higher"

    def unit(self, metric: str) -> str:
        """Of pass@k."""
        return "share of problems"


class Drift(_OfProbe):
    """`trl-ext probe drift`: the change on general data from the model before any training."""

    kind = DriftSettings
    metrics = ("nll", "accuracy")

    def refuse(self, model: str) -> None:
        """Load the data."""
        from trl_ext_probing.scored_data import Data

        Data(self.settings("other", model, Path("probe"))).check_tokenizers([model])

    def measure(self, model: str, base: str, folder: Path) -> Values:
        """Changes of `nll` and `accuracy`; the model before any training has none."""
        from trl_ext_probing.drift.drift_run import run

        if model == base:
            return {}
        (changes,) = run(self.settings(model, base, folder)).values()
        return {name: change.change.bounds[0] for name, change in changes.items()}

    def better(self, metric: str) -> Better:
        """Little nll, and much accuracy."""
        return "higher" if metric == "accuracy" else "lower"

    def unit(self, metric: str) -> str:
        """Of a difference from the model before any training."""
        return "change, share of tokens" if metric == "accuracy" else "change, nats per token"


class Function(Measure):
    """A function of the user's, called with model and tokenizer: `function: file.py:function`, `better: lower`."""

    def __init__(self, where: str, given: Any) -> None:
        super().__init__(where, given if isinstance(given, dict) else {"name": given})
        refuse_keys(where, self.given, ("name", "better"))
        if not isinstance(self.given.get("name"), str):
            raise ConfigurationError(f"{where}: name: a function is named as module:function or file.py:function")
        if self.given.get("better", "higher") not in ("lower", "higher"):
            raise ConfigurationError(f"{where}: better: {self.given['better']!r} is not one of lower, higher")

    def refuse(self, model: str) -> None:
        """Load the function."""
        load_function(self.given["name"], self.where)

    def measure(self, model: str, base: str, folder: Path) -> Values:
        """What it gives: a number, or several by name.

        Raises:
            ConfigurationError: It gives something else.
        """
        from trl_ext_probing.models import load_model

        found = load_function(self.given["name"], self.where)(*load_model(model))
        gc.collect()  # models hold circles of references, and the next one wants the memory
        values = dict(found) if isinstance(found, Mapping) else {"": found}
        try:
            return {str(name): float(value) for name, value in values.items()}
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"{self.where}: {self.given['name']} gave {found!r}, which is no number, nor a mapping from names to "
                "numbers"
            ) from None

    def better(self, metric: str) -> Better:
        """As the file says."""
        return "lower" if self.given.get("better") == "lower" else "higher"


KINDS: dict[str, type[Measure]] = {"loss": Loss, "passk": Passk, "drift": Drift, "function": Function}


def measure_of(where: str, spec: Any) -> Measure:
    """The measure that an entry of the file asks for.

    Raises:
        ConfigurationError: It is none.
    """
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ConfigurationError(
            f"{where}: {spec!r} is no measure; write KIND: OPTIONS, with one of {', '.join(KINDS)}"
        )
    ((kind, given),) = spec.items()
    refuse_keys(where, spec, tuple(KINDS))
    return KINDS[kind](where, given)


def values_of(
    measures: Mapping[str, Any], model: str, base: str, folders: Mapping[str, str]
) -> dict[str, float | None]:
    """All measures of a model, as `MEASURE/METRIC`; None for a value that is not finite.

    Args:
        measures: Name to entry of the file.
        model, base: See `Measure.measure`.
        folders: Of each measure its own, from which it goes on.
    """
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    found: dict[str, float | None] = {}
    for name, spec in measures.items():
        measure = measure_of(name, spec)
        for metric, value in measure.measure(model, base, Path(folders[name])).items():
            found[f"{name}/{metric}".removesuffix("/")] = value if math.isfinite(value) else None
    return found
