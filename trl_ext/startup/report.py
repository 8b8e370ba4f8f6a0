"""What ran: a header on the screen, the same as a file in the run folder, and a section in the model card."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_ext.engine.streams import Stream
from trl_ext.hookspecs import API_VERSION, HOOKS
from trl_ext.options import option_fields
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.plugins.written_options import default_of

RUN_FILE = "trl_ext_run.json"
RAW_FOLDER = "raw"
"""Folder beside the final model, with the weights that training ended with, where others are deployed."""
WIDTH = 80
"""Columns of the header."""
_CARD_START = "<!-- trl_ext -->"


def run_facts(kind: str, plugins: PluginSet, streams: Mapping[str, Stream]) -> dict[str, Any]:
    """Plugins with origin, options and hooks in their order, owners of exclusive hooks, streams and versions."""
    called = [hook for hook, facts in HOOKS.items() if kind in facts.trainers]
    return {
        "trainer": kind,
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")}
        | {"trl_ext": version("trl-ext"), "trl_ext API": API_VERSION},
        "plugins": [
            {
                "name": p.name,
                "origin": p.origin,
                "options": p.options,
                "changed": _changed_options(p.instance, p.options),
                "cost": getattr(p.instance, "cost", ""),
                "hooks": [h for h in called if any(owner == p.name for owner, _ in plugins.calls(h))],
                "citation": p.citation,
            }
            for p in plugins
        ],
        "exclusive": {
            hook: plugins.owner(hook) for hook in called if HOOKS[hook].kind == "exclusive" and plugins.implements(hook)
        },
        "streams": {
            role: {"samples": len(stream.dataset), "seed": stream.seed, **_request(stream.request)}
            for role, stream in streams.items()
        },
    }


def _changed_options(instance: Any, options: Mapping[str, Any]) -> list[str]:
    """The options that a run has chosen otherwise than the plugin's author."""
    fields = option_fields(type(instance)) if options else {}
    return [name for name, value in options.items() if default_of(fields[name], missing=object()) != value]


def _request(request: Any) -> dict[str, Any]:
    return {k: getattr(request, k) for k in ("batch_size", "when", "on_exhausted", "shuffle")}


def header(facts: dict[str, Any]) -> str:
    """The run's facts as text: what differs from the defaults, in lines that a terminal holds."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [*_wrapped(f"trl_ext {facts['trainer']} run ({versions})", "  ")]
    for i, plugin in enumerate(facts["plugins"], 1):
        options = ", ".join(f"{name}={plugin['options'][name]}" for name in plugin["changed"]) or "default options"
        lines += _wrapped(f"  {i}. {plugin['name']} ({plugin['origin']}): {options}", "     ")
        lines += _wrapped(f"     hooks: {', '.join(plugin['hooks'])}", "       ")
        if plugin["cost"]:
            lines += _wrapped(f"     cost: {plugin['cost']}", "       ")
    for hook, owner in facts["exclusive"].items():
        lines += _wrapped(f"  {hook} belongs to {owner}", "    ")
    for role, stream in facts["streams"].items():
        lines += _wrapped(f"  stream {role}: " + ", ".join(f"{k}={v}" for k, v in stream.items()), "    ")
    return "\n".join(lines)


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def report_run(kind: str, plugins: PluginSet, streams: Mapping[str, Stream], folder: Path) -> None:
    """Show what runs, before the first step, and write the same to `trl_ext_run.json` in the run folder."""
    facts = run_facts(kind, plugins, streams)
    print(header(facts), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(facts, indent=2, default=str) + "\n")


def add_to_model_card(path: Path, plugins: PluginSet) -> None:
    """Append the plugins, their options and citations to a model card; a card that has the section keeps it."""
    text = path.read_text() if path.is_file() else ""
    if _CARD_START in text:
        return
    lines = [
        _CARD_START,
        "## Plugins",
        "",
        f"Trained with trl_ext {version('trl-ext')} and these plugins, in order:",
        "",
    ]
    for p in plugins:
        options = ", ".join(_code(f"{k}={v}") for k, v in p.options.items()) or "default options"
        cited = f" Source: {_plain(p.citation)}" if p.citation else ""
        lines.append(f"- **{_plain(p.name)}** ({_plain(p.origin)}), {options}.{cited}")
    if (owner := plugins.owner("deployed_weights")) is not None:
        lines += ["", where_weights_are(owner)]
    path.write_text(text.rstrip() + "\n\n" + "\n".join(lines) + "\n")


def _plain(text: str) -> str:
    """A foreign text on one line of Markdown: without HTML, and without a line that a heading could begin."""
    return html.escape(" ".join(text.split()), quote=False)


def _code(text: str) -> str:
    """The same as code, which nothing but a backtick ends."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def where_weights_are(owner: str) -> str:
    """Say which weights are saved where, in a run in which the plugin `owner` deploys others than are trained."""
    return (
        f"`trainer.save_model()` writes the weights that `{owner}` deploys and, where training ended with others, "
        f"those into `{RAW_FOLDER}`. `model.save_pretrained()` writes the weights that training ended with."
    )
