"""`reachability` in GRPO: weights by route, counts of what was drawn, demonstrations, refusals, and resuming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runs import checksum_reward, grpo, prompts, write_measurement
from torch import Tensor
from trl_ext_probing.reachability.keys import prompt_key, prompt_number
from trl_ext_probing.reachability.routing import ROUTES, Budget
from trl_ext_reachability.reachability import Reachability

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.gradients import GradientView
from trl_ext.options import check_options
from trl_ext.records import Rewards, Rollouts, StreamGradient
from trl_ext.testing import ModularChain

PROMPTS = list(dict.fromkeys(prompts()["prompt"]))


def write_probe(folder: Path, routes: list[str] | None = None, **settings: Any) -> str:
    """What the probe would have written: all routes in turn, a tenth of 20 rollouts correct; settings of `runs`."""
    folder.mkdir()
    sampling = {"max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    settings = {"num_generations": 4, "epochs": 2.0, "solved_at": 1.0, **sampling, **settings}
    chosen = routes or [ROUTES[i % len(ROUTES)] for i in range(len(PROMPTS))]
    records = [
        {
            "key": prompt_key(prompt),
            "route": route,
            "successes": 2,
            "rollouts": 20,
            "demonstration_correct": True,
            "worst_token": 0.3,
        }
        for prompt, route in zip(PROMPTS, chosen, strict=True)
    ]
    write_measurement(folder, settings, records)
    return str(folder)


@dataclass(eq=False)
class Record:
    """Keeps advantages and gradients as they pass."""

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "test"
    label: str = "record"

    def __post_init__(self) -> None:
        self.seen: list[tuple[Rollouts, Tensor]] = []
        self.gradients: list[Tensor] = []
        self.stream: list[Tensor] = []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        self.seen.append((rollouts, advantages.clone()))
        return advantages

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        self.gradients.append(flat(gradients))
        self.stream += [flat(stream.gradients) for stream in streams.values()]


def flat(view: GradientView) -> Tensor:
    return torch.cat([g.flatten().clone() for g in view.tensors if g is not None])


WEIGHTS: dict[str, Any] = {
    "saturated": 0.25,
    "in_reach": 1.0,
    "marginal": 2.0,
    "process_reward": 3.0,
    "demonstration": 0.0,
    "out_of_reach": 0.5,
}


@pytest.mark.parametrize("per_token", [False, True])
def test_advantages_are_weighted_by_route_and_rescaled(tmp_path: Path, per_token: bool) -> None:
    process = {"name": "process-reward", "verifier": "runs:constant_verifier", "normalize": "group"}
    before, after = Record("before"), Record("after")
    plugin = Reachability(write_probe(tmp_path / "probe"), **WEIGHTS)
    grpo(
        tmp_path / "run",
        [process] if per_token else None,
        instances=[before, plugin, after],
        max_steps=2,
        per_device_train_batch_size=16,
    ).train()
    for (rollouts, given), (_, got) in zip(before.seen, after.seen, strict=True):
        weights = [WEIGHTS[ROUTES[PROMPTS.index(prompt) % len(ROUTES)]] for prompt in rollouts.prompts]
        assert len(set(weights)) > 1
        scaled = torch.tensor(weights) / (sum(weights) / len(weights))
        assert given.dim() == (2 if per_token else 1)
        torch.testing.assert_close(got, given * (scaled[:, None] if per_token else scaled))


def test_solved_prompts_are_counted_and_compared_with_the_prediction(tmp_path: Path) -> None:
    record = Record()
    plugin = Reachability(write_probe(tmp_path / "probe"), success=0.8)
    trainer = grpo(tmp_path / "run", instances=[plugin, record])
    trainer.train()
    solved: dict[str, list[bool]] = {}
    for rollouts, _ in record.seen:
        for prompt, reward in zip(rollouts.prompts, checksum_reward(rollouts.completions), strict=True):
            solved.setdefault(prompt, []).append(reward >= 0.8)
    assert len(solved) == 3
    logs = trainer.state.log_history[2]
    observed = [any(draws) for draws in solved.values()]
    assert logs["reachability/observed_solved"] == pytest.approx(sum(observed) / 3)
    # 4 draws after 2 of 20: 1 - E[(1-p)^4] under Beta(2.5, 20) = 1 - prod (20 + i) / (22.5 + i).
    failed = 1.0
    for i in range(4):
        failed *= (20 + i) / (22.5 + i)
    assert logs["reachability/predicted_solved"] == pytest.approx(1 - failed)
    brier = sum((1 - failed - hit) ** 2 for hit in observed) / 3
    assert logs["reachability/brier"] == pytest.approx(brier)
    assert logs["reachability/saturated"] == pytest.approx(len(PROMPTS[:: len(ROUTES)]) / len(PROMPTS))


def test_success_is_what_the_probe_took_for_it(tmp_path: Path) -> None:
    """All completions get 0.5: a success for a probe with `solved_at` 0.5, and not where the option says otherwise."""

    def half(completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    probe = write_probe(tmp_path / "probe", solved_at=0.5)
    for option, solved in ((None, 12), (0.6, 0)):
        plugin = Reachability(probe, success=option)
        grpo(tmp_path / f"run {option}", instances=[plugin], reward=half).train()
        assert plugin.state_dict()["successes"].sum() == solved


def test_draws_that_no_function_judged_count_nowhere(tmp_path: Path) -> None:
    def every_other(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    plugin = Reachability(write_probe(tmp_path / "probe"), success=0.0)
    grpo(tmp_path / "run", instances=[plugin], reward=every_other).train()
    state = plugin.state_dict()
    assert state["draws"].sum() == state["successes"].sum() == 6


@pytest.mark.parametrize(
    ("probed", "message"),
    [
        ({"temperature": 0.7}, r"sampled with temperature=0\.7, this run has 1\.0"),
        ({"top_p": 0.9}, r"sampled with top_p=0\.9, this run has 1\.0"),
        ({"top_k": 20}, "sampled with top_k=20, this run has 0"),
        ({"max_completion_length": 7}, "max_completion_length=7, this run has 6, which cuts off"),
    ],
)
def test_sampling_unlike_the_probes_is_refused(tmp_path: Path, probed: dict[str, Any], message: str) -> None:
    plugin = Reachability(write_probe(tmp_path / "probe", **probed))
    with pytest.raises(ConfigurationError, match=message):
        grpo(tmp_path / "run", instances=[plugin])


def test_longer_completions_than_the_probes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = Reachability(write_probe(tmp_path / "probe", max_completion_length=5, top_k=-1))
    grpo(tmp_path / "run", instances=[plugin])
    assert "had max_completion_length=5, this run has 6" in caplog.text


CONSTANT = {"name": "process-reward", "verifier": "runs:constant_verifier"}


@pytest.mark.parametrize(
    "later", [CONSTANT, {"name": "best-of-m"}, {"name": "pg", "label": "mine"}], ids=lambda spec: spec["name"]
)
def test_weights_that_another_plugin_would_throw_away_are_refused(tmp_path: Path, later: dict[str, Any]) -> None:
    first = {"name": "reachability", "label": "routes", "probe": write_probe(tmp_path / "probe")}
    with pytest.raises(ConfigurationError, match=r"set anew after it; set pg:rewards=given .* Put .* before "):
        grpo(tmp_path / "run", [first, later])
    grpo(tmp_path / "run", [later, first])


@pytest.mark.parametrize("later", [{**CONSTANT, "outcome": 0.5}, {"name": "pg", "rewards": "given"}])
def test_plugins_that_keep_the_weights_may_follow(tmp_path: Path, later: dict[str, Any]) -> None:
    grpo(tmp_path / "run", [{"name": "reachability", "probe": write_probe(tmp_path / "probe")}, later])


def test_streamed_data_are_weighted_too(tmp_path: Path) -> None:
    """Without an order to choose there is no need for rows."""
    plugin, seen = Reachability(write_probe(tmp_path / "probe")), Record()
    grpo(tmp_path / "run", instances=[plugin, seen], data=prompts().to_iterable_dataset()).train()
    assert plugin.state_dict()["draws"].sum() == 12
    ordered = Reachability(plugin.probe, order="easy-first")
    with pytest.raises(ConfigurationError, match="'reachability' orders the training prompts"):
        grpo(tmp_path / "other", instances=[ordered], data=prompts().to_iterable_dataset())


def test_routes_follow_what_training_draws(tmp_path: Path) -> None:
    plugin = Reachability(write_probe(tmp_path / "probe", ["marginal"] * len(PROMPTS)))
    known = plugin._prompts
    known.add(np.repeat([0, 1], 40), np.repeat([True, False], 40))
    known.reroute(Budget(4, 2.0), 0.95)
    # Always correct; never, with a worst step of 0.3 in 8 draws; not drawn.
    assert known.routes[:3] == ["saturated", "process_reward", "marginal"]
    known.add(np.repeat([0], 40), np.repeat([False], 40))
    known.reroute(Budget(4, 2.0), 0.95)
    assert known.routes[0] == "process_reward"  # by the last draws alone
    grpo(tmp_path / "run", instances=[plugin]).train()
    rerouting = Reachability(plugin.probe, reroute_every=1, success=-1.0)
    grpo(tmp_path / "other", instances=[rerouting]).train()
    assert rerouting._prompts.routes.count("saturated") == 2  # all draws succeed; the last step's come into force later


def test_gradient_of_the_demonstrations_is_added(tmp_path: Path) -> None:
    before, after = Record("before"), Record("after")
    plugin = Reachability(write_probe(tmp_path / "probe"), coefficient=0.3, batch_size=2)
    trainer = grpo(
        tmp_path / "run",
        instances=[before, plugin, after],
        streams={"demonstrations": ModularChain(steps=2).dataset(4)},
        max_steps=2,
    )
    trainer.train()
    assert len(before.stream) == 2
    for g, sft, got in zip(before.gradients, before.stream, after.gradients, strict=True):
        torch.testing.assert_close(got, g + 0.3 * sft)


def test_state_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    probe = write_probe(tmp_path / "probe")
    plugin = Reachability(probe, reroute_every=1)
    grpo(tmp_path / "run", instances=[plugin]).train()
    state = plugin.state_dict()
    assert state["draws"].sum() == 12
    other = Reachability(probe, reroute_every=1)
    other.load_state_dict(state)
    assert other._prompts.outcome() == plugin._prompts.outcome()
    for name, value in other.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name])), name
    with pytest.raises(ValueError, match="counts 3 prompts"):
        other.load_state_dict({**state, "draws": state["draws"][:3]})


def test_other_prompts_or_group_sizes_are_refused(tmp_path: Path) -> None:
    probe = write_probe(tmp_path / "probe")
    with pytest.raises(PluginError, match=r"4 of 4 prompts are not among those that the probe in .* saw"):
        grpo(tmp_path / "run", instances=[Reachability(probe)], data=ModularChain(steps=5).dataset(8)).train()
    with pytest.raises(ConfigurationError, match="is for num_generations=4, this run has 2"):
        grpo(tmp_path / "run", instances=[Reachability(probe)], num_generations=2)


def test_keys_fit_64_bits_and_take_messages() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert prompt_key(messages) == prompt_key([{"content": "a", "role": "user"}]) != prompt_key("a")
    assert prompt_number("ffffffffffffffff") == -1
    assert prompt_number("7fffffffffffffff") == 2**63 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saturated": -1.0}, r"saturated=-1\.0 is not >= 0"),
        ({"coefficient": float("nan")}, "coefficient=nan"),
        (dict.fromkeys(ROUTES, 0.0), "are all 0"),
        ({"reroute_every": -1}, "reroute_every=-1"),
        ({"order": "random"}, "order='random' is not one of data, easy-first, hard-first"),
        ({"marginal_groups": 0}, "marginal_groups=0 is not >= 1"),
        ({"confidence": 0.0}, r"confidence=0\.0"),
        ({"probe": "absent"}, "reachability: probe: .absent. holds no finished measurement"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(Reachability(**{"probe": write_probe(tmp_path / "probe"), **options}))
