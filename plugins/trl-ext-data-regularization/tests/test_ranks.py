"""Two gloo ranks: one choice over both, equal to one rank's with the same samples; failures on one of them."""

import pytest
import torch
from rank_worker import CASES, EXACT, FAULTS, NAN_TARGETS, TARGET_LOSSES, main, run
from short_runs import model, parameters
from test_rollout_filter import gradients_of, only_norms
from test_sft import Reference, layers_of, sharpened

from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow  # some 50 trainings


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What each rank found."""
    return on_ranks(main, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_choose_as_one_does(case, on_two_ranks):
    one = parameters(run(case, 1))
    for name, value in one.items():
        # fp32 in another order of summation; the derivative is rounded more, but chooses alike
        torch.testing.assert_close(
            on_two_ranks[0][case][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["everything", "everything micro"])
def test_keeping_all_samples_is_plain_trl_to_the_bit_on_two_ranks(case, on_two_ranks):
    assert set(EXACT) >= {"plain", case}
    for name, value in on_two_ranks[0]["plain"].items():
        assert torch.equal(on_two_ranks[0][case][name], value), name


def test_a_rollout_filter_that_drops_nothing_is_plain_trl_on_two_ranks(on_two_ranks):
    for name, value in on_two_ranks[0]["grpo plain"].items():
        assert torch.equal(on_two_ranks[0]["grpo"][name], value), name


# -- choices against their definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target_loss", TARGET_LOSSES)
def test_completions_are_dropped_by_their_scores_over_both_ranks(target_loss, on_two_ranks):
    """The second rank has a fraction of the first one's tokens: a denominator of its own would change the choice."""
    ranks = [saved[f"filter by {target_loss}"] for saved in on_two_ranks]
    net, rewards = only_norms(model(layers=1)), ranks[0]["rewards"].total
    z = (rewards - rewards.mean()) / rewards.std(unbiased=False)
    shares, target = [], torch.zeros(())
    for rank in ranks:
        mask, raw = rank["rollouts"].mask, rank["raw"].unsqueeze(1)
        shares.append(gradients_of(net, rank["rollouts"], raw * mask))
        by_reward = z[rank["rewards"].local].unsqueeze(1)
        coefficients = (by_reward if target_loss == "reward" else raw) * mask
        target = target + gradients_of(net, rank["rollouts"], coefficients).sum(0)
    kept = torch.cat([g @ target for g in shares]) >= 0
    assert 0 < kept.sum() < len(kept), "the case must tell completions apart"
    tokens = torch.cat([rank["rollouts"].mask.sum(1) for rank in ranks])
    expected = torch.cat([rank["raw"] for rank in ranks]) * kept * tokens.sum() / tokens[kept].sum()
    torch.testing.assert_close(torch.cat([rank["advantages"] for rank in ranks]), expected, rtol=1e-4, atol=1e-5)


def test_each_rank_chooses_from_its_own_batch_of_a_general_stream(on_two_ranks):
    """By the target's gradient over both ranks; the update is their chosen subsets' token means, by their tokens."""
    ranks = [saved["reverse by rank"] for saved in on_two_ranks]
    net = sharpened(model(layers=1))
    parts, groups = [Reference(net, rank["general"], rank["target"]) for rank in ranks], layers_of(net)
    both = Reference(net, ranks[0]["general"] + ranks[1]["general"], ranks[0]["target"]).topk(groups, 4)
    updates = [part.topk(groups, 2) for part in parts]
    expected, apart = {}, 0.0
    for name in both:
        expected[name] = sum(u[name] * p.total for u, p in zip(updates, parts, strict=True)) / sum(
            p.total for p in parts
        )
        apart = max(apart, float((expected[name] - both[name]).abs().max()))
    assert apart > 1e-2, "the case must tell a choice by rank from one over both"
    for name, parameter in net.named_parameters():
        found = (parameter.detach() - ranks[0]["parameters"][name]) / 0.5  # the learning rate
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- two ranks fail as one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", FAULTS)
def test_a_failure_before_an_exchange_on_one_rank_stops_both(hook, on_two_ranks):
    for rank in range(2):
        error = on_two_ranks[rank][f"fault in {hook}"]["error"]
        assert f"failed in hook '{hook.partition(',')[0]}' at step" in error
        assert "ArithmeticError: only here" in error
        assert error.endswith("[on rank 1 of 2]")


@pytest.mark.parametrize("name", NAN_TARGETS)
def test_a_target_gradient_of_nan_stops_both_ranks(name, on_two_ranks):
    for rank in range(2):
        assert on_two_ranks[rank][f"nan target {name}"].startswith(
            "NonFiniteError: NaN or infinite loss or gradient at"
        )


# -- resume ----------------------------------------------------------------------------------------------------------


def test_each_ranks_counts_go_on_after_a_resume(on_two_ranks):
    first, second = on_two_ranks[0]["resumed"]
    assert {*first} == {f"{what}-0000{rank}.csv" for what in ("kept", "samples") for rank in range(2)}
    assert first["samples-00000.csv"] != first["samples-00001.csv"]
    assert second == first
