"""What a refusal of the core advises is tried: the run that follows it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from datasets import IterableDataset
from helpers import Nll, Plugin

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.records import StreamRequest
from trl_ext.testing.runs import MAKE, additions


@dataclass(eq=False)
class Policy(Plugin):
    @hookimpl
    def policy_loss(self, tokens):
        return -tokens.log_probs * tokens.advantages


@dataclass(eq=False)
class Orders(Plugin):
    @hookimpl
    def prompt_order(self, order):
        return order


@dataclass(eq=False)
class Wants(Plugin):
    label: str = ""

    @hookimpl
    def streams(self):
        return [StreamRequest("general")]


def prompts() -> Any:
    return additions(32, "prompt_only")


def streaming() -> IterableDataset:
    return prompts().to_iterable_dataset()


def loss_func(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum()


Settings = dict[str, Any]
GENERAL = {"general": additions(8)}
ADVICE: dict[str, tuple[str, list[Any], Settings, str, list[Any], Settings]] = {
    # trainer; plugins and settings that are refused; the advice; plugins and settings that follow it
    "loss_type": ("sft", [Nll], {"loss_type": "dft"}, "set loss_type='nll'", [Nll], {"loss_type": "nll"}),
    "loss_type, plugin": ("sft", [Nll], {"loss_type": "dft"}, "or remove the plugin", [], {"loss_type": "dft"}),
    "compute_loss_func": (
        "sft",
        [Nll],
        {"trainer": {"compute_loss_func": loss_func}},
        "pass only one of the two",
        [],
        {"trainer": {"compute_loss_func": loss_func}},
    ),
    "label smoothing": (
        "sft",
        [Nll],
        {"label_smoothing_factor": 0.1},
        "set it to 0",
        [Nll],
        {"label_smoothing_factor": 0},
    ),
    "batch size": (
        "sft",
        [Nll],
        {"auto_find_batch_size": True},
        "set the batch size yourself",
        [Nll],
        {"per_device_train_batch_size": 2},
    ),
    "mask": ("grpo", [Policy], {"off_policy_mask_threshold": 0.5}, "unset it", [Policy], {}),
    "entropy": (
        "grpo",
        [Policy],
        {"use_adaptive_entropy": True},
        "use a constant entropy_coef",
        [Policy],
        {"entropy_coef": 0.01},
    ),
    "cispo": (
        "grpo",
        [Policy],
        {"loss_type": "cispo", "epsilon_high": 0.5},
        "set epsilon_high >= 1",
        [Policy],
        {"loss_type": "cispo", "epsilon_high": 1.0},
    ),
    "streaming": (
        "grpo",
        [Orders],
        {"train": streaming()},
        "load it with streaming=False",
        [Orders],
        {"train": prompts()},
    ),
    "dispatch": (
        "grpo",
        [Orders],
        {"accelerator_config": {"dispatch_batches": True}},
        "dispatch_batches=True draws them on rank 0 alone, remove it",
        [Orders],
        {},
    ),
    "no stream": ("sft", [Wants], {}, "add `streams: ", [Wants], {"streams": GENERAL}),
    "a stream nobody reads": ("sft", [Nll], {"streams": GENERAL}, "remove them from `streams`", [Nll], {}),
    "a stream nobody reads, plugin": (
        "sft",
        [Nll],
        {"streams": GENERAL},
        "or activate the plugin that reads them",
        [Nll, Wants],
        {"streams": GENERAL},
    ),
    "objective without data": (
        "grpo",
        [Nll],
        {},
        "give a plugin that takes a stream its data",
        [Nll, Wants],
        {"streams": GENERAL},
    ),
    "twice": (
        "sft",
        [Wants, Wants],
        {"streams": GENERAL},
        "set a `label` on the instance",
        [Wants, lambda: Wants(label="second")],
        {"streams": GENERAL},
    ),
    "twice, by name": (
        "sft",
        [],
        {"names": ["ema:decay=0.5", "ema:decay=0.9"]},
        "Keep one",
        [],
        {"names": ["ema:decay=0.5"]},
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_can_be_followed(tmp_path, case):
    kind, plugins, settings, advice, followed_plugins, followed = ADVICE[case]
    with pytest.raises(ConfigurationError) as caught:
        MAKE[kind](tmp_path / "run", plugins=[make() for make in plugins], **settings)
    assert advice in str(caught.value)
    MAKE[kind](tmp_path / "run", plugins=[make() for make in followed_plugins], **followed)
