"""What the methods refuse, before a model loads, and the rows that only a step can show."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from mixing_runs import checksum_reward, constant_reward, demonstrations, grpo
from torch import Tensor
from trl_ext_mixing import HPT, Chord, ParallelAveraging, ReLIFT

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.options import check_options
from trl_ext.plugins import activate

PLAIN: dict[str, Any] = {"stream": False, "data": demonstrations()}


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (Chord, {"mu": 1.2}, r"mu=1.2 is not in \[0, 1\]"),
        (Chord, {"mu_end": -0.1}, r"mu_end=-0.1 is not in \[0, 1\]"),
        (Chord, {"decay": 0.0}, "decay=0.0 is not > 0"),
        (Chord, {"warmup": -1.0}, "warmup=-1.0 is not >= 0"),
        (Chord, {"schedule": "step"}, "schedule='step' is not one of linear, cosine"),
        (Chord, {"batch_size": 0}, "batch_size=0 is not >= 1"),
        (Chord, {"max_length": 1}, "max_length=1 is not >= 2"),
        (HPT, {"gamma": 1.0}, r"gamma=1.0 is not in \[0, 1\)"),
        (HPT, {"sft_coefficient": 0.0}, "sft_coefficient=0.0 is not > 0"),
        (HPT, {"max_length": 1}, "max_length=1 is not >= 2"),
        (ReLIFT, {"buffer_size": 0}, "buffer_size=0 is not >= 1"),
        (ReLIFT, {"batch_size": 0}, "batch_size=0 is not >= 1"),
        (ReLIFT, {"lr_ratio": -1.0}, "lr_ratio=-1.0 is not > 0"),
        (ReLIFT, {"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not >= 0"),
        (ParallelAveraging, {"coefficient": 1.5}, r"coefficient=1.5 is not in \[0, 1\]"),
        (ParallelAveraging, {"coefficient_end": -0.1}, r"coefficient_end=-0.1 is not in \[0, 1\]"),
        (ParallelAveraging, {"lr_ratio": 0.0}, "lr_ratio=0.0 is not > 0"),
        (ParallelAveraging, {"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not >= 0"),
        (ParallelAveraging, {"schedule": "step"}, "schedule='step' is not one of linear, cosine"),
        (ParallelAveraging, {"mode": "weights"}, "mode='weights' is not one of updates, gradients"),
    ],
)
def test_values_out_of_range_are_named(plugin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(plugin(**options))


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
def test_two_methods_at_once_are_refused(pair: tuple[str, str]) -> None:
    for names in (pair, pair[::-1]):
        with pytest.raises(ConfigurationError, match="Both bring SFT into the step") as error:
            activate(list(names), trainer="grpo")
        assert all(repr(name) in str(error.value) for name in pair)


def test_advantages_that_hpt_has_set_to_zero_are_not_set_anew() -> None:
    class SetsAnew:
        requires_api, citation, provides = "1", "test", ("new-advantages",)

        @hookimpl
        def advantages(self, advantages: Tensor) -> Tensor:
            return torch.ones_like(advantages)

    with pytest.raises(ConfigurationError, match=r"has to be named after.*also those of the prompts that go to SFT"):
        activate([], [HPT(), SetsAnew()], trainer="grpo")
    assert len(activate([], [SetsAnew(), HPT()], trainer="grpo")) == 2


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
