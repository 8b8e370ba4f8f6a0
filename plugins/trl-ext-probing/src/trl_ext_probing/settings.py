"""Settings of probes: one dataclass, from whose fields both the command line and the Python call come."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from trl_ext.errors import ConfigurationError
from trl_ext_probing.models import Dtype
from trl_ext_probing.progress import say

Argument = typer.Argument
Option = typer.Option
EngineName = Literal["transformers", "server", "vllm"]


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What every command has that writes results. Subclasses add fields, of which those in `free` decide nothing.

    Raises:
        ConfigurationError: A value outside of what an option allows.
    """

    output: Annotated[Path, Option(help="Folder for the results, from which the same command goes on.")] = Path("probe")
    confidence: Annotated[float, Option(help="Level of the intervals.")] = 0.95

    group: ClassVar[tuple[str, ...]] = ()
    """The group that the command belongs to."""
    probe: ClassVar[str]
    """The command's name."""
    free: ClassVar[frozenset[str]] = frozenset({"output", "overwrite", "confidence", "device", "batch_size"})
    files: ClassVar[tuple[str, ...]] = ("results.json", "table.md", "rows.csv", "plot.png")
    """What a finished run has written beside its journals, and --overwrite removes."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and takes(hints[field.name], list):  # one in place of a list
                object.__setattr__(self, field.name, [value])
            if isinstance(value, str) and takes(hints[field.name], Path):  # of the Python call
                object.__setattr__(self, field.name, Path(value))
            _refuse_out_of_range(_flag(field.name), hints[field.name], value)
        if not 0 < self.confidence < 1:
            raise ConfigurationError(f"--confidence {self.confidence:g}: between 0 and 1")

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is measured; those of several models are one by one in their journals."""
        names = (field.name for field in fields(self) if field.name not in {*self.free, "model"})
        return {name: _plain(getattr(self, name)) for name in names}

    @property
    def all(self) -> dict[str, Any]:
        """Every setting, as JSON keeps it."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def command(self) -> str:
        """The command line that gives these settings."""
        words = ["trl-ext", *self.group, self.probe]
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            value = getattr(self, field.name)
            if _is_argument(hints[field.name]):
                words.append(value)
            elif value == _default(field) or field.name == "overwrite":
                continue
            elif isinstance(value, bool):
                words.append(_flag(field.name if value else f"no-{field.name}"))
            else:
                words += [w for v in (value if isinstance(value, list) else [value]) for w in (_flag(field.name), v)]
        return shlex.join(map(str, words))


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(OutputSettings):
    """What every probe has."""

    overwrite: Annotated[
        bool, Option("--overwrite", help="Begin anew where the folder holds work with other settings.")
    ] = False

    group: ClassVar[tuple[str, ...]] = ("probe",)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ProbeSettings):
    """Models to measure."""

    model: Annotated[
        list[str],
        Option(help="A model: a path, an adapter's path, or a hub id. Several are compared with the first."),
    ]
    dtype: Annotated[Dtype, Option(help="Precision of the weights.")] = "auto"
    device: Annotated[str, Option(help="Device: auto, cpu, cuda, cuda:1.")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigurationError("--model: name one model or more")
        if len(set(self.model)) < len(self.model):
            raise ConfigurationError(
                f"--model: {max(self.model, key=self.model.count)!r} is there twice; leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings(ProbeSettings):
    """A data set, named as TRL's scripts name it."""

    dataset: Annotated[str, Option(help="Data: a .jsonl, .json, .csv or .parquet file, or a hub id.")]
    dataset_config: Annotated[str | None, Option(help="Configuration of the data set.")] = None
    split: Annotated[str, Option(help="Split of the data set.")] = "train"
    columns: Annotated[str | None, Option(help="Renaming of columns: question=prompt,answer=completion.")] = None
    limit: Annotated[int | None, Option(help="The first rows only.", min=1)] = None


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(ModelSettings, DataSettings):
    """Teacher-forced scores of a data set under models."""

    max_length: Annotated[int, Option(help="Truncation in tokens, as in SFTConfig.", min=2)] = 1024
    batch_tokens: Annotated[int, Option(help="Tokens in a batch, padding included.", min=1)] = 16_384
    chunk: Annotated[int, Option(help="Examples between two points to go on from.", min=1)] = 512

    free: ClassVar[frozenset[str]] = ProbeSettings.free | {"batch_tokens"}


