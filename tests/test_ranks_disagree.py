"""Two real ranks do other things: each hears of it, in the same words, and none waits for the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from workers.disagreeing import main as disagreeing_of_rank
from workers.hanging import main as hanging_of_rank

from trl_ext.engine.guard import Guard
from trl_ext.engine.rank_comparison import compare_ranks
from trl_ext.engine.watchdog import LIMIT
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.plugins import PluginSet
from trl_ext.testing.ranks import end_of_ranks, on_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(disagreeing_of_rank, tmp_path_factory.mktemp("disagreeing"))


def messages(ranks: list[dict[str, Any]], name: str) -> set[str]:
    assert all(rank[name]["error"] is not None for rank in ranks)
    return {rank[name]["error"]["message"] for rank in ranks}


def test_a_loss_without_a_gradient_on_one_rank_stops_both(ranks):
    (message,) = messages(ranks, "a loss without a gradient")
    assert "plugin 'DetachedLoss'" in message
    assert "failed in hook 'per_token_loss' at step 2: TypeError: returned a loss that is detached" in message
    assert message.endswith("[on rank 1 of 2]")


@pytest.mark.parametrize(
    ("name", "hook", "step"),
    [
        ("entering deployed weights", "deployed_weights", 3),
        ("leaving deployed weights", "deployed_weights", 3),
        ("entering sampling weights", "sampling_weights", 2),
    ],
)
def test_weights_that_one_rank_cannot_put_in_place_stop_both(ranks, name, hook, step):
    (message,) = messages(ranks, name)
    assert f"failed in hook '{hook}' at step {step}: RuntimeError: only here [on rank 1 of 2]" in message


def test_other_evaluations_on_one_rank_are_refused_on_both(ranks):
    (message,) = messages(ranks, "other deployed weights")
    assert message.endswith("it gives the ranks different names: [[''], ['', 'more']]")
    assert "plugin 'OtherWeights'" in message


def test_a_run_that_one_rank_refuses_starts_on_none(ranks):
    first, second = (rank["check"]["error"]["message"] for rank in ranks)
    assert first == f"{second} [on rank 1 of 2]"
    assert second == "plugin 'Checks' refuses this run: only here"


def test_terms_under_other_names_are_each_logged_with_their_mean_over_ranks(ranks):
    for rank in ranks:
        for step in rank["other terms"]["logs"][:4]:
            assert step["OtherNames/one"] == pytest.approx(0.5)
            assert step["OtherNames/hundred"] == pytest.approx(50)
        assert [step["NoTermThere/one"] for step in rank["no term"]["logs"][:4]] == pytest.approx([0.5] * 4)


def test_metrics_that_differ_are_those_of_rank_0_on_all_ranks_and_warned_of_once(ranks):
    for rank in ranks:
        assert [step["OtherNumbers/rank"] for step in rank["other metrics"]["logs"][:4]] == [0] * 4
        told = [text for text in rank["other metrics"]["warnings"] if "hook 'metrics'" in text]
        assert len(told) == 1
        assert "different numbers 'OtherNumbers/rank' (0.0, 1.0)" in told[0]


def test_states_of_other_tensors_are_named(ranks):
    (message,) = messages(ranks, "other tensors")
    assert "ranks 0 and 1 hold different values of 'OtherTensors: more' after step 2: nothing and torch" in message


def test_under_fsdp2_what_is_replicated_is_compared_and_the_rest_is_said(ranks):
    (message,) = messages(ranks, "another value, FSDP2")
    assert "ranks 0 and 1 hold different values of 'OtherValue: count' after step 2" in message
    for rank in ranks:
        assert rank["the same, FSDP2"]["error"] is None
        told = [text for text in rank["the same, FSDP2"]["warnings"] if "rank_check_steps" in text]
        assert len(told) == 1
        assert "are shards that one rank alone holds, such as 'model." in told[0]


def test_a_model_that_turns_out_to_be_sharded_is_checked_again(ranks):
    (message,) = messages(ranks, "sharded by hand")
    assert message == "plugin 'OnlyUnsharded' refuses this run: sharding=fsdp2"


def test_shards_are_compared_with_their_replicas():
    """Four ranks of two replicas by two shards: ranks 0 and 2 hold the one shard, 1 and 3 the other."""

    def gather(mine: Any) -> list[Any]:
        (name, held), *_ = mine.items()
        at = [type(held)((shard,), held.form, bits) for shard, bits in ((0, 5), (1, 7), (0, 5), (1, 8))]
        return [{name: fingerprint} for fingerprint in at]

    with pytest.raises(PluginError, match="ranks 1 and 3 hold different values of 'weight' after step 9"):
        compare_ranks({"weight": torch.nn.Parameter(torch.ones(2))}, {}, gather, 9)


# -- a rank that never comes back ------------------------------------------------------------------------------------


def test_the_watchdog_says_where_each_rank_is_and_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(LIMIT, "10")
    ended = end_of_ranks(hanging_of_rank, tmp_path, patience=1000)
    assert all(rank.code for rank in ended)
    lines = [line for rank in ended for line in rank.output.splitlines()]
    report = next(line for line in lines if f"more than {LIMIT}=10 seconds" in line)
    assert (
        "rank 1: hook 'gradients_ready' of plugin 'Sleeps' (class Sleeps of workers.hanging) at step 1 (for" in report
    )
    assert "rank 0: an agreement of the ranks (for" in report


@pytest.mark.parametrize("text", ["0", "-1", "soon"])
def test_a_watchdog_without_a_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(ConfigurationError, match=f"{LIMIT}={text} is not a number of seconds"):
        Guard(PluginSet(), torch.device("cpu"), 2, lambda: 0)
