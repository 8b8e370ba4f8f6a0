"""What a file of `trl-ext compare` asks for, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.records import TRAINERS, TrainerKind
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.comparing.measures import Measure, measure_of
from trl_ext_probing.config_files import checked, read_config, refuse_keys, refuse_names
from trl_ext_probing.results import slug

KEYS: dict[str, type | tuple[type, ...]] = {
    "base": dict,
    "arms": dict,
    "seeds": (list, int),
    "measures": dict,
    "budget": dict,
    "tune": dict,
    "sizes": dict,
}
NEEDED = {"base", "arms", "seeds", "measures"}
BASE = "base"
"""The name of the model that no arm has trained yet."""
DEFAULTS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 0.25,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Settings of every training, where the file says nothing else: checkpoints on the way, of which the last stays."""
OURS = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir")
_SEEDS = 2**32
"""NumPy takes no seed beyond."""
LAUNCH = ("num_processes", "accelerate_config", "config_file")
"""Settings that start several processes for one training."""


@dataclass(frozen=True)
class Stage:
    """One training."""

    kind: TrainerKind
    settings: Mapping[str, Any]
    """Those of TRL's script, without output, seed and what resumes."""


@dataclass(frozen=True)
class Arm:
    """Trainings that follow one another, each from what the one before left."""

    name: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Tuning:
    """How each arm gets its learning rate."""

    rates: tuple[float, ...]
    measure: str
    metric: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    where: Path
    """The file."""
    content: Mapping[str, Any]
    """Its content, with the size laid over it."""
    arms: tuple[Arm, ...]
    """The others are compared with the first."""
    seeds: tuple[int, ...]
    measures: Mapping[str, Measure]
    tuning: Tuning | None
    minutes: float | None
    """After which no training starts."""
    at_once: int | None
    """Trainings at a time; None leaves it to the devices."""

    @property
    def first_stage(self) -> Stage:
        """The first training of the first arm, whose model is the one before any training."""
        return self.arms[0].stages[0]

    @property
    def base_model(self) -> str:
        """The model before any training."""
        return str(self.first_stage.settings["model_name_or_path"])

    @property
    def launches(self) -> bool:
        """Whether a training has several processes."""
        return any(name in stage.settings for arm in self.arms for stage in arm.stages for name in LAUNCH)

    @property
    def on_cpu(self) -> bool:
        """Whether every training is kept off accelerators."""
        return all(stage.settings.get("use_cpu") for arm in self.arms for stage in arm.stages)


