"""DeepSpeed's ZeRO on two ranks trains, resumes, averages, saves and fails as one rank does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_on_cpu import run_on_cpu, zero
from helpers import Idle, Plugin, assert_close
from rank_scenarios import SGD, ByPlace, Everything, greedy_grpo
from safetensors.torch import load_file
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.testing.ranks import on_ranks
from trl_ext.testing.runs import additions, logged, make_sft

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed; `nox -s deepspeed` has it"),
]

STAGES = (1, 2, 3)

# SGD on fp32: sums in another order; `lr` times a few steps times the rounding of gradients of size 1.
ROUNDING = {"rtol": 0, "atol": 5e-6}


def sft(folder: Path, world: int, **config: Any) -> Any:
    config = {"names": ["power:alpha=0.2", "ema:decay=0.5,compare=true"], "max_steps": 4, **SGD, **config}
    return make_sft(
        folder,
        trainer={"eval_dataset": additions(8, seed=9)},
        per_device_train_batch_size=8 // world,
        per_device_eval_batch_size=8 // world,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=2,
        **config,
    )


def grpo(folder: Path, world: int, **config: Any) -> Any:
    """Completions are drawn under the averaged weights."""
    return greedy_grpo(
        folder,
        world,
        names=["ema:decay=0.5,sampling=ema"],
        plugins=[ByPlace()],
        save_strategy="steps",
        save_steps=2,
        **config,
    )


KINDS = {"sft": sft, "grpo": grpo}


def saved(trainer: Any, folder: Path) -> dict[str, Any]:
    """What a finished run logged and saves: the average, and the raw weights beside it."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    files = {"average": folder / "model.safetensors", "raw": folder / "raw" / "model.safetensors"}
    return {"logs": logged(trainer)} | {name: load_file(file) for name, file in files.items()}


class OnRankOne(Plugin):
    """Fails, or gives an infinite loss, on rank 1 alone, at the last micro-step of the second step."""

    def __init__(self, how: str) -> None:
        self.how, self.calls, self.rank = how, 0, 0

    @hookimpl
    def setup(self, context):
        self.rank = context.rank

    @hookimpl
    def per_token_loss(self, tokens):
        self.calls += 1
        if (self.rank, self.calls) == (1, 4):
            if self.how == "raises":
                raise RuntimeError("only here")
            return -tokens.log_probs * float(self.how)
        return -tokens.log_probs


def failure(folder: Path, how: str, settings: dict[str, Any]) -> dict[str, Any]:
    trainer = make_sft(folder, plugins=[OnRankOne(how)], gradient_accumulation_steps=2, **SGD, **settings)
    try:
        trainer.train()
    except Exception as error:
        finite = all(torch.isfinite(tensor).all() for tensor in trainer.ext_weights.local())
        return {"error": f"{type(error).__name__}: {error}", "step": trainer.state.global_step, "finite": finite}
    return {"error": None}


BY_TORCH = {"zero_force_ds_cpu_optimizer": False}  # DeepSpeed's optimiser for the host would have to be compiled
SETTINGS = {
    **{f"stage {stage}": zero(stage) for stage in STAGES},
    **{f"stage {stage}, bf16": zero(stage) | {"bf16": True} for stage in STAGES},
    **{f"stage {stage}, offloaded": zero(stage, BY_TORCH, offload_optimizer={"device": "cpu"}) for stage in STAGES},
}
"""Gradients are kept in other places in each of them."""

