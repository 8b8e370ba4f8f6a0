"""Run under torchrun: groups that reach over ranks, counts of all ranks, and a verifier that fails on one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from runs import distance, grpo, weights
from test_reachability import PROMPTS, Record, write_probe
from trl_ext_reachability.reachability import Reachability

from trl_ext.errors import PluginError


def main(folder: Path) -> None:
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
    found = {
        "moved": moved,
        "apart": apart,
        "counted": counted,
        "merged_apart": distance(weights(eight), weights(merged)),
        "best_of_m": best,
        "message": message,
        "pair_message": pair_message,
    }
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    # The groups stay: destroying them while failed trainers still hold them aborts at exit now and then.
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
