"""Two real ranks: they train as one, and fail as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, assert_equal_bits
from rank_scenarios import OTHERS, SCENARIOS, outcome
from workers.failures import main as failures_of_rank
from workers.values import main as values_of_rank

from trl_ext.engine.rank_comparison import bit_sum
from trl_ext.testing.ranks import on_ranks
from trl_ext.testing.runs import moved, parameters, tiny_model

RANKS = 2

# SGD on fp32: sums in another order; `lr` times a few steps times the rounding of gradients of size 1.
ROUNDING = {"rtol": 0, "atol": 5e-6}


# -- two ranks are one rank with the whole batch ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(values_of_rank, tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The same scenarios on one rank."""
    found = {}
    for name, build in SCENARIOS.items():
        trainer = build(tmp_path_factory.mktemp("alone") / "run", 1)
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 500 * ROUNDING["atol"]
        found[name] = outcome(trainer)
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_hold_the_same(values, name):
    assert_equal_bits(values[1][name]["parameters"], values[0][name]["parameters"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one_with_the_whole_batch(values, alone, name):
    assert_close(values[0][name]["parameters"], alone[name]["parameters"], **ROUNDING)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_log_as_one_with_the_whole_batch(values, alone, name):
    """Losses, NLL, streams, auxiliary terms, norms, accuracy; in GRPO the rewards and KL too."""
    for both, one in zip(values[0][name]["logs"], alone[name]["logs"], strict=True):
        assert set(both) == set(one)
        for key in one:
            if isinstance(one[key], float) and key not in ("epoch", "total_flos"):  # which counts padding too
                assert both[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("name", ["everything", "grpo", *OTHERS])
def test_views_and_streams_are_those_of_one_rank(values, alone, name):
    """The gradient of a stream on two ranks is the one on the union of their batches."""
    for rank in range(RANKS):
        for key in ("scalars", "streams_seen", "norms"):
            mine, theirs = values[rank][name].get(key), alone[name].get(key)
            assert mine is None or torch.tensor(mine).allclose(torch.tensor(theirs), rtol=2e-4, atol=1e-6), key
            assert mine == values[0][name].get(key), key


@pytest.mark.parametrize("role", ["general", "target"])
@pytest.mark.parametrize("name", ["everything", "grpo"])
def test_streams_shards_are_disjoint_and_make_up_the_whole(values, alone, name, role):
    shards = [values[rank][name][f"order of {role}"] for rank in range(RANKS)]
    for step, whole in enumerate(alone[name][f"order of {role}"]):
        assert shards[0][step] + shards[1][step] == whole
    size = {"general": 11, "target": 10}[role]
    first_pass = [i for step in range(2) for shard in shards for i in shard[step]]
    assert len(set(first_pass)) == len(first_pass) <= size


def test_rewards_are_of_all_ranks_and_the_slice_of_this_one(values, alone):
    for step, whole in enumerate(alone["grpo"]["totals"]):
        for rank in range(RANKS):
            assert torch.equal(values[rank]["grpo"]["totals"][step], whole)
            assert values[rank]["grpo"]["local"][step] == slice(8 * rank, 8 * (rank + 1))


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def test_under_fsdp2_views_give_what_they_give_unsharded(values):
    for rank in range(RANKS):
        sharded, replicated = values[rank]["fsdp2"], values[rank]["unsharded"]
        assert sharded["sharded"]
        assert len(sharded["algebra"]) == len(replicated["algebra"]) == 3
        for mine, theirs in zip(sharded["algebra"], replicated["algebra"], strict=True):
            for key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        assert sharded["algebra"] == values[0]["fsdp2"]["algebra"]


def test_under_fsdp2_training_is_that_of_ddp(values):
    """With an objective, weights, auxiliary losses and streams mixed into the gradient."""
    sharded, replicated = values[0]["fsdp2"], values[0]["unsharded"]
    assert_close(sharded["parameters"], replicated["parameters"], **ROUNDING)
    for mine, theirs in zip(sharded["logs"], replicated["logs"], strict=True):
        for key in ("loss", "nll", "grad_norm", "general_stream/nll", "Everything/by sequence"):
            assert key not in theirs or mine[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_two_ranks_resume_to_the_same_bytes(values):
    for rank in range(RANKS):
        assert_equal_bits(values[rank]["resumed"]["second"], values[rank]["resumed"]["first"])


# -- two ranks fail as one -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(failures_of_rank, tmp_path_factory.mktemp("failures"))


RAISING = {
    "setup": ("setup", 1),
    "wrap_optimizer": ("wrap_optimizer", 1),
    "sample_weights": ("sample_weights", 2),
    "sample_weights, after a gradient": ("sample_weights", 2),
    "sample_weights, before a gradient": ("sample_weights", 2),
    "sample_weights, between gradients": ("sample_weights", 2),
    "per_token_loss": ("per_token_loss", 2),
    "wrong shape": ("per_token_loss", 2),
    "auxiliary_losses": ("auxiliary_losses", 2),
    "gradients_ready": ("gradients_ready", 2),
    "gradients_ready, FSDP2": ("gradients_ready", 2),
    "weights_updated": ("weights_updated", 2),
    "prompt_order": ("prompt_order", 1),
    "sampling_weights": ("sampling_weights", 2),
    "advantages": ("advantages", 2),
    "advantages, before a gather": ("advantages", 2),
    "gradients_ready, before a gather": ("gradients_ready", 2),
    "per_token_loss, before a gather": ("per_token_loss", 2),
    "auxiliary_losses, before a gather": ("auxiliary_losses", 2),
    "auxiliary_losses, GRPO, before a gather": ("auxiliary_losses", 2),
    "policy_loss": ("policy_loss", 2),
    "auxiliary_losses, GRPO": ("auxiliary_losses", 2),
    "gradients_ready, GRPO": ("gradients_ready", 2),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_hook_that_raises_on_one_rank_stops_both_at_the_same_step(failures, name):
    hook, step = RAISING[name]
    for rank in range(RANKS):
        error = failures[rank][name]["error"]
        assert "PluginError" in error["type"]
        assert f"failed in hook '{hook}' at step {step}: " in error["message"]
        assert error["message"].endswith("[on rank 1 of 2]")
        assert ("only here" in error["message"]) or name == "wrong shape"
        assert failures[rank][name]["step"] == step - 1
    assert failures[0][name]["error"]["message"] == failures[1][name]["error"]["message"]
    assert_equal_bits(failures[1][name]["parameters"], failures[0][name]["parameters"])


def test_orders_that_differ_stop_both(failures):
    for rank in range(RANKS):
        error = failures[rank]["prompt_order differs"]["error"]
        assert "PluginError" in error["type"]
        assert "plugin PromptOrderDiffers gave the ranks different orders" in error["message"]


def test_a_diagnostic_that_raises_on_one_rank_stops_none(failures):
    for rank in range(RANKS):
        assert failures[rank]["metrics"]["error"] is None
        assert failures[rank]["metrics"]["step"] == 4


def test_failures_on_both_ranks_are_one_message(failures):
    messages = {failures[rank]["deployed_weights"]["error"]["message"] for rank in range(RANKS)}
    assert len(messages) == 1
    assert "hook 'deployed_weights'" in messages.pop()


def test_a_state_that_one_rank_cannot_load_stops_both(failures):
    messages = {failures[rank]["load_state_dict"]["error"]["message"] for rank in range(RANKS)}
    assert len(messages) == 1
    assert "'load_state_dict'" in messages.pop()


def test_a_state_that_one_rank_cannot_give_stops_both_and_leaves_no_complete_checkpoint(failures):
    for rank in range(RANKS):
        error = failures[rank]["state_dict"]["error"]
        assert "CheckpointError" in error["type"]
        assert error["message"].startswith("plugin 'SaveState'")
        assert error["message"].endswith("failed in state_dict(): RuntimeError: only here")
        assert failures[rank]["state_dict"]["complete"] is None


def test_a_file_that_one_rank_cannot_write_stops_both(failures):
    for rank in range(RANKS):
        error = failures[rank]["a file"]["error"]
        assert "CheckpointError" in error["type"]
        assert "rank-00001.json" in error["message"]
        assert failures[rank]["a file"]["complete"] is None


@pytest.mark.parametrize("name", ["nan loss", "infinite gradient"])
def test_a_bad_number_on_one_rank_stops_both(failures, name):
    for rank in range(RANKS):
        assert "NonFiniteError" in failures[rank][name]["error"]["type"]
        assert "at step 2" in failures[rank][name]["error"]["message"]
        assert failures[rank][name]["step"] == 1


@pytest.mark.parametrize("name", ["nan loss, skip", "infinite gradient, skip"])
def test_a_bad_number_on_one_rank_is_skipped_by_both(failures, name):
    for rank in range(RANKS):
        assert failures[rank][name]["error"] is None
        assert failures[rank][name]["skipped"] == [False, True, False, False]
        assert all(p.isfinite().all() for p in failures[rank][name]["parameters"].values())
    assert_equal_bits(failures[1][name]["parameters"], failures[0][name]["parameters"])


@pytest.mark.parametrize(
    ("name", "tensor", "step"),
    [
        ("parameter differs", "'model.norm.weight'", 2),
        ("parameter differs, checked every third step", "'model.norm.weight'", 3),
        ("state differs", "'DivergesInState: average'", 2),
    ],
)
def test_ranks_that_diverge_are_found_and_the_tensor_named(failures, name, tensor, step):
    for rank in range(RANKS):
        error = failures[rank][name]["error"]
        assert "PluginError" in error["type"]
        assert f"ranks 0 and 1 hold different values of {tensor} after step {step}" in error["message"]
        assert failures[rank][name]["step"] == step


def test_ranks_that_agree_pass_the_check():
    """The words of a tensor's bits, added: equal for equal bits, and told apart by one bit."""
    tensor = dict(tiny_model().named_parameters())["model.norm.weight"].detach()
    other = tensor.clone()
    assert bit_sum(tensor) == bit_sum(other)
    other[3] = torch.nextafter(other[3], torch.tensor(9.0))
    assert bit_sum(tensor) != bit_sum(other)
    assert bit_sum(tensor.to(torch.bfloat16)) == bit_sum(tensor.to(torch.bfloat16).clone())
