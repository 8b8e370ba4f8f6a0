"""What the methods refuse, before a model loads, and the rows that only a step can show."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from mixing_runs import checksum_reward, constant_reward, demonstrations, grpo
from trl_ext_mixing import HPT, Chord, ReLIFT

from trl_ext.errors import ConfigurationError, PluginError

PLAIN: dict[str, Any] = {"stream": False, "data": demonstrations()}


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (Chord, {"mu": 1.2}, "mu=1.2"),
        (Chord, {"stream_row": "i", "demonstrations": "completion"}, "exclude each other"),
        (Chord, {"stream_row": "i", "max_length": 9}, "max_length=9 may drop rows"),
        (Chord, {"stream_row": "i", "batch_size": 4}, "batch_size=4 would do nothing"),
        (Chord, {"stream_row": "i", "on_exhausted": "stop"}, "on_exhausted='stop' does nothing"),
        (Chord, {"demonstrations": "c", "on_exhausted": "error"}, "on_exhausted='error' does nothing"),
        (Chord, {"demonstrations": "c", "phi": True}, "phi weighs the tokens of a stream"),
        (Chord, {"decay": 0.0}, "decay=0.0"),
        (HPT, {"gamma": 1.0}, "gamma=1.0"),
        (HPT, {"sft_coefficient": 0.0}, "sft_coefficient=0.0"),
        (ReLIFT, {"buffer_size": 0}, "buffer_size=0"),
        (ReLIFT, {"lr_ratio": -1.0}, "lr_ratio=-1.0"),
    ],
)
def test_values_out_of_range_are_named(plugin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin(**options)


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no column 'solution'"):
        grpo(tmp_path, ["hpt:demonstrations=solution"], stream=False, data=demonstrations())
    with pytest.raises(ConfigurationError, match=r"stream_row='i'.*no column 'i'"):
        grpo(tmp_path, ["chord:stream_row=i"])
    with pytest.raises(ConfigurationError, match="num_iterations=2"):
        grpo(tmp_path, ["hpt"], stream=False, data=demonstrations(), num_iterations=2)
    with pytest.raises(ConfigurationError, match="steps_per_generation=2"):
        grpo(
            tmp_path,
            ["parallel-averaging:demonstrations=completion"],
            stream=False,
            data=demonstrations(),
            steps_per_generation=2,
        )


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(["chord", "hpt", "parallel-averaging", "relift", "surgery"], 2))
)
def test_two_methods_at_once_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    given = {**PLAIN, "stream": None} if {"chord", "parallel-averaging", "surgery"} & set(pair) else PLAIN
    with pytest.raises(ConfigurationError, match=r"(\S+) and (?!\1)\S+ would each bring SFT into the step"):
        grpo(tmp_path, list(pair), **given)


@pytest.mark.parametrize("plugin", ["hpt", "relift", "chord:demonstrations=completion"])
def test_images_dropped_columns_and_reentrant_checkpointing_are_refused(tmp_path: Path, plugin: str) -> None:
    data = demonstrations()
    with pytest.raises(ConfigurationError, match="text alone, but the data has 'images'"):
        grpo(tmp_path, [plugin], stream=False, data=data.add_column("images", [[]] * len(data)))
    with pytest.raises(ConfigurationError, match="remove_unused_columns=True drops 'completion'"):
        grpo(tmp_path, [plugin], remove_unused_columns=True, **PLAIN)
    reentrant: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        grpo(tmp_path, [plugin], **reentrant, **PLAIN)


def test_the_reward_that_decides_is_named(tmp_path: Path) -> None:
    two: dict[str, Any] = {"reward": [checksum_reward, constant_reward], **PLAIN}
    for plugin in ("hpt", "relift"):
        with pytest.raises(ConfigurationError, match=r"reward=checksum_reward \(or constant_reward\)"):
            grpo(tmp_path, [plugin], **two)
        grpo(tmp_path, [f"{plugin}:reward=constant_reward"], **two)

    class Judges:
        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return constant_reward(completions)

    partial: dict[str, Any] = {"reward": [functools.partial(checksum_reward), Judges()], **PLAIN}
    with pytest.raises(ConfigurationError, match=r"reward=checksum_reward \(or Judges\)"):
        grpo(tmp_path, ["hpt"], **partial)
    for plugin in ("hpt:reward=chekcsum", "chord:reward=chekcsum,demonstrations=completion"):
        with pytest.raises(ConfigurationError, match="'chekcsum' is not one of the reward functions: checksum_reward"):
            grpo(tmp_path, [plugin], **PLAIN)


def test_a_missing_demonstration_is_named(tmp_path: Path) -> None:
    data = demonstrations().remove_columns("completion").add_column("completion", [""] * 12)
    with pytest.raises(PluginError, match="column 'completion' is empty for the prompt"):
        grpo(tmp_path, ["hpt"], stream=False, data=data, reward=constant_reward).train()
    messages = Dataset.from_list([{**row, "completion": [{"role": "assistant", "content": "1"}]} for row in data])
    with pytest.raises(PluginError, match="holds messages, but the prompt is text"):
        grpo(tmp_path, ["hpt"], stream=False, data=messages, reward=constant_reward).train()


@pytest.mark.parametrize("row", [-1, 12])
def test_a_row_that_the_stream_lacks_is_named(tmp_path: Path, row: int) -> None:
    data = demonstrations().remove_columns("completion").add_column("row", [row] * 12)
    with pytest.raises(PluginError, match=rf"chord.*row {row} was asked of the stream 'sft', which has rows 0 to 11"):
        grpo(tmp_path, ["chord:stream_row=row"], data=data).train()
