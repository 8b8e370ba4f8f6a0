"""Data sets named by text: in YAML, on the command line, or in a stream's description."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.specs import split_outside_brackets, unquote

if TYPE_CHECKING:
    from datasets import Dataset

SPEC_KEYS = ("path", "name", "split", "data_files", "data_dir", "columns")
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def parse_columns(value: Any, setting: str = "dataset_columns") -> dict[str, str] | None:
    """Read a renaming of columns, old to new: a mapping, JSON, or `question=prompt,answer=completion`.

    Raises:
        ConfigurationError: It is none of these, or gives two columns one name.
    """
    mapping = _read_mapping(value, setting, example="question=prompt,answer=completion")
    if not mapping:
        return None
    if not all(isinstance(new, str) and new for new in mapping.values()):
        raise ConfigurationError(
            f"{setting}: {value!r} must give each column a new name: question=prompt,answer=completion"
        )
    if len(set(mapping.values())) < len(mapping):
        raise ConfigurationError(f"{setting}: {value!r} gives two columns the same name")
    return mapping


def parse_streams(value: Any) -> dict[str, dict[str, Any]] | None:
    """Read named auxiliary data sets: a mapping from name to path or description, JSON, or `general=data.jsonl`.

    Raises:
        ConfigurationError: It is none of these, or a description has no path or an unknown key.
    """
    mapping = _read_mapping(value, "streams", example="general=data.jsonl")
    return {name: _parse_stream(name, spec) for name, spec in mapping.items()} or None


def load_dataset_spec(spec: Mapping[str, Any], setting: str = "") -> Dataset:
    """Load one data set.

    Args:
        spec: `path` (a .json, .jsonl, .csv, .parquet or .txt file, a directory, or a hub id; paths count from the
            current directory), and optionally `name` (the configuration), `split` ("train" by default), `data_files`,
            `data_dir`, and `columns` (a renaming).
        setting: What holds it, for messages: "streams: general"; the name of the data set alone by default.

    Raises:
        ConfigurationError: The file, split or a column does not exist, the file cannot be read, or has no row.
    """
    from datasets import load_dataset, load_from_disk

    path, split = Path(spec["path"]).expanduser(), spec.get("split") or "train"
    builder = FILE_FORMATS.get(path.suffix.lower())
    with explain_loading(f"{setting or 'data set'}: {spec['path']!r}"):
        if builder:
            refuse_missing_file(path, setting or "data set")
            dataset = load_dataset(builder, data_files={"train": str(path)}, split=split)
        elif (path / "dataset_info.json").is_file():
            dataset = load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            dataset = load_from_disk(str(path))[split]
        else:
            options = {key: spec.get(key) for key in ("name", "data_files", "data_dir")}
            dataset = load_dataset(str(path) if path.exists() else spec["path"], split=split, **options)
    where = f"{setting}: columns" if setting else "columns"
    return rename_columns(dataset, parse_columns(spec.get("columns"), where), where)


@contextmanager
def explain_loading(what: str) -> Iterator[None]:
    """A context in which a data set is loaded: what `datasets` raises for a bad name or file becomes one line.

    Args:
        what: The setting and its value, which the message starts with.

    Raises:
        ConfigurationError: The data set cannot be loaded.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        with _quiet_errors():
            yield
    except ConfigurationError:
        raise
    # Without a cause: the message has what it says, and the command line then ends with the message alone.
    except (OSError, KeyError, ValueError) as error:
        if empty := re.search(r'Instruction "(\w+)" corresponds to no data', str(error)):
            raise ConfigurationError(f"{what}: its split {empty[1]!r} is empty") from None
        raise ConfigurationError(f"{what} cannot be loaded: {error}") from None
    except DatasetGenerationError as error:  # what is wrong with the file is in its cause
        raise ConfigurationError(f"{what} cannot be loaded: {error.__cause__ or error}") from None
    except StopIteration:  # what `datasets` makes of a file without a row
        raise ConfigurationError(f"{what} is empty") from None


@contextmanager
def _quiet_errors() -> Iterator[None]:
    """A context in which `datasets` does not log errors: it raises them too."""
    handlers = logging.getLogger("datasets").handlers
    quiet = lambda record: record.levelno < logging.ERROR  # noqa: E731
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)


def refuse_missing_file(path: Path, setting: str) -> None:
    """Refuse a file that is not there, with the nearest one that is.

    Raises:
        ConfigurationError: There is no such file.
    """
    if not path.is_file():
        hint = nearest_path(path) or f"Paths count from the current directory, {str(Path.cwd())!r}"
        raise ConfigurationError(f"{setting}: there is no file {str(path)!r}. {hint}")