REFUSED = {
    "stage 0": (
        zero(0),
        {"plugins": [Idle()]},
        "zero_optimization.stage 0 shards nothing and has not been tried with plugins; set stage to 1, 2 or 3",
    ),
    "gradients": (
        zero(2),
        {"plugins": [Everything()]},
        "hook 'gradients_ready' of plugin 'Everything' does not work under DeepSpeed",
    ),
    "skip": (zero(2), {"nonfinite": "skip"}, "nonfinite='skip' cannot leave out a step"),
    "reference": (zero(2), {"names": ["psft"]}, "has not been tried under DeepSpeed; use reference='cache:PATH'"),
    "whole save": (
        zero(3, stage3_gather_16bit_weights_on_model_save=False),
        {"names": ["ema"]},
        "zero_optimization.stage3_gather_16bit_weights_on_model_save: true",
    ),
    "fp16": (zero(2, {"fp16": {"enabled": True}}), {"plugins": [Idle()]}, "fp16 under DeepSpeed has not been tried"),
    "disk": (
        zero(2, offload_optimizer={"device": "nvme"}),
        {"plugins": [Idle()]},
        "offload_optimizer to a disk takes the gradients away",
    ),
    "offloaded weights": (
        zero(3, offload_param={"device": "cpu"}),
        {"names": ["ema"]},
        "has not been tried with zero_optimization.offload_param",
    ),
}


def refusal(folder: Path, deepspeed: dict[str, Any], options: dict[str, Any]) -> str:
    try:
        make_sft(folder, **deepspeed, **options).train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def all_of_rank(folder: Path) -> dict[str, Any]:
    run_on_cpu()
    found: dict[str, Any] = {}
    for stage in STAGES:
        for kind, make in KINDS.items():
            run = folder / f"{kind}-{stage}"
            trainer = make(run, 2, **zero(stage))
            trainer.train()
            first = saved(trainer, run / "final")
            trainer = make(run, 2, **zero(stage))
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
            found[f"{kind}-{stage}"] = first, saved(trainer, run / "resumed")
    for name, settings in SETTINGS.items():
        for how in ("raises", "nan"):
            found[f"{how}, {name}"] = failure(folder / f"{how}, {name}", how, settings)
    found["refused"] = {name: refusal(folder / name, *asked) for name, (*asked, _) in REFUSED.items()}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(all_of_rank, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, Any]]:
    found = {}
    for kind, make in KINDS.items():
        trainer = make(tmp_path_factory.mktemp(kind) / "run", 1)
        trainer.train()
        found[kind] = saved(trainer, Path(trainer.args.output_dir, "final"))
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_save_what_one_rank_saves(ranks, alone, kind, stage):
    both, one = ranks[0][f"{kind}-{stage}"][0], alone[kind]
    for weights in ("average", "raw"):
        assert_close(both[weights], one[weights], **ROUNDING)
    assert largest_difference(one["average"], one["raw"]) > 500 * ROUNDING["atol"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_log_what_one_rank_logs(ranks, alone, kind, stage):
    """Training, and the evaluation of the average and of the raw weights."""
    for both, one in zip(ranks[0][f"{kind}-{stage}"][0]["logs"], alone[kind]["logs"], strict=True):
        assert set(both) == set(one)
        for key in one:
            if isinstance(one[key], float) and key not in ("epoch", "total_flos"):
                assert both[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_where_the_first_did(ranks, kind, stage):
    first, resumed = ranks[0][f"{kind}-{stage}"]
    for weights in ("average", "raw"):
        assert largest_difference(first[weights], resumed[weights]) == 0.0


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_failure_on_one_rank_stops_both_before_the_step(ranks, settings):
    for rank in ranks:
        end = rank[f"raises, {settings}"]
        assert "failed in hook 'per_token_loss' at step 2: RuntimeError: only here [on rank 1 of 2]" in end["error"]
        assert (end["step"], end["finite"]) == (1, True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_nan_on_one_rank_is_found_before_it_reaches_the_weights(ranks, settings):
    for rank in ranks:
        end = rank[f"nan, {settings}"]
        assert end["error"].startswith("NonFiniteError: NaN or infinite loss or gradient at step 2")
        assert "skip" not in end["error"], "which is refused under DeepSpeed"
        assert (end["step"], end["finite"]) == (1, True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_not_been_tried_is_refused(ranks, name):
    for rank in ranks:
        assert REFUSED[name][-1] in rank["refused"][name]


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(mine) == list(theirs)
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in mine.items())