def read_comparison(settings: CompareSettings) -> Comparison:
    """Read a file, and refuse what cannot be meant.

    Raises:
        ConfigurationError: With the key to change.
    """
    where = settings.config
    content = read_config(where, KEYS, NEEDED, "CONFIG")
    sizes = content.pop("sizes", {})
    refuse_names(f"{where}: sizes", sizes)
    if settings.size is not None:
        if settings.size not in sizes:
            near = did_you_mean(settings.size, sizes)
            raise ConfigurationError(
                f"--size {settings.size!r}: {where} has no such size. {near}There are {', '.join(sizes) or 'none'}"
            )
        what = f"{where}: sizes: {settings.size}"
        over = sizes[settings.size] or {}
        if not isinstance(over, dict):
            raise ConfigurationError(f"{what}: {over!r} is no mapping of what is laid over the rest")
        content = checked(what, laid_over(content, over), KEYS, NEEDED)
    for part in ("arms", "measures"):
        refuse_names(f"{where}: {part}", content[part])
    measures = {name: measure_of(f"{where}: measures: {name}", spec) for name, spec in content["measures"].items()}
    if not measures:
        raise ConfigurationError(f"{where}: measures: there have to be some; models that nobody measures tell nothing")
    if wrong := next((name for name in measures if slug(name) != name), None):
        raise ConfigurationError(
            f"{where}: measures: {wrong!r} is to be a folder's name too; use letters, digits, - and _"
        )
    budget = content.get("budget", {})
    refuse_keys(f"{where}: budget", budget, ("minutes", "at_once"))
    for key, kind in (("minutes", (int, float)), ("at_once", int)):
        if key in budget and not (isinstance(budget[key], kind) and budget[key] > 0 and budget[key] is not True):
            raise ConfigurationError(f"{where}: budget: {key}: {budget[key]!r} is no number above 0")
    arms = tuple(_arm(where, content["base"], name, arm) for name, arm in content["arms"].items())
    names = [slug(name) for name in (BASE, *content["arms"])]
    if not arms or len(set(names)) < len(names) or "" in names:
        raise ConfigurationError(f"{where}: arms: there have to be some, of different names, and none called {BASE!r}")
    return Comparison(
        where=where,
        content=content,
        arms=arms,
        seeds=_seeds(f"{where}: seeds", content["seeds"]),
        measures=measures,
        tuning=_tuning(where, content, measures),
        minutes=budget.get("minutes"),
        at_once=budget.get("at_once"),
    )


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one: mappings in them are joined, and everything else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        old = joined.get(key)
        joined[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return joined


def _arm(where: Path, base: Mapping[str, Any], name: str, given: Any) -> Arm:
    stages = given if isinstance(given, list) else [{} if given is None else given]
    if not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigurationError(
            f"{where}: arms: {name!r} is {given!r}; an arm is a mapping of settings, or a list of them that follow one "
            "another"
        )
    made = tuple(_stage(where, f"arms: {name!r}", base, stage) for stage in stages)
    if any(_sets(own, "model_name_or_path") for own in stages[1:]):
        raise ConfigurationError(
            f"{where}: arms: {name!r}: model_name_or_path: a training that follows another starts from what that one "
            "left; name a model in the first one, or nowhere"
        )
    if any(stage.settings.get("use_peft") for stage in made[:-1]):
        raise ConfigurationError(
            f"{where}: arms: {name!r}: use_peft: it leaves an adapter, from which the next training of the list cannot "
            "start; set use_peft: false in all but the last one"
        )
    return Arm(name, made)


def _sets(own: Any, name: str) -> bool:
    """Whether an arm itself has a setting, for all of its trainings or for those of a kind."""
    parts = (own, *map(own.get, TRAINERS)) if isinstance(own, dict) else ()
    return any(isinstance(part, dict) and name in part for part in parts)


def _stage(where: Path, what: str, base: Mapping[str, Any], own: Mapping[str, Any]) -> Stage:
    kind = own.get("trainer", base.get("trainer"))
    if kind not in TRAINERS:
        place = what if "trainer" in own else "base"
        raise ConfigurationError(f"{where}: {place}: trainer: {kind!r} is not one of {', '.join(TRAINERS)}")
    settings = dict(DEFAULTS)
    for part in (base, own):
        of_kind = part.get(kind, {})
        if not isinstance(of_kind, dict):
            raise ConfigurationError(
                f"{where}: {kind}: {of_kind!r} is no mapping of settings for the trainings of {kind}"
            )
        settings |= {key: value for key, value in part.items() if key not in (*TRAINERS, "trainer")} | of_kind
    if found := [name for name in OURS if name in settings]:
        instead = {"seed": "`seeds`", "output_dir": "--output"}.get(found[0], "running the same command again")
        raise ConfigurationError(f"{where}: {what}: {found[0]} is this command's own; use {instead}")
    if settings.get("save_only_model"):
        raise ConfigurationError(
            f"{where}: {what}: save_only_model: an interrupted training could not go on; remove it"
        )
    if not settings.get("model_name_or_path"):
        raise ConfigurationError(f"{where}: base: model_name_or_path is missing")
    return Stage(cast(TrainerKind, kind), settings)


def _seeds(where: str, given: Any) -> tuple[int, ...]:
    seeds = list(range(given)) if type(given) is int else given
    usable = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < _SEEDS for seed in seeds)
    if not seeds or not usable or len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"{where}: {given!r} is no number of seeds, nor a list of different whole numbers")
    return tuple(seeds)


def _tuning(where: Path, content: Mapping[str, Any], measures: Mapping[str, Measure]) -> Tuning | None:
    given = content.get("tune")
    if not given:
        return None
    where_tune = f"{where}: tune"
    refuse_keys(where_tune, given, ("learning_rate", "measure", "seeds"))
    if missing := [key for key in ("learning_rate", "measure", "seeds") if key not in given]:
        raise ConfigurationError(f"{where_tune} lacks {missing[0]}")
    try:
        rates = tuple(sorted({float(rate) for rate in given["learning_rate"]}))
    except (TypeError, ValueError):
        rates = ()
    if len(rates) < 2 or rates[0] <= 0:
        raise ConfigurationError(f"{where_tune}: learning_rate: {given['learning_rate']!r} is no list of several rates")
    measure, _, metric = str(given["measure"]).partition("/")
    if measure not in measures:
        near = did_you_mean(measure, measures)
        raise ConfigurationError(f"{where_tune}: measure: there is no measure {measure!r}. {near}".rstrip())
    known = measures[measure].metrics
    if known and metric.partition(", ")[0] not in known:
        raise ConfigurationError(
            f"{where_tune}: measure: {given['measure']!r} is no value; {measure} gives "
            f"{', '.join(f'{measure}/{name}' for name in known)}"
        )
    parts = ((name, own) for name, arm in content["arms"].items() for own in (arm if isinstance(arm, list) else [arm]))
    if arm := next((name for name, own in parts if _sets(own, "learning_rate")), None):
        raise ConfigurationError(
            f"{where}: arms: {arm!r}: learning_rate: `tune` chooses that of every arm; remove one of the two"
        )
    seeds = _seeds(f"{where_tune}: seeds", given["seeds"])
    if both := set(seeds) & set(_seeds(f"{where}: seeds", content["seeds"])):
        raise ConfigurationError(
            f"{where_tune}: seeds: {min(both)} is among the seeds that are reported; a rate that was chosen on it "
            "would flatter its arm"
        )
    return Tuning(rates, measure, metric, seeds)