def nearest_path(path: Path) -> str:
    """The question whether a file or folder beside one that does not exist was meant; "" where none is near."""
    if not path.parent.is_dir():
        return ""
    names = {other.name: str(path.parent / other.name) for other in path.parent.iterdir()}
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {names[near[0]]!r}?" if near else ""


def rename_columns(dataset: Any, mapping: Mapping[str, str] | None, setting: str = "dataset_columns") -> Any:
    """Rename columns of a data set (or of each in a `DatasetDict`), old name to new.

    Args:
        dataset: of `datasets`.
        mapping: old names to new ones.
        setting: What holds the mapping, for messages.

    Raises:
        ConfigurationError: A column does not exist, or the new name is taken by another one.
    """
    if not mapping:
        return dataset
    if isinstance(dataset, dict):  # a DatasetDict
        return type(dataset)({split: rename_columns(part, mapping, setting) for split, part in dataset.items()})
    columns = dataset.column_names
    if columns is None:  # an iterable data set whose columns are known only once it is read
        return dataset.rename_columns(dict(mapping))
    if missing := [column for column in mapping if column not in columns]:
        near = did_you_mean(missing[0], columns)
        raise ConfigurationError(
            f"{setting}: no column {missing[0]!r} in the data set. {near}It has {', '.join(columns)}"
        )
    if taken := [new for new in mapping.values() if new in columns and new not in mapping]:
        raise ConfigurationError(f"{setting}: the data set already has a column {taken[0]!r}; rename that one too")
    return dataset.rename_columns(dict(mapping))


def _read_mapping(value: Any, setting: str, example: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        value = _read_text(value, setting, example)
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{setting}: {value!r} is a {type(value).__name__}; expected a mapping or {example!r}")
    return dict(value)


def _read_text(text: str, setting: str, example: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{setting}: {text!r} starts like JSON, but is not: {error}") from error
    pairs: dict[str, str] = {}
    for part in split_outside_brackets(text):
        key, equals, item = part.partition("=")
        if not equals or not key.strip() or not item.strip():
            raise ConfigurationError(f"{setting}: {part.strip()!r} in {text!r} is not of the form {example!r}")
        if key.strip() in pairs:
            raise ConfigurationError(f"{setting}: {text!r} names {key.strip()!r} twice")
        pairs[key.strip()] = unquote(item)
    return pairs


def refuse_missing_columns(
    function: Callable[..., Any],
    columns: Collection[str],
    name: str,
    given: Collection[str] = ("prompts", "completions", "completion_ids"),
) -> None:
    """Refuse a reward function that cannot be called with a data set's columns, before a model loads.

    Args:
        function: of TRL's form: called with `given` and the data set's other columns, all of them, by name.
        columns: of the data set.
        name: what to call the function in the error.
        given: arguments that come from elsewhere.

    Raises:
        ConfigurationError: it has an argument without default that nothing gives, does not take one that it is given,
            or a column has the name of one of `given`.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C do not say
        return
    parameters = signature.parameters.values()
    wanted = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    passed = {column: None for column in columns if column not in ("prompt", "completion", "completion_ids")}
    if missing := [argument for argument in wanted if argument not in {*given, *passed}]:
        raise ConfigurationError(
            f"reward {name} wants the column(s) {', '.join(missing)}, which the data set lacks; it has "
            f"{', '.join(columns)}. Rename one, or choose another reward function"
        )
    if taken := [column for column in passed if column in given]:
        raise ConfigurationError(
            f"the data set's column(s) {', '.join(taken)} would be passed to reward {name} as what TRL passes under "
            "this name; rename the column(s)"
        )
    try:
        signature.bind(**dict.fromkeys(given), **passed)
    except TypeError as error:
        raise ConfigurationError(
            f"reward {name} cannot be called as TRL calls it, with {', '.join([*given, *passed])} by name: {error}. "
            "Add **kwargs to its arguments, which takes what it has no use for"
        ) from None


def _parse_stream(name: str, spec: Any) -> dict[str, Any]:
    spec = {"path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or not isinstance(spec.get("path"), str):
        raise ConfigurationError(
            f"streams: {name!r} is {spec!r}; expected a path or a mapping with the key 'path'. Data sets in memory go "
            "to the trainer: SFTTrainer(..., streams={...})"
        )
    if unknown := [key for key in spec if key not in SPEC_KEYS]:
        near = did_you_mean(unknown[0], SPEC_KEYS)
        raise ConfigurationError(
            f"streams: {name!r} has an unknown key {unknown[0]!r}. {near}Known are {', '.join(SPEC_KEYS)}"
        )
    columns = parse_columns(spec.get("columns"), f"streams: columns of {name!r}")
    return {**spec, **({"columns": columns} if columns else {})}
