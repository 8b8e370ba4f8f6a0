"""Refusals that say what to do instead: each is met, its advice is followed, and then the run is accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixing_runs import checksum_reward, constant_reward, demonstrations, grpo
from test_composite import EstimatesFromAll, parameters, step
from trl_ext_mixing import ParallelAveraging, chunks
from trl_ext_mixing.composite import BranchAverage
from trl_ext_mixing.run_checks import refuse_without_own_forward
from trl_ext_mixing.sft_sources import DemonstrationColumn

from trl_ext.errors import ConfigurationError

ROWS = demonstrations().add_column("row", list(range(12)))
STREAM = {"stream": demonstrations(), "data": ROWS.remove_columns("completion")}
PLAIN: dict[str, Any] = {"stream": False, "data": ROWS}
BOTH: dict[str, Any] = {"stream": demonstrations(), "data": ROWS}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}

ADVICE: list[tuple[str, dict[str, Any], str, str, dict[str, Any]]] = [
    # plugin, settings, what the refusal advises, plugin and settings with the advice followed
    (
        "chord:stream_row=row,demonstrations=completion", BOTH, "exclude each other; leave one out",
        "chord:stream_row=row", BOTH,
    ),
    (
        "chord:stream_row=row,batch_size=4", STREAM, "batch_size=4 would do nothing; leave it out",
        "chord:stream_row=row", STREAM,
    ),
    (
        "surgery:stream_row=row,on_exhausted=stop", STREAM, "on_exhausted='stop' does nothing.*leave it out",
        "surgery:stream_row=row", STREAM,
    ),
    (
        "chord:demonstrations=completion,on_exhausted=error", PLAIN, "on_exhausted='error' does nothing.*leave it out",
        "chord:demonstrations=completion", PLAIN,
    ),
    (
        "chord:stream_row=row,max_length=9", STREAM, "leave it out and cut the demonstrations beforehand",
        "chord:stream_row=row", STREAM,
    ),
    (
        "parallel-averaging:mode=gradients,lr_ratio=0.5", BOTH, "lr_ratio=0.5 needs two.*use mode=updates",
        "parallel-averaging:mode=updates,lr_ratio=0.5", BOTH,
    ),
    (
        "parallel-averaging:mode=gradients,skip_equal_rewards=true", BOTH, "needs two.*use mode=updates",
        "parallel-averaging:mode=updates,skip_equal_rewards=true", BOTH,
    ),
    (
        "hpt", {**PLAIN, "num_iterations": 2, "steps_per_generation": 2},
        "set num_iterations=1 and leave steps_per_generation out",
        "hpt", {**PLAIN, "num_iterations": 1},
    ),
    (
        "relift", {**PLAIN, "remove_unused_columns": True}, "drops 'completion'; set it to False",
        "relift", {**PLAIN, "remove_unused_columns": False},
    ),
    (
        "hpt", {**PLAIN, **CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "set gradient_checkpointing_kwargs={'use_reentrant': False}",
        "hpt", {**PLAIN, **CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    (
        "relift", {**PLAIN, "reward": [checksum_reward, constant_reward]},
        r"reward=checksum_reward \(or constant_reward\)",
        "relift:reward=constant_reward", {**PLAIN, "reward": [checksum_reward, constant_reward]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plugin", "settings", "advice", "instead", "others"), ADVICE, ids=lambda value: str(value)[:40]
)
def test_the_advice_of_a_refusal_leads_to_a_run(
    tmp_path: Path, plugin: str, settings: dict[str, Any], advice: str, instead: str, others: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=advice):
        grpo(tmp_path, [plugin], **settings)
    trainer = grpo(tmp_path, [instead], max_steps=1, **others)
    trainer.train()
    assert trainer.state.global_step == 1


def test_without_the_other_distribution_pcgrad_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl_ext_data_regularization.weightings", None)
    with pytest.raises(ConfigurationError, match=r"surgery: weighting='half-space' comes with.*use weighting=pcgrad"):
        grpo(tmp_path, ["surgery:weighting=half-space"])
    grpo(tmp_path, ["surgery:weighting=pcgrad"])


def test_on_sharded_parameters_a_stream_is_advised_only_to_those_that_take_one() -> None:
    """HPT and ReLIFT take none. That DDP and rows of the stream work where they are advised is in test_two_ranks.py."""
    run: Any = SimpleNamespace(sharding="fsdp2", columns=("prompt", "completion"), args=None)
    with pytest.raises(ConfigurationError, match=r"\(fsdp2\) are gathered .* all ranks make; use DDP$"):
        refuse_without_own_forward(run, "hpt: demonstrations='completion'")
    column = DemonstrationColumn(
        batch_size=8, on_exhausted="cycle", max_length=None, column="completion", setting="chord"
    )
    advice = "use DDP, or give the demonstrations as the stream 'sft' and the numbers of its rows by stream_row$"
    with pytest.raises(ConfigurationError, match=advice):
        column.check(run)


def test_another_optimizer_or_mode_is_advised_where_one_cannot_be_stepped_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", {"cpu": 8})
    params = parameters()
    unfit = EstimatesFromAll(params, 0.1)
    with pytest.raises(ConfigurationError, match="choose another `optim`, or mode='gradients'"):
        step(BranchAverage(unfit), params, 0)
    step(BranchAverage(torch.optim.SGD(params, 0.1)), params, 0)
    whole = ParallelAveraging(mode="gradients").wrap_optimizer(EstimatesFromAll(params, 0.1))
    assert isinstance(whole, EstimatesFromAll), "the trainer steps it, on all parameters"
    whole.step()
