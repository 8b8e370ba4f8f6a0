"""Order, filter and larger groups of `reachability`: against definitions, and against plain TRL's larger groups."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import distance, grpo, prompts, weights
from test_reachability import PROMPTS, Record, write_probe
from trl_ext_probing.reachability.routing import ROUTES
from trl_ext_reachability.draw_order import draw_order
from trl_ext_reachability.merged_groups import group_labels
from trl_ext_reachability.reachability import Reachability

from trl_ext.errors import ConfigurationError, PluginError


@given(st.data())
def test_an_epoch_has_as_many_groups_whatever_is_drawn(data: st.DataObject) -> None:
    """Full length, only rows that are kept, each as often as it should, what is drawn sorted where asked."""
    n = data.draw(st.integers(1, 24))
    batch = data.draw(st.integers(1, 6))
    several = data.draw(st.integers(1, batch))
    order = data.draw(st.permutations(range(n)))
    kept = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    groups = data.draw(st.lists(st.sampled_from([1, several]), min_size=n, max_size=n))
    rates = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5]), min_size=n, max_size=n))
    by: Any = data.draw(st.sampled_from(["data", "easy-first", "hard-first"]))
    laid = draw_order(order, kept, groups, rates, by, batch)
    assert len(laid) == n
    assert all(kept[row] for row in laid)
    # What an epoch has room for: passes over the rows in their order, the last row cut off.
    expected: Counter[int] = Counter()
    place = 0
    rows = [row for row in order if kept[row]]
    while (room := n - expected.total()) > 0:
        expected[rows[place % len(rows)]] += min(groups[rows[place % len(rows)]], room)
        place += 1
    assert Counter(laid) == expected
    singles = [row for row in laid[: n // batch * batch] if groups[row] == 1]
    if by != "data":
        values = [rates[row] for row in singles]
        assert values == sorted(values, reverse=by == "easy-first")
    elif several == 1:
        assert laid == [rows[i % len(rows)] for i in range(n)]


@given(st.data())
def test_groups_of_a_row_lie_in_one_batch_while_others_can_fill_the_gap(data: st.DataObject) -> None:
    n, batch = data.draw(st.integers(1, 24)), data.draw(st.integers(2, 6))
    several = data.draw(st.integers(2, batch))
    groups = data.draw(st.lists(st.sampled_from([1, several]), min_size=n, max_size=n))
    laid = draw_order(range(n), [True] * n, groups, [0.0] * n, "data", batch)
    drawn = n // batch * batch
    for edge in range(batch, drawn, batch):
        if laid[edge - 1] == laid[edge]:
            assert all(groups[row] > 1 for row in laid[edge:drawn])


@pytest.mark.parametrize("by", ["easy-first", "hard-first"])
def test_what_fills_no_batch_is_what_the_trainers_order_has_last(by: Any) -> None:
    """The sampler leaves out an incomplete batch: sorted, that would be the same prompts in every epoch."""
    rates = [0.1 * row for row in range(7)]
    for order in ([3, 0, 6, 5, 1, 2, 4], [0, 6, 2, 1, 4, 3, 5]):
        laid = draw_order(order, [True] * 7, [1] * 7, rates, by, 3)
        assert laid == [*sorted(order[:6], reverse=by == "easy-first"), order[6]]


def test_order_by_hand() -> None:
    """Batches of 4: row 2 has three groups, does not fit behind row 0 and 1, and lets row 3 and 4 go first."""
    groups = [1, 1, 3, 1, 1, 1, 1, 1]
    laid = draw_order(range(8), [True] * 8, groups, [0.0] * 8, "data", 4)
    assert laid == [0, 1, 3, 4, 2, 2, 2, 5]
    assert draw_order(range(4), [False, True, False, True], [1] * 4, [0.0] * 4, "data", 2) == [1, 3, 1, 3]
    with pytest.raises(ValueError, match="no prompt is left"):
        draw_order([0], [False], [1], [0.0], "data", 1)


def test_groups_of_a_merged_prompt_are_one() -> None:
    labels = group_labels([7, 7, 5, 5, 7, 7, 5, 5], [True, True, False, False] * 2, 2)
    assert labels.tolist() == [0, 0, 1, 1, 0, 0, 3, 3]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_two_groups_of_a_marginal_prompt_are_plain_groups_of_twice_the_size(tmp_path: Path, scale: str) -> None:
    """All prompts marginal, 2 x 4 completions: the same draws, advantages and weights as TRL with groups of 8."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 16, "max_steps": 2, "scale_rewards": scale}
    plain = grpo(tmp_path / "plain", plain=True, num_generations=8, **settings)
    start = weights(plain)
    plain.train()
    plugin = Reachability(write_probe(tmp_path / "probe", ["marginal"] * len(PROMPTS)), marginal_groups=2)
    ours = grpo(tmp_path / "ours", instances=[plugin], **settings)
    ours.train()
    apart = grpo(tmp_path / "apart", instances=[Reachability(plugin.probe)], **settings)
    apart.train()
    assert distance(start, weights(plain)) > 1e-3
    assert distance(weights(plain), weights(ours)) < 1e-6
    assert distance(weights(plain), weights(apart)) > 1e-3


def drawn(record: Record) -> list[str]:
    """The prompt of every group, in the order of drawing."""
    return [prompt for rollouts, _ in record.seen for prompt in rollouts.prompts[:: rollouts.num_generations]]


