"""The plugins on two ranks: groups that reach over ranks, counts of all ranks, and a verifier that fails on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from runs import checksum_reward, distance, grpo, weights
from test_best_of_m import stop_at_the_first
from test_reachability import PROMPTS, Record, write_probe
from trl_ext_reachability.reachability import Reachability

from trl_ext.errors import PluginError
from trl_ext.testing.ranks import on_ranks


def run_all(folder: Path) -> dict[str, Any]:
    """What a rank sees of groups over both, of counts, and of a verifier that fails on rank 1."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2}
    process = {"name": "process-reward", "normalize": "group", "split": "token"}
    plain = grpo(folder / "plain", plain=True, **settings)
    start = weights(plain)
    plain.train()
    ours = grpo(folder / "ours", [{**process, "verifier": "runs:constant_verifier"}], **settings)
    ours.train()
    assert dist.get_world_size() == 2
    moved, apart = distance(start, weights(plain)), distance(weights(plain), weights(ours))
    plugin = Reachability(write_probe(folder / f"probe{dist.get_rank()}"), reroute_every=1)
    grpo(folder / "counted", instances=[plugin], rank_check_steps=1, **settings).train()
    counted = plugin.state_dict()["draws"].tolist()
    larger = {**settings, "per_device_train_batch_size": 8}
    eight = grpo(folder / "eight", plain=True, **{**larger, "num_generations": 8})
    eight.train()
    marginal = write_probe(folder / f"marginal{dist.get_rank()}", ["marginal"] * len(PROMPTS))
    merged = grpo(folder / "merged", instances=[Reachability(marginal, marginal_groups=2)], **larger)
    merged.train()
    record = Record()
    grpo(folder / "best", ["best-of-m:success=0.8"], instances=[record], **settings).train()
    best = [(list(rollouts.completions), given.tolist()) for rollouts, given in record.seen]
    failing = grpo(folder / "failing", [{**process, "verifier": "runs:failing_verifier"}], **settings)
    try:
        failing.train()
        message = "no error"
    except PluginError as error:
        message = str(error)
    # The plugin that follows has a collective of its own, in which the rank that did not fail would wait.
    follower = Reachability(plugin.probe)
    pair = grpo(
        folder / "pair",
        [{"name": "process-reward", "verifier": "runs:failing_verifier"}],
        instances=[follower],
        **settings,
    )
    try:
        pair.train()
        pair_message = "no error"
    except PluginError as error:
        pair_message = str(error)
    return {
        "moved": moved,
        "apart": apart,
        "counted": counted,
        "merged_apart": distance(weights(eight), weights(merged)),
        "best_of_m": best,
        "message": message,
        "pair_message": pair_message,
    }


@pytest.mark.slow
def test_groups_over_ranks_and_a_failure_on_one(tmp_path: Path) -> None:
    """One group of four over two ranks of two: the update is plain GRPO's, the first correct draw that of all ranks.

    Two groups of four as one are TRL's group of eight. One rank's failure stops both.
    """
    ranks = on_ranks(run_all, tmp_path)
    for found in ranks:
        assert found["moved"] > 1e-3
        # As on one rank: rounding, amplified by Adam's first steps.
        assert found["apart"] < 2e-5
        assert found["merged_apart"] < 2e-5
        assert sum(found["counted"]) == 8  # two steps of four completions, on whichever rank
        for name in ("message", "pair_message"):
            assert "failed in hook 'advantages' at step 1: LookupError: no verdict [on rank 1 of 2]" in found[name]
    assert ranks[0]["counted"] == ranks[1]["counted"]
    accepted = 0
    for (first, given), (second, given_there) in zip(*(found["best_of_m"] for found in ranks), strict=True):
        place, _ = stop_at_the_first([reward >= 0.8 for reward in checksum_reward([*first, *second])])
        assert [*given, *given_there] == [4.0 * (i == place) for i in range(4)]
        accepted += place is not None
    assert accepted
