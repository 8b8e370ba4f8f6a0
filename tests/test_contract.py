"""The public contract changes with its version only: docs/compatibility-promise.md says what belongs to it.

`contract.json` holds the signatures, fields and hooks of the last release. Record those of a new release, after its
version is set, with

    python tests/test_contract.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import trl_ext
from trl_ext.config import _PluginSettings
from trl_ext.hookspecs import API_VERSION, HOOKS, HookSpecs

RECORD = Path(__file__).parent / "contract.json"
MODULES = (
    "trl_ext.records",
    "trl_ext.gradients",
    "trl_ext.groups",
    "trl_ext.own_passes",
    "trl_ext.ranks",
    "trl_ext.errors",
    "trl_ext.options",
    "trl_ext.testing",
    "trl_ext.testing.conformance",
    "trl_ext.testing.ranks",
)
OPTIONAL = " = ..."
Contract = Mapping[str, Mapping[str, str]]
"""Public function, record or hook -> its parameters or fields, each with its type as written; what may be left out
ends in ` = ...`. Keys in brackets are no parameters: what is returned, a class's bases, a hook's kind and trainers."""


def contract() -> Contract:
    found: dict[str, dict[str, str]] = {f"trl_ext.{name}": {} for name in trl_ext.__all__}
    found["config"] = _fields(_PluginSettings)
    for hook, facts in HOOKS.items():
        # A hook is implemented with any subset of its arguments.
        found[f"hook {hook}"] = {
            **{
                name: text + OPTIONAL * name.isidentifier()
                for name, text in _signature(getattr(HookSpecs, hook)).items()
            },
            **{"(kind)": facts.kind, **{f"(in {trainer})": "yes" for trainer in facts.trainers}},
        }
    for module in map(import_module, MODULES):
        for name in _public(module):
            found |= dict(_described(f"{module.__name__}.{name}", getattr(module, name)))
    return found


def _public(module: ModuleType) -> list[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def _described(name: str, value: Any) -> Iterator[tuple[str, dict[str, str]]]:
    if inspect.isfunction(value):
        yield name, _signature(value)
    if not inspect.isclass(value):
        return
    arguments = _fields(value) if dataclasses.is_dataclass(value) else _signature(value.__init__)
    yield name, arguments | {"(bases)": ", ".join(base.__name__ for base in value.__bases__)}
    for attribute, member in vars(value).items():
        if not attribute.startswith("_") and inspect.isfunction(member):
            yield f"{name}.{attribute}", _signature(member)
        elif not attribute.startswith("_") and hasattr(member, "__get__") and inspect.getdoc(member):
            yield f"{name}.{attribute}", {"(kind)": "property"}


def _fields(record: type) -> dict[str, str]:
    required = (dataclasses.MISSING, dataclasses.MISSING)
    written = {name: text for base in reversed(record.__mro__) for name, text in inspect.get_annotations(base).items()}
    return {  # not `field.type`: transformers' parser of command lines overwrites those of configs
        field.name: _text(written[field.name], optional=(field.default, field.default_factory) != required)
        for field in dataclasses.fields(record)
        if field.init
    }


def _signature(function: Any) -> dict[str, str]:
    if not inspect.isfunction(function):  # a class without an `__init__` of its own
        return {}
    signature = inspect.signature(function)
    arguments = {
        p.name: _text(p.annotation, optional=p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        for p in signature.parameters.values()
        if p.name != "self"
    }
    return arguments | {"(returns)": _text(signature.return_annotation)}


def _text(annotation: Any, optional: bool = False) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text + OPTIONAL * optional


def broken(before: Contract, now: Contract) -> list[str]:
    """What code that is written against `before` relies on, and `now` does not give."""
    faults = []
    for owner, parts in before.items():
        if owner not in now:
            faults.append(f"{owner} is gone")
            continue
        for part in {**parts, **now[owner]}:
            was, is_now = parts.get(part), now[owner].get(part)
            if was is None and part.isidentifier() and not str(is_now).endswith(OPTIONAL):
                faults.append(f"{owner}: {part} is new and has to be given")
            elif was is not None and was != is_now:
                faults.append(f"{owner}: {part} was {was!r}, and is {is_now or 'gone'!r}")
    return faults


def added(before: Contract, now: Contract) -> list[str]:
    """What `now` gives beside `before`."""
    owners = [owner for owner in now if owner not in before]
    return owners + [
        f"{owner}: {part}" for owner in before if owner in now for part in now[owner] if part not in before[owner]
    ]


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def test_the_contract_changes_with_its_version_only() -> None:
    record = json.loads(RECORD.read_text())
    before, now = record["contract"], contract()
    released, current = version(record["api_version"]), version(API_VERSION)
    if faults := broken(before, now):
        assert current[0] > released[0], (
            f"plugins written for {record['api_version']} would break, and API_VERSION is {API_VERSION}: "
            f"{'; '.join(faults)}. Keep the old way for one minor version, as docs/compatibility-promise.md says"
        )
    if news := added(before, now):
        assert current > released, (
            f"raise the minor number of API_VERSION, and say so in CHANGELOG.md: {'; '.join(news)}"
        )


def test_the_changelog_names_the_contract_s_version() -> None:
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"### Contract {API_VERSION}\n" in text
    assert f"## {trl_ext.__version__}" in text


OLD: Contract = {
    "f": {"x": "int", "y": "int = ...", "(returns)": "int"},
    "hook h": {"a": "A = ...", "(kind)": "chain", "(in sft)": "yes"},
}


@pytest.mark.parametrize(
    ("now", "faults"),
    [
        (OLD, []),
        ({**OLD, "g": {"z": "int"}}, []),
        ({**OLD, "f": {**OLD["f"], "z": "int = ..."}}, []),
        ({**OLD, "hook h": {**OLD["hook h"], "b": "B = ..."}}, []),
        ({**OLD, "hook h": {**OLD["hook h"], "(in grpo)": "yes"}}, []),
        ({"f": OLD["f"]}, ["hook h is gone"]),
        ({**OLD, "f": {**OLD["f"], "z": "int"}}, ["f: z is new and has to be given"]),
        ({**OLD, "f": {**OLD["f"], "y": "int"}}, ["f: y was 'int = ...', and is 'int'"]),
        ({**OLD, "f": {"x": "int", "(returns)": "int"}}, ["f: y was 'int = ...', and is 'gone'"]),
        ({**OLD, "f": {**OLD["f"], "(returns)": "str"}}, ["f: (returns) was 'int', and is 'str'"]),
        (
            {**OLD, "hook h": {**OLD["hook h"], "(kind)": "exclusive"}},
            ["hook h: (kind) was 'chain', and is 'exclusive'"],
        ),
    ],
)
def test_what_breaks_a_contract_is_told_from_what_adds_to_it(now: Contract, faults: list[str]) -> None:
    assert broken(OLD, now) == faults
    assert bool(added(OLD, now)) == (len(now) > 2 or any(len(now[owner]) > len(OLD[owner]) for owner in now))


if __name__ == "__main__":
    RECORD.write_text(json.dumps({"api_version": API_VERSION, "contract": contract()}, indent=1) + "\n")
