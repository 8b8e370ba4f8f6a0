"""Files of settings: what is no YAML, no mapping, or says a thing twice is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trl_ext.errors import ConfigurationError, did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, PyYAML would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path, setting: str) -> dict[str, Any]:
    """Read a YAML file of settings; see `trl_ext.cli.read_yaml`."""
    if not path.is_file():
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.y*ml")))
        raise ConfigurationError(f"{setting}: there is no file {str(path)!r}. {near}".rstrip())
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigurationError(f"{path} {kind}; expected settings, each a line as `learning_rate: 1.0e-5`")
    return content
