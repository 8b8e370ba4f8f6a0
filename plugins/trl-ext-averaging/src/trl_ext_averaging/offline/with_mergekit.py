"""Merge methods beyond linear ones, done by mergekit (LGPL, optional: `pip install mergekit`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.compatibility import check_compatible


def mergekit_config(
    method: str,
    inputs: Sequence[Path],
    weights: Sequence[float] | None,
    base: Path | None,
    parameters: Mapping[str, Any],
    dtype: str | None,
) -> dict[str, Any]:
    """The YAML that mergekit reads, as a mapping; `parameters` are those of its method, such as `density` of TIES.

    Raises:
        ConfigurationError: another number of weights than of inputs.
    """
    if weights is not None and len(weights) != len(inputs):
        raise ConfigurationError(f"--weights gives {len(weights)} numbers for {len(inputs)} inputs")
    models: list[dict[str, Any]] = [{"model": str(path)} for path in inputs]
    for model, weight in zip(models, weights or (), strict=False):
        model["parameters"] = {"weight": weight}
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype or "float32"}
    if parameters:
        config["parameters"] = dict(parameters)
    if base is not None:
        config["base_model"] = str(base)
    return config


def merge(config: Mapping[str, Any], inputs: Sequence[Checkpoint], folder: Path) -> None:
    """Let mergekit write the merged model to a folder.

    Raises:
        CheckpointError: the inputs do not belong together.
        ConfigurationError: mergekit is not installed, refuses the configuration, or fails.
    """
    if any(checkpoint.kind == "adapter" for checkpoint in inputs):
        raise ConfigurationError("mergekit merges models; merge the adapters into their base first")
    check_compatible(inputs, any_dtype=True)
    try:
        from mergekit.config import MergeConfiguration  # type: ignore[import-not-found,unused-ignore]
        from mergekit.merge import MergeOptions, run_merge  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigurationError("mergekit is not installed: pip install mergekit") from error
    try:
        parsed = MergeConfiguration.model_validate(dict(config))
    except ValueError as error:
        raise ConfigurationError(f"mergekit refuses this merge: {' '.join(str(error).split())}") from error
    try:
        run_merge(parsed, str(folder), MergeOptions(copy_tokenizer=True, quiet=True))
    except Exception as error:  # what a method of mergekit finds wrong with models and parameters
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"mergekit fails: {type(error).__name__}: {reason}") from None
