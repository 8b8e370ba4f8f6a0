"""The grammar of `plugins`: text, lists and mappings from configs, YAML and the command line to one canonical list."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.options import masked

PLUGINS_VARIABLE = "TRL_EXT_PLUGINS"
"""Environment variable that names the plugins of a run whose config does not."""

RESERVED = ("name", "label")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_INSTALLED = re.compile(rf"({_NAME.pattern}/)?{_NAME.pattern}")
# In a module, the class starts with a capital: `power:Alpha` is a class, and `power:alpha` an option without its value.
_PLACE = re.compile(r"[^:]*\.py:[A-Za-z_]\w*|[A-Za-z_][\w.]*:_*[A-Z]\w*")
_PLACE_FIRST = re.compile(rf"({_PLACE.pattern})(?=:|$)")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)
_CLOSING = {")": "(", "]": "[", "}": "{"}


def parse_specs(value: Any) -> list[dict[str, Any]]:
    """Give the canonical form of a `plugins` setting: `{"name": ..., **options}` each, in the order written.

    Accepts None, one text (`"power:alpha=10,ema"` or JSON), or a list of texts and mappings with the key `name`.
    A name is that of an installed plugin (`power`, or `distribution/power` where several distributions have one), or
    the place of a class: `./file.py:Class` or `package.module:Class`. Options written in a text stay strings; they
    become numbers by the plugin's annotations when it is activated. The result is JSON-able, and a fixed point:
    `parse_specs(parse_specs(x)) == parse_specs(x)`.

    Raises:
        ConfigurationError: The setting is not of this form, or one plugin comes twice without distinct labels.
    """
    specs = [] if value is None else _specs(value)
    taken: set[str] = set()
    for spec in specs:
        alike = [other["name"] for other in specs if own_name(other["name"]) == own_name(spec["name"])]
        if registered_name(spec) in taken or (len(alike) > 1 and "label" not in spec):
            labelled = f"plugins: [{alike[0]}:label=first, {alike[-1]}:label=second]"
            raise ConfigurationError(
                f"plugins: {registered_name(spec)!r} comes more than once. Keep one; or, of a plugin that can run "
                f"beside another of its kind, label each: {labelled}"
            )
        taken.add(registered_name(spec))
    return specs


def parse_one(text: str) -> dict[str, Any]:
    """Give the canonical form of one plugin, with options as in a config: `power:alpha=10`.

    Raises:
        ConfigurationError: The text is not of this form, or does not name one plugin.
    """
    specs = parse_specs(text)
    if len(specs) != 1:
        raise ConfigurationError(f"{text!r} names {len(specs)} plugins; give one")
    return specs[0]


def is_name(value: Any) -> bool:
    """Whether a plugin may have this name or label; it names folders of checkpoints too."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_place(name: str) -> bool:
    """Whether a spec's name is the place of a class, `./file.py:Class` or `package.module:Class`."""
    return _PLACE.fullmatch(name) is not None


def own_name(name: str) -> str:
    """A plugin's own name, without its distribution, file or module."""
    return re.split("[/:]", name)[-1]


def registered_name(spec: Mapping[str, Any]) -> str:
    """The name that a plugin's metrics and state go under: its label, or else its own name."""
    return spec.get("label", own_name(spec["name"]))


def config_line(spec: Mapping[str, Any], **changed: str) -> str:
    """Write a spec as the line of a config, with some options replaced: `plugins: [power:alpha=<float>]`.

    It is for messages, so secrets are masked.
    """
    options = {key: masked(value, key) for key, value in spec.items() if key != "name"} | changed
    text = ",".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items())
    return f"plugins: [{spec['name']}:{text}]" if text else f"plugins: [{spec['name']}]"