def test_prompts_come_in_the_order_of_their_success_rates(tmp_path: Path) -> None:
    folder = Path(write_probe(tmp_path / "probe"))
    counts = [int(k) for k in np.random.default_rng(0).permutation(len(PROMPTS))]
    head, *lines = (folder / "rows.csv").read_text().splitlines()
    place = head.split(",").index("successes")
    changed = [",".join([*(cells := line.split(","))[:place], str(k), *cells[place + 1 :]])
               for line, k in zip(lines, counts, strict=True)]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join([head, *changed]) + "\n")
    known = dict(zip(PROMPTS, counts, strict=True))
    for order, sign in (("easy-first", -1), ("hard-first", 1)):
        seen = Record()
        plugin = Reachability(str(folder), order=order)  # type: ignore[arg-type]
        trainer = grpo(tmp_path / order, instances=[plugin, seen], max_steps=len(PROMPTS))
        trainer.train()
        found = [known[prompt] for prompt in drawn(seen)]
        assert found == sorted((known[prompt] for prompt in prompts()["prompt"]), key=lambda k: sign * k)


def test_prompts_without_weight_are_not_drawn(tmp_path: Path) -> None:
    """Two of six routes have weight 0: the others fill the epoch, in the trainer's order and again from its start."""
    routes = [ROUTES[i % len(ROUTES)] for i in range(len(PROMPTS))]
    plain, seen = Record("plain"), Record("seen")
    grpo(tmp_path / "plain", instances=[plain], max_steps=16).train()
    plugin = Reachability(write_probe(tmp_path / "probe"), filter=True)
    grpo(tmp_path / "ours", instances=[plugin, seen], max_steps=16).train()
    wanted = [
        prompt for prompt in drawn(plain) if routes[PROMPTS.index(prompt)] not in ("demonstration", "out_of_reach")
    ]
    assert 0 < len(wanted) < 16
    assert drawn(seen) == (wanted * 2)[:16]


def test_marginal_prompts_have_larger_groups_beside_others(tmp_path: Path) -> None:
    """Advantages of a mixed batch, by the formula: one mean and deviation over both groups of a marginal prompt."""
    routes = ["marginal" if i % 3 == 0 else "in_reach" for i in range(len(PROMPTS))]
    seen = Record()
    plugin = Reachability(write_probe(tmp_path / "probe", routes), marginal_groups=2, success=0.8)
    trainer = grpo(tmp_path, instances=[plugin, seen], per_device_train_batch_size=16, max_steps=4)
    trainer.train()
    sizes = set()
    for rollouts, advantages in seen.seen:
        rewards = torch.tensor(trainer.reward_funcs[0](rollouts.completions))
        for prompt in dict.fromkeys(rollouts.prompts):
            members = torch.tensor([other == prompt for other in rollouts.prompts])
            marginal = routes[PROMPTS.index(prompt)] == "marginal"
            sizes.add((marginal, int(members.sum())))
            if marginal or members.sum() == 4:
                expected = (rewards[members] - rewards[members].mean()) / (rewards[members].std() + 1e-4)
                torch.testing.assert_close(advantages[members], expected, rtol=1e-4, atol=1e-5)
    assert {(True, 8), (False, 4)} <= sizes


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"order": "hard-first", "filter": True, "marginal_groups": 2, "reroute_every": 1}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 10,
    }
    probe = write_probe(tmp_path / "probe")
    whole = grpo(tmp_path / "run", instances=[Reachability(probe, **options), Record()], **settings)
    whole.train()
    seen = Record()
    resumed = grpo(tmp_path / "run", instances=[Reachability(probe, **options), seen], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(seen.seen) == 3
    assert distance(weights(whole), weights(resumed)) == 0


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"marginal_groups": 3}, {"per_device_train_batch_size": 8}, "a generation batch has 2 groups"),
        (
            {"marginal_groups": 2},
            {"per_device_train_batch_size": 8, "multi_objective_aggregation": "normalize_then_sum"},
            "set multi_objective_aggregation='sum_then_normalize'",
        ),
    ],
)
def test_groups_that_cannot_be_larger_are_refused(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        grpo(tmp_path / "run", instances=[Reachability(write_probe(tmp_path / "probe"), **options)], **settings)


def test_advantages_of_another_plugin_are_not_overwritten(tmp_path: Path) -> None:
    plugin = Reachability(write_probe(tmp_path / "probe", ["marginal"] * len(PROMPTS)), marginal_groups=2)
    process = {"name": "process-reward", "verifier": "runs:constant_verifier", "outcome": 1.0}
    trainer = grpo(tmp_path / "run", [process], instances=[plugin], per_device_train_batch_size=16)
    with pytest.raises(PluginError, match="a plugin before this one has changed; set marginal_groups=1"):
        trainer.train()
    for name in ("best-of-m", "pg:rewards=raw"):
        with pytest.raises(ConfigurationError, match=r"needs the trainer's own advantages, .* set marginal_groups=1"):
            grpo(tmp_path / "run", [name], instances=[plugin], per_device_train_batch_size=16)


def test_a_filter_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    plugin = Reachability(write_probe(tmp_path / "probe", ["out_of_reach"] * len(PROMPTS)), filter=True)
    with pytest.raises(PluginError, match="filter=True leaves no prompt"):
        grpo(tmp_path / "run", instances=[plugin]).train()
