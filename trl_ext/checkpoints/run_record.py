"""What a checkpoint says about the run that wrote it, and how a run that resumes from it differs.

Some differences change the run: other plugins, options, order or data. The policy of the config, `resume_changes`,
decides about them. Others belong to everyday life, such as another learning rate or batch size; they are reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from trl_ext.checkpoints.fingerprints import data_fingerprint
from trl_ext.options import MASK

_REPORTED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs"),
    *("optim", "weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "max_length", "packing", "loss_type", "num_generations", "steps_per_generation"),
    *("num_iterations", "beta", "epsilon", "temperature", "max_completion_length"),
)
"""Settings of TRL's configs whose change is reported and allowed."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of an object in memory, in the `repr` of a function and the like: another in every process."""


@dataclass
class Changes:
    """How a run differs from the one that wrote the checkpoint, a few words for each difference."""

    plugins: list[str] = field(default_factory=list)
    """Of plugins and their streams: `reset_plugin_state` allows them."""
    data: list[str] = field(default_factory=list)
    """Of the training data and its order."""
    settings: list[str] = field(default_factory=list)
    """Of settings that a resumed run may change."""
    fresh_plugins: set[str] = field(default_factory=set)
    """Plugins that have no state in the checkpoint, or that of another plugin."""
    fresh_streams: set[str] = field(default_factory=set)
    """Streams that have no position in the checkpoint, or one in other data."""


def plugin_record(plugin: Any) -> dict[str, Any]:
    """What the manifest keeps of an `ActivePlugin`."""
    instance = plugin.instance
    return {
        "name": plugin.name,
        "class": type(instance).__name__,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "options": _options(instance, plugin.options),
        "stateful": hasattr(instance, "state_dict"),
        "state_version": getattr(instance, "state_version", 1),
        "per_rank": bool(getattr(instance, "state_per_rank", False)),
    }


def run_record(args: Any, dataset: Any, streams: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of the run's config, its training data and its streams."""
    return {
        "data": data_fingerprint(dataset) | {"seed": args.seed if args.data_seed is None else args.data_seed},
        "streams": {
            role: data_fingerprint(s.dataset) | {"seed": s.seed, "shuffle": s.request.shuffle}
            for role, s in streams.items()
        },
        "settings": {name: _plain(getattr(args, name)) for name in _REPORTED if hasattr(args, name)},
    }


def compare(saved: Mapping[str, Any] | None, plugins: list[dict[str, Any]], run: Mapping[str, Any]) -> Changes:
    """Compare a manifest, None for a checkpoint of plain TRL, with the plugins and the run at hand."""
    changes = Changes()
    _compare_plugins(changes, [] if saved is None else saved["plugins"], plugins)
    if saved is None:
        changes.fresh_streams |= set(run["streams"])
        return changes
    before = saved["run"]
    changes.data += _differences("the training data", before["data"], run["data"])
    for role in sorted({*before["streams"], *run["streams"]}):
        _compare_stream(changes, role, before["streams"].get(role), run["streams"].get(role))
    changes.settings += _differences("the config", before["settings"], run["settings"])
    return changes


def _compare_plugins(changes: Changes, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    known, active = ({p["name"]: p for p in plugins} for plugins in (before, now))
    changes.plugins += [f"plugin '{name}' is no longer active" for name in known if name not in active]
    changes.plugins += [f"plugin '{name}' is new" for name in active if name not in known]
    common = [name for name in active if name in known]
    for name in common:
        old, new = known[name], active[name]
        if _identity(old) != _identity(new):
            changes.plugins.append(f"plugin '{name}' is {_identity(new)} (checkpoint: {_identity(old)})")
            changes.fresh_plugins.add(name)
        else:
            changes.plugins += _differences(f"plugin '{name}'", old["options"], new["options"])
            versions = ({"version": record["version"]} for record in (old, new))
            changes.settings += _differences(f"plugin '{name}'", *versions)
    order = [name for name in known if name in active]
    if order != common:
        changes.plugins.append(f"the order of plugins is {', '.join(common)} (checkpoint: {', '.join(order)})")
    changes.fresh_plugins |= {name for name in active if not known.get(name, {}).get("stateful")}


def _compare_stream(changes: Changes, role: str, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    if before is None or now is None:
        found = [f"stream '{role}' is {'new' if before is None else 'no longer used'}"]
    else:
        found = _differences(f"stream '{role}'", before, now)
    if found:
        changes.plugins += found
        changes.fresh_streams.add(role)


def _differences(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each value of `now` that is another in `before`; a value that one of them lacks counts as None."""
    names = [name for name in {**now, **before} if _plain(before.get(name)) != _plain(now.get(name))]
    if "hash" in names:
        names = [name for name in names if name != "hash"] or ["hash"]
    if names == ["hash"]:
        return [f"{what} has other rows"]
    return [f"{what} has {name}={now.get(name)} (checkpoint: {before.get(name)})" for name in names]


def _identity(record: Mapping[str, Any]) -> str:
    return f"{record['class']} of {record['distribution'] or 'no distribution'}"


def _options(instance: Any, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The options as every process has them, with a digest of the instance's own value for each that is masked."""
    portable = {name: _ADDRESS.sub("", json.dumps(value)) for name, value in shown.items()}
    return {
        name: _digest(getattr(instance, name)) if MASK in text else json.loads(text) for name, text in portable.items()
    }


def _digest(value: Any) -> str:
    return "xxh3:" + xxhash.xxh3_64(_ADDRESS.sub("", json.dumps(value, default=str)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON; an enum as its value."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def in_words(changes: Iterable[str]) -> str:
    """The differences in one line."""
    return "; ".join(changes)