def split_outside_brackets(text: str, separator: str = ",") -> list[str]:
    """Split a text at each separator that is not inside brackets or quotes.

    Raises:
        ConfigurationError: A bracket or quote is not closed.
    """
    parts, start, open_, quote = [], 0, [], ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            open_.append(character)
        elif character in _CLOSING:
            if not open_ or open_.pop() != _CLOSING[character]:
                raise ConfigurationError(f"{text!r}: {character!r} at character {position + 1} closes nothing")
        elif character == separator and not open_:
            parts.append(text[start:position])
            start = position + 1
    if quote or open_:
        raise ConfigurationError(f"{text!r}: {quote or open_[-1]!r} is never closed")
    return [*parts, text[start:]]


def unquote(text: str) -> str:
    """Strip blanks, and one pair of quotes around the whole."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _specs(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, Mapping):
        return [_from_mapping(value)]
    if isinstance(value, list | tuple):
        return [spec for item in value for spec in _specs(item)]
    raise ConfigurationError(
        f"plugins: {value!r} is a {type(value).__name__}; expected a name such as 'power:alpha=10' or a mapping such "
        "as {'name': 'power', 'alpha': 10}. Pass instances to the trainer: SFTTrainer(..., plugins=[...])"
    )


def _from_text(text: str) -> list[dict[str, Any]]:
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return _specs(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"plugins: {text!r} starts like JSON, but is not: {error}") from error
    specs: list[dict[str, Any]] = []
    for part in split_outside_brackets(text):
        if not part.strip():
            continue
        if continued := _OPTION.fullmatch(part):
            if not specs:
                raise ConfigurationError(
                    f"plugins: {text!r} starts with an option; write the plugin first: 'name:{part.strip()}'"
                )
            _set_option(specs[-1], continued, text)
            continue
        name, option = _split_name(part.strip())
        specs.append(_named({"name": name}, text))
        if option.strip():
            first = _OPTION.fullmatch(option)
            if first is None:
                raise ConfigurationError(f"plugins: {option.strip()!r} in {text!r} is not of the form option=value")
            _set_option(specs[-1], first, text)
    return [_named(spec, text) for spec in specs]


def _split_name(text: str) -> tuple[str, str]:
    """Split what names a plugin from its first option."""
    place = _PLACE_FIRST.match(text)
    name, _, option = (place[0], ":", text[place.end() + 1 :]) if place else text.partition(":")
    return name.strip(), option


def _set_option(spec: dict[str, Any], match: re.Match[str], text: str) -> None:
    option = match[1]
    if option in spec:
        raise ConfigurationError(f"plugins: {text!r} sets {option!r} of {spec['name']!r} twice")
    spec[option] = unquote(match[2])


def _from_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    if "name" not in value:
        raise ConfigurationError(f"plugins: {dict(value)!r} has no key 'name'; write {{'name': 'power', 'alpha': 10}}")
    try:
        # Through JSON, so that what a checkpoint or YAML gives back equals what was put in.
        spec = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"plugins: {dict(value)!r} cannot be saved with the run ({error}). Give numbers, texts, lists and mappings,"
            " or pass an instance to the trainer: SFTTrainer(..., plugins=[...])"
        ) from error
    spec = {"name": spec.pop("name"), **spec}
    return _named(spec, repr(dict(value)))


def _named(spec: dict[str, Any], text: str) -> dict[str, Any]:
    if "label" in spec and not is_name(spec["label"]):
        raise ConfigurationError(
            f"plugins: label {spec['label']!r} in {text!r} is not a name (letters, digits, '_', '-', '.')"
        )
    name = spec["name"]
    if isinstance(name, str) and name.endswith(".py"):
        raise ConfigurationError(f"plugins: {name!r} in {text!r} is a file; name the class too: {name}:MyPlugin")
    if not isinstance(name, str) or not (_INSTALLED.fullmatch(name) or is_place(name)):
        raise ConfigurationError(
            f"plugins: name {name!r} in {text!r} is not a name (letters, digits, '_', '-', '.'), and neither "
            "distribution/name, ./file.py:Class nor package.module:Class"
        )
    return spec
