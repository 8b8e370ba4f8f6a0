"""Two ranks over gloo: DDP against the plain branches, FSDP2 against DDP, and HPT and ReLIFT against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference, two_branches
from mixing_runs import Recorder
from oracles import combine, demonstration_nll, fp32_error, gradient, model_at, rl_gradient
from rank_runs import METHODS, main
from sharded_state import main as save_and_load

from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow


def launch(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What each rank saw."""
    return on_ranks(main, folder, kind)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("two") / "ddp", "ddp")


def test_ddp_ranks_take_the_mean_of_two_branches_on_the_reduced_gradients(ddp: list[dict[str, Any]]) -> None:
    for rank in ddp:
        seen = Recorder(rank["rl"], rank["sft"], rank["weights"])
        expected = two_branches("adamw_torch", seen, 4, (1e-2, 1e-2), (0.2, 0.2))
        assert largest_difference(seen.weights[-1], expected[-1]) == 0
    assert largest_difference(ddp[0]["weights"][-1], ddp[1]["weights"][-1]) == 0
    assert largest_difference(ddp[0]["weights"][0], ddp[0]["weights"][-1]) > 1e-2


def test_a_resumed_run_on_two_ranks_continues_to_the_last_bit(tmp_path: Path) -> None:
    for rank in launch(tmp_path, "resume"):
        whole, rest = rank["whole"], rank["rest"]
        assert len(rest["rl"]) == 2
        assert largest_difference(whole["weights"][-1], rest["weights"][-1]) == 0
        assert largest_difference(whole["weights"][2], whole["weights"][-1]) > 1e-3


def test_fsdp2_equals_ddp(ddp: list[dict[str, Any]], tmp_path: Path) -> None:
    shards = launch(tmp_path / "fsdp2", "fsdp2")
    whole = [torch.cat(parts) for parts in zip(shards[0]["weights"][-1], shards[1]["weights"][-1], strict=True)]
    # fp32 reductions in another order; Adam divides near-zero gradients by their own size, so a few weights may part
    # by a share of the learning rate of 1e-2.
    assert largest_difference(whole, ddp[0]["weights"][-1]) < 1e-4
    names = ("grad_norm_sft", "update_norm_rl", "update_norm_sft", "update_cosine", "update_sign_conflicts")
    for mine, theirs in zip(shards[0]["logs"], ddp[0]["logs"], strict=True):
        for name in names:
            key = f"parallel-averaging/{name}"
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), name


def test_rows_of_the_stream_go_through_sharded_parameters_as_the_refusal_of_a_column_advises(tmp_path: Path) -> None:
    shards = launch(tmp_path, "rows")
    for rank in shards:
        assert rank["logs"][0]["parallel-averaging/grad_norm_sft"] > 0
        assert largest_difference(*rank["weights"][:2]) > 0


def test_a_sharded_state_saved_and_loaded_continues_to_the_last_bit(tmp_path: Path) -> None:
    on_ranks(save_and_load, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"SHARDED_STATE_DICT", "FULL_STATE_DICT"}


def test_a_row_that_fails_on_one_rank_stops_both_with_its_message(tmp_path: Path) -> None:
    ranks = launch(tmp_path, "failures")
    for method in METHODS:
        messages, steps = zip(*(rank[method] for rank in ranks), strict=True)
        wanted = "row 99 was asked of the stream" if "stream_row" in method else "column 'completion' is empty"
        assert all(wanted in message and method.split(":")[0] in message for message in messages), method
        # One message, which names the rank that it was met on.
        assert messages[0] == messages[1]
        assert messages[0].count(" [on rank") == messages[0].count(" [on rank 1 of 2]") == 1
        assert steps[0] == steps[1] < 4


def joined(ranks: list[dict[str, Any]], name: str, step: int) -> list[Any]:
    """Rows of both ranks, in the order of the groups."""
    return [row for rank in ranks for row in rank[name][step]]


@pytest.fixture(scope="module")
def hpt(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("hpt"), "hpt")


def test_hpt_on_shards_is_hpt_on_whole_weights(hpt: list[dict[str, Any]], tmp_path: Path) -> None:
    """Also where one rank has no demonstration: its forward has to be made all the same."""
    shards = launch(tmp_path, "sharded hpt")
    whole = [torch.cat(parts) for parts in zip(shards[0]["weights"][-1], shards[1]["weights"][-1], strict=True)]
    assert all(len(part) < len(both) for part, both in zip(shards[0]["weights"][-1], whole, strict=True))
    unsolved = [[not rewards[i : i + 4].any() for i in range(0, 12, 4)] for rewards in shards[0]["rewards"]]
    assert any(any(groups[:2]) != groups[2] for groups in unsolved), "both ranks had demonstrations in each step"
    # Sums in fp64 in another order, but for Llama's norms, which work in fp32.
    assert largest_difference(whole, hpt[0]["weights"][-1]) < 1e-6
    assert largest_difference(hpt[0]["weights"][0], hpt[0]["weights"][-1]) > 1e-3


def test_hpt_is_one_mean_over_both_ranks_also_for_a_group_on_both(hpt: list[dict[str, Any]]) -> None:
    ranks = hpt
    kinds = set()
    for step, rewards in enumerate(ranks[0]["rewards"]):
        solved = [bool(rewards[i : i + 4].any()) for i in range(0, 12, 4)]
        inputs, rolled = joined(ranks, "inputs", step), joined(ranks, "completions", step)
        rows = [inputs[4 * g] for g in range(3) if not solved[g]]
        model = model_at(ranks[0]["weights"][step])
        expected = rl_gradient(model, [c for i, c in enumerate(rolled) if solved[i // 4]])
        if rows:
            expected = combine(expected, gradient(model, demonstration_nll(model, rows)), 1.0, 1.0)
        # TRL's advantages are fp32.
        for rank in ranks:
            assert largest_difference(rank["rl"][step], expected) < 1e-6, step
        kinds.add(tuple(solved))
    assert any(True in k and False in k for k in kinds), "no batch had both kinds of prompt"


def test_relift_ranks_share_one_buffer_also_for_a_group_on_both(tmp_path: Path) -> None:
    ranks = launch(tmp_path, "relift")
    buffered: list[Any] = []
    steps = 0
    for step, rewards in enumerate(ranks[0]["rewards"]):
        inputs = joined(ranks, "inputs", step)
        buffered += [inputs[i] for i in range(0, 12, 4) if not rewards[i : i + 4].any()]
        expected = combine(ranks[0]["weights"][step], ranks[0]["rl"][step], 1.0, -1e-2)
        bound = 1e-14  # fp64, weights below 4
        if len(buffered) >= 2:
            model = model_at(expected)
            sft = gradient(model, demonstration_nll(model, buffered[:2]))
            expected = combine(expected, sft, 1.0, -1e-2)
            buffered, steps = buffered[2:], steps + 1
            bound = 1e-2 * fp32_error(sft)  # Llama's norms work in fp32, where the last bit of the weights shows
        assert largest_difference(ranks[0]["weights"][step + 1], expected) < bound, step
        assert largest_difference(ranks[0]["weights"][step + 1], ranks[1]["weights"][step + 1]) == 0
    assert steps > 1
