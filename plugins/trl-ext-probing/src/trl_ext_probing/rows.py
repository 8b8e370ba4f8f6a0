"""The rows of a data set that a probe works on."""

from __future__ import annotations

from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.settings import DataSettings

Row = dict[str, Any]


def load_data(settings: DataSettings) -> Any:
    """The data set, with its columns renamed and no more rows than the limit.

    Raises:
        ConfigurationError: It cannot be loaded.
    """
    from trl_ext.data import load_dataset_spec, parse_columns

    data = load_dataset_spec(
        {
            "path": settings.dataset,
            "name": settings.dataset_config,
            "split": settings.split,
            "columns": parse_columns(settings.columns, "--columns"),
        }
    )
    return data.select(range(min(settings.limit or len(data), len(data))))


def load_problems(settings: DataSettings) -> list[Row]:
    """The rows of a data set of prompts, in memory.

    Raises:
        ConfigurationError: It cannot be loaded, has no column `prompt`, or an empty prompt.
    """
    return check_prompts(list(load_data(settings)), settings.dataset)


def check_prompts(rows: list[Row], name: str) -> list[Row]:
    """The rows, of which each has a prompt.

    Raises:
        ConfigurationError: There is no row, no column `prompt`, or an empty prompt.
    """
    if not rows:
        raise ConfigurationError(f"{name} has no rows")
    if "prompt" not in rows[0]:
        raise ConfigurationError(
            f"{name} has no column 'prompt' (there are {', '.join(rows[0])}); rename one: "
            f"--columns {next(iter(rows[0]))}=prompt"
        )
    for i, row in enumerate(rows):
        if not row["prompt"] or not isinstance(row["prompt"], str | list):
            raise ConfigurationError(f"{name}: the prompt of row {i} is {row['prompt']!r}")
    return rows