@dataclass(frozen=True, kw_only=True)
class RewardSettings(ProbeSettings):
    """What judges completions."""

    reward: Annotated[
        list[str],
        Option(help="A reward function in TRL's form: module:function or file.py:function. Several are added up."),
    ]
    reward_weights: Annotated[str | None, Option(help="Weights of several rewards: 1,0.5.")] = None

    @property
    def weights(self) -> list[float] | None:
        """The weights as numbers.

        Raises:
            ConfigurationError: They are none.
        """
        return None if self.reward_weights is None else numbers(self.reward_weights, "--reward-weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and len(self.weights) != len(self.reward):
            raise ConfigurationError(
                f"--reward-weights {self.reward_weights!r}: {len(self.weights)} weights for {len(self.reward)} rewards"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(ProbeSettings):
    """How completions are drawn."""

    engine: Annotated[EngineName, Option(help="What draws completions.")] = "transformers"
    base_url: Annotated[
        list[str] | None, Option(help="With --engine server: an OpenAI-compatible endpoint; several take turns.")
    ] = None
    temperature: Annotated[float, Option(help="Sampling temperature; 0 decodes greedily.", min=0.0)] = 1.0
    top_p: Annotated[float, Option(help="Nucleus sampling.", min=0.0, max=1.0)] = 1.0
    top_k: Annotated[int, Option(help="The likeliest tokens only; 0 for all.", min=0)] = 0
    max_completion_length: Annotated[int, Option(help="Longest completion in tokens.", min=1)] = 256
    batch_size: Annotated[int, Option(help="Completions drawn at a time.", min=1)] = 64
    seed: Annotated[int, Option(help="Seed of the samples.")] = 0

    free: ClassVar[frozenset[str]] = ProbeSettings.free | {"base_url"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.base_url) != (self.engine == "server"):
            raise ConfigurationError("--base-url goes with --engine server, and only with it")


@dataclass(frozen=True, kw_only=True)
class SampledModelSettings(ModelSettings, SamplingSettings):
    """Models whose completions are drawn."""

    free: ClassVar[frozenset[str]] = SamplingSettings.free


def probe(function: Callable[[Any], None]) -> Callable[..., None]:
    """Make a command of a function of settings: its options are the fields of the settings' class.

    The command takes them by name, from the command line and from Python alike. An interruption ends it with one line
    that says how to go on.
    """
    cls = get_type_hints(function)["settings"]
    hints = get_type_hints(cls, include_extras=True)

    @functools.wraps(function)
    def command(**options: Any) -> None:
        settings = cls(**options)
        try:
            function(settings)
        except KeyboardInterrupt:
            say(f"interrupted; what is done is kept, and this goes on with it: {settings.command}")
            raise typer.Exit(130) from None

    del command.__wrapped__  # or typer would read the function's own signature
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=_default(f))
        for f in fields(cls)
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {f.name: hints[f.name] for f in fields(cls)}
    return command


def numbers(text: str, flag: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ConfigurationError: They are none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{flag} {text!r}: numbers with commas, such as 1,0.5") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _is_argument(hint: Any) -> bool:
    """Whether a field is given by its place, without a flag."""
    return any(isinstance(note, ArgumentInfo) for note in get_args(hint)[1:])


def takes(hint: Any, kind: type) -> bool:
    """Whether the values of a field are of a kind, or may be."""
    return kind in (hint, get_origin(hint)) or any(takes(part, kind) for part in get_args(hint))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _refuse_out_of_range(flag: str, hint: Any, value: Any) -> None:
    """Refuse in a Python call what the command line refuses too."""
    if get_origin(hint) is not Annotated or value is None:
        return
    kind, *notes = get_args(hint)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ConfigurationError(f"{flag} {value!r} is not one of {', '.join(get_args(kind))}")
    for note in notes:
        if isinstance(note, OptionInfo) and note.min is not None and value < note.min:
            raise ConfigurationError(f"{flag} {value:g}: at least {note.min:g}")
        if isinstance(note, OptionInfo) and note.max is not None and value > note.max:
            raise ConfigurationError(f"{flag} {value:g}: at most {note.max:g}")
