"""Writes docs/plugins.md from what plugins say of themselves: `python docs/gallery.py`.

The plugins of this repository are read from their entry points and classes, those of others from docs/third_party.yaml.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from typing import Any

import yaml
from conformance import in_words, read
from generated import DOCS, _first_sentence, _linked, _table

from trl_ext.records import trainer_name

PAGE = DOCS / "plugins.md"
THIRD_PARTY = DOCS / "third_party.yaml"
COLUMNS = (
    "name",
    "kind",
    "what it does",
    "source",
    "trainers",
    "cost",
    "does not support",
    "conformance",
    "distribution",
)
KINDS = {
    "per_token_loss": "objective",
    "policy_loss": "policy loss",
    "deployed_weights": "averaging",
    "gradients_ready": "gradient",
    "sample_weights": "sample weights",
    "advantages": "advantages",
    "prompt_order": "prompts",
    "auxiliary_losses": "auxiliary loss",
    "wrap_optimizer": "optimizer",
}
"""The hook that says best what a plugin is, the first one that it has; one without any of them is a diagnostic."""
INTRODUCTION = """\
# Gallery of plugins

<!-- Written by docs/gallery.py; edit docs/third_party.yaml or the plugins instead, and run it again. -->

Every plugin of this repository, and those that others have published. When to use which of ours is in
[the table of methods](methods/index.md).

{ours}

*Conformance* is how many cases of the [conformance kit](write/conformance.md) have passed, by
`trl-ext plugins check --run NAME`, of those that mean something for the plugin. The others are declared unsupported, or
could not run on the machine at hand; `docs/conformance.yaml` has the reasons. A plugin without a number needs data or
models of its own: its tests run the kit with them.

## Plugins of others

{others}

Nobody here has reviewed them: they are installed and named like any other code that you run.

## Add yours

Add an entry to `docs/third_party.yaml`, run `python docs/gallery.py` and open a pull request with both files:

```{{code-block}} yaml
- name: my-loss
  kind: objective
  summary: Weighs tokens by their probability.
  citation: arXiv 1708.02002
  trainers: [sft]
  cost: none that can be measured
  unsupported: []
  conformance: SFT 20 of 20
  distribution: trl-ext-my-loss
  url: https://pypi.org/project/trl-ext-my-loss
```

`unsupported` lists the cases of the conformance kit that the plugin declares not to support. Leave out what is empty.
"""


def page() -> str:
    listed = yaml.safe_load(THIRD_PARTY.read_text()) or ()
    others = [_row(plugin, f"[{plugin['distribution']}]({plugin['url']})") for plugin in listed]
    return INTRODUCTION.format(
        ours=_table(COLUMNS, [*_plugins(), *_probes()]),
        others=_table(COLUMNS, others) if others else "None is listed yet.",
    )


def _distributions() -> set[str]:
    """Names of the distributions of this repository."""
    return {tomllib.loads(path.read_text())["project"]["name"] for path in DOCS.parent.glob("plugins/*/pyproject.toml")}


def _points(group: str) -> list[tuple[metadata.EntryPoint, str]]:
    """The entry points of this repository's distributions, each with its distribution's name."""
    points = [(point, point.dist.name) for point in metadata.entry_points(group=group) if point.dist is not None]
    return sorted(
        (point for point in points if point[1] in _distributions()), key=lambda point: (point[1], point[0].name)
    )


def plugins() -> list[str]:
    """Names of this repository's plugins."""
    return [point.name for point, _ in _points("trl_ext")]


def _plugins() -> list[tuple[str, ...]]:
    from trl_ext.plugins.declarations import read_declarations
    from trl_ext.plugins.implementations import marked_hooks

    rows, recorded = [], read()
    for point, distribution in _points("trl_ext"):
        plugin, name = point.load(), point.name
        row = {
            "name": name,
            "kind": next((kind for hook, kind in KINDS.items() if hook in marked_hooks(plugin)), "diagnostic"),
            "summary": _first_sentence(plugin),
            "citation": getattr(plugin, "citation", ""),
            "trainers": read_declarations(plugin, name, name, name).trainers,
            "cost": getattr(plugin, "cost", ""),
            "unsupported": getattr(plugin, "unsupported", {}),
            "conformance": in_words(recorded.get(name, {})),
        }
        rows.append(_row(row, distribution))
    return rows


def _probes() -> list[tuple[str, ...]]:
    return [
        _row({"name": point.name, "kind": "probe", "summary": _first_sentence(point.load())}, distribution)
        for point, distribution in _points("trl_ext.probes")
    ]


def _row(plugin: dict[str, Any], distribution: str) -> tuple[str, ...]:
    return (
        f"`{plugin['name']}`",
        plugin["kind"],
        plugin["summary"],
        _linked(plugin.get("citation", "")),
        ", ".join(trainer_name(trainer) for trainer in plugin.get("trainers", ())),
        plugin.get("cost", ""),
        ", ".join(plugin.get("unsupported", ())),
        plugin.get("conformance", ""),
        distribution,
    )


if __name__ == "__main__":
    PAGE.write_text(page())
