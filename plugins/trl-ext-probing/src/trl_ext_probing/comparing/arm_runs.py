"""The runs of a comparison: an arm on a seed, at a learning rate, as jobs whose folders tell other settings apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from trl_ext.jobs import Costs, Job, read_costs
from trl_ext.specs import own_name, parse_specs
from trl_ext_probing.comparing.comparison import BASE, Arm, Comparison
from trl_ext_probing.comparing.measures import values_of
from trl_ext_probing.fingerprints import weights_fingerprint
from trl_ext_probing.results import slug, write
from trl_ext_probing.training_jobs import COSTS_FILE, MODEL, train

_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)[:.]\w+")
_WHOLE_VERSIONS = ("trl-ext", "trl", "transformers", "torch")


@dataclass(frozen=True)
class Run:
    """An arm on a seed.

    Args:
        asked: The comparison.
        output: Its folder.
        arm: None of the model before any training.
        seed: Of the training, the order of the data included.
        rate: The learning rate; None for that of the file.
        measures: The names of the measures to take.
    """

    asked: Comparison
    output: Path
    arm: Arm | None
    seed: int = 0
    rate: float | None = None
    measures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        rate = "" if self.rate is None else f", learning rate {self.rate:g}"
        return BASE if self.arm is None else f"{self.arm.name}, seed {self.seed}{rate}"

    @property
    def folder(self) -> Path:
        """Of all its jobs; other settings, data, weights or versions give another one."""
        if self.arm is None:
            return self.output / "runs" / f"{BASE}-{_digest(self._origin)}"
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return self.output / "runs" / f"{slug(self.arm.name)}{rate}-seed{self.seed}-{_digest(self._origin)}"

    @property
    def commands(self) -> list[str]:
        """The command lines that train the same."""
        stages = self.arm.stages if self.arm else ()
        return [shlex.join(["trl-ext", s.kind, "--config", str(self._config(i))]) for i, s in enumerate(stages)]

    @property
    def costs(self) -> Costs | None:
        """What its trainings took together; None where one has not begun."""
        found = [read_costs(self._stage(i) / COSTS_FILE) for i in range(len(self.arm.stages if self.arm else ()))]
        known = [costs for costs in found if costs is not None]
        if not known or len(known) < len(found):
            return None
        seconds, peak = sum(costs.seconds for costs in known), max(costs.peak_memory for costs in known)
        return Costs(seconds, sum(costs.steps for costs in known), sum(costs.tokens for costs in known), peak)

    def jobs(self) -> list[Job]:
        """Its trainings, and the measures of what they leave."""
        jobs = [self._training(i) for i in range(len(self.arm.stages))] if self.arm else []
        return [*jobs, self._measuring()]

    def write_configs(self) -> None:
        """Write the YAML of each training."""
        for i, stage in enumerate(self.arm.stages if self.arm else ()):
            own = {"model_name_or_path": self._model_before(i), "output_dir": str(self._model(i)), "seed": self.seed}
            rate = {} if self.rate is None else {"learning_rate": self.rate}
            self._stage(i).mkdir(parents=True, exist_ok=True)
            write(self._config(i), yaml.safe_dump({**stage.settings, **rate, **own}, sort_keys=False))

    def _training(self, i: int) -> Job:
        assert self.arm is not None
        kind = self.arm.stages[i].kind
        command = [kind, "--config", self._config(i)]
        arguments = {"folder": self._stage(i), "arguments": command, "forget_checkpoints": True}
        name = self.name if len(self.arm.stages) == 1 else f"{self.name}, {i + 1} {kind}"
        return Job(name, self._stage(i), train, arguments, self._origin | {"stage": i})

    def _measuring(self) -> Job:
        base = self.asked.base_model
        model = base if self.arm is None else str(self._model(len(self.arm.stages) - 1))
        wanted = {name: self.asked.content["measures"][name] for name in self.measures}
        found = {name: self._depends_on(name) for name in wanted}
        folders = {name: self.folder / "measures" / f"{name}-{_digest(found[name])}" for name in wanted}
        arguments = {"measures": wanted, "model": model, "base": base, "folders": folders}
        folder = self.folder / f"measured-{_digest(found)}"
        return Job(f"{self.name}, measures", folder, values_of, arguments, {"measures": found})

    def _depends_on(self, measure: str) -> dict[str, Any]:
        spec = self.asked.content["measures"][measure]
        files = files_in([self.asked.measures[measure].data, spec])
        return {"measure": spec, "files": files, "base": _weights(self.asked.base_model)}

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """All that decides the weights, as it is at the start: files may change while it is trained."""
        if self.arm is None:
            return {"weights": _weights(self.asked.base_model)}
        settings = [{"trainer": stage.kind, **stage.settings} for stage in self.arm.stages]
        return {
            "settings": settings,
            "seed": self.seed,
            "learning_rate": self.rate,
            "weights": _weights(str(self.arm.stages[0].settings["model_name_or_path"])),
            "files": files_in([_without_model(stage.settings) for stage in self.arm.stages]),
            "versions": _versions(tuple(sorted(set(_plugins(settings))))),
        }

    def _stage(self, i: int) -> Path:
        assert self.arm is not None
        return self.folder / f"{i + 1}-{self.arm.stages[i].kind}"

    def _config(self, i: int) -> Path:
        return self._stage(i) / "config.yaml"

    def _model(self, i: int) -> Path:
        return self._stage(i) / MODEL

    def _model_before(self, i: int) -> str:
        assert self.arm is not None
        return str(self._model(i - 1)) if i else str(self.arm.stages[0].settings["model_name_or_path"])


def files_in(settings: Any) -> dict[str, str]:
    """Every file and folder that settings name, in whatever spelling, with a digest of its content.

    A full stop or a slash in a text names no folder: the working folder and those above it do not count. Of modules,
    those of the working folder do, whether they are named as `module:function` or as `module.function`.
    """
    texts = list(_texts(settings))
    parts = {part for text in texts for part in (text, *re.split(r"[=,:\s\[\]{}]+", text)) if part}
    named = {part for part in parts if ("/" in part or "." in part) and os.path.exists(part)}
    named |= {file for text in texts for file in _modules_in(text) if os.path.exists(file)}
    return {part: _content(part) for part in sorted(named) if not Path.cwd().is_relative_to(Path(part).resolve())}


def _modules_in(text: str) -> Iterator[str]:
    for part in re.split(r"[=,\s\[\]{}]+", text):
        found = _MODULE.fullmatch(part)
        if found and not os.path.exists(part):
            path = found[1].replace(".", "/")
            yield from (f"{path}.py", f"{path}/__init__.py")


def _without_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "model_name_or_path"}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _signature(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes with the files of a path: contents are read once, though every run asks for them."""
    files = (file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file())
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _content(name: str) -> str:
    return _digest_of_files(_signature(Path(name)))


@cache
def _digest_of_files(signature: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _, _ in signature:
        with open(name, "rb") as file:
            total.update(f"{name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _weights(model: str) -> dict[str, str]:
    return _fingerprint(model, _signature(Path(model)))


@cache
def _fingerprint(model: str, signature: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
    return weights_fingerprint(model)


def _plugins(settings: list[dict[str, Any]]) -> Iterator[str]:
    for stage in settings:
        yield from (own_name(spec["name"]) for spec in parse_specs(stage.get("plugins")))


@cache
def _versions(plugins: tuple[str, ...]) -> dict[str, str]:
    """Of what trains: another version may train otherwise."""
    found = {name: metadata.version(name) for name in _WHOLE_VERSIONS}
    for name in plugins:
        for point in metadata.entry_points(group="trl_ext", name=name):
            if point.dist is not None:
                found[point.dist.metadata["Name"]] = point.dist.version
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
