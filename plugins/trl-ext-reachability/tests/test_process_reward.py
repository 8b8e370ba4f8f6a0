"""Advantages from process rewards: equal to plain GRPO's where they should be, masked, and refused where wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from runs import TASK, checksum_reward, distance, failing_verifier, grpo, prompts, weights
from torch import Tensor
from trl_ext_reachability.process_reward import ProcessReward, normalized, return_to_go

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.options import check_options
from trl_ext.records import Rewards, Rollouts
from trl_ext.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OTHER_END = next(token for token in TOKENIZER.all_special_ids if token != TOKENIZER.eos_token_id)
"""Ends a completion too, as the model's generation config says."""
CONTEXT: Any = SimpleNamespace(
    tokenizer=TOKENIZER, model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[OTHER_END]))
)


@dataclass(eq=False)
class Record:
    """Keeps what the advantages chain has come to."""

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "test"

    def __post_init__(self) -> None:
        self.seen: list[tuple[Rollouts, Tensor]] = []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        self.seen.append((rollouts, advantages))
        return advantages


def constant_process(**options: Any) -> dict[str, Any]:
    return {"name": "process-reward", "verifier": "runs:constant_verifier", "normalize": "group", **options}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_truncated_completions": True, "max_completion_length": 40},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "num_iterations": 2},
    ],
    ids=["dapo", "truncated", "grpo off policy"],
)
@pytest.mark.parametrize("split", ["token", "delimiter"])
def test_constant_process_reward_is_plain_grpo(tmp_path: Path, settings: dict[str, Any], split: str) -> None:
    # SGD: Adam's first steps would amplify rounding in small gradients, by how much depends on the processor.
    settings = {**settings, "optim": "sgd", "learning_rate": 0.5}
    plain = grpo(tmp_path / "a", plain=True, **settings)
    start = weights(plain)
    plain.train()
    # Made here: the constructor seeds the generation.
    process = grpo(tmp_path / "b", [constant_process(split=split, delimiter="e")], **settings)
    process.train()
    assert distance(start, weights(plain)) > 1e-2
    # The standard deviation is summed in another order.
    assert distance(weights(plain), weights(process)) < 2e-6


def fake(completions: list[str], mask: list[list[int]] | None = None, **row: Any) -> Rollouts:
    """Rollouts of one group, with EOS after each completion."""
    ids = [[*TOKENIZER(c)["input_ids"], TOKENIZER.eos_token_id] for c in completions]
    width = max(map(len, ids))
    shown = mask or [[1] * len(i) + [0] * (width - len(i)) for i in ids]
    nothing = torch.zeros(len(ids), 1, dtype=torch.long)
    return Rollouts(
        inputs=[{"prompt": "", **row} for _ in ids],
        prompts=[""] * len(ids),
        completions=completions,
        prompt_ids=nothing,
        prompt_mask=nothing,
        completion_ids=torch.tensor([i + [TOKENIZER.pad_token_id] * (width - len(i)) for i in ids]),
        mask=torch.tensor(shown),
        num_generations=len(ids),
        step=0,
        training=True,
    )


def advantages_of(rollouts: Rollouts, incoming: Tensor | None = None, **options: Any) -> Tensor:
    plugin = ProcessReward(**options)
    plugin.setup(CONTEXT)
    n = len(rollouts.prompts)
    rewards = Rewards(torch.zeros(n, 1), ("r",), torch.ones(1), slice(0, n))
    return plugin.advantages(rollouts, rewards, torch.zeros(n) if incoming is None else incoming)


def test_advantages_are_the_rewards_of_the_steps() -> None:
    rollouts = fake(["1,2,3", "1,9,3"], answer="1,2,3")
    options: dict[str, Any] = {"solution": "answer", "delimiter": ","}
    assert advantages_of(rollouts, **options).tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert advantages_of(rollouts, wrong=-1.0, **options).tolist() == [[1] * 6, [1, 1, -1, -1, -1, -1]]
    to_go = advantages_of(rollouts, return_to_go=True, **options).tolist()
    assert to_go == [[3, 3, 2, 2, 1, 1], [1, 1, 0, 0, 0, 0]]


def test_a_model_has_ends_of_its_own() -> None:
    """Stopping early is wrong, by whichever token."""
    rollouts = fake(["1,2", "1,2"], answer="1,2,3")
    rollouts.completion_ids[1, -1] = OTHER_END
    assert advantages_of(rollouts, solution="answer", delimiter=",").tolist() == [[1, 1, 0, 0]] * 2


def test_outcome_is_added_with_its_weight() -> None:
    rollouts = fake(["1,2", "1,9"], answer="1,2")
    outcome = torch.tensor([1.0, -1.0])
    got = advantages_of(rollouts, outcome, solution="answer", delimiter=",", outcome=0.5)
    assert got.tolist() == [[1.5] * 4, [0.5, 0.5, -0.5, -0.5]]
    per_token = torch.arange(8.0).view(2, 4)
    got = advantages_of(rollouts, per_token, solution="answer", delimiter=",", outcome=1.0)
    assert torch.equal(got - per_token, torch.tensor([[1.0] * 4, [1.0, 1, 0, 0]]))


def test_nothing_outside_of_the_mask() -> None:
    """Tool results are no step, and their tokens have no advantage; a masked completion has none at all."""
    mask = [[1, 1, 0, 0, 1, 1], [0] * 6]
    rollouts = fake(["1,TT2", "1,TT2"], mask, answer="1,2")
    got = advantages_of(rollouts, solution="answer", delimiter=",")
    assert got.tolist() == [[1, 1, 0, 0, 1, 1], [0] * 6]


def by_hand(rewards: list[list[float]], scale: bool) -> list[list[float]]:
    """Each completion has weight one, spread over its steps; the variance has the divisor of a sample's."""
    mean = sum(sum(r) / len(r) for r in rewards) / len(rewards)
    variance = sum(sum((x - mean) ** 2 for x in r) / len(r) for r in rewards) / (len(rewards) - 1)
    return [[(x - mean) / (variance**0.5 + 1e-4 if scale else 1) for x in r] for r in rewards]


@pytest.mark.parametrize("how", ["center", "group"])
def test_groups_are_normalised_with_equal_weight_for_each_completion(how: Any) -> None:
    groups = [[[1.0, 0.0, 0.5], [1.0]], [[0.2, 0.4], [0.0, 0.0, 1.0]]]
    rewards = torch.zeros(4, 3)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    for i, row in enumerate(groups[0] + groups[1]):
        rewards[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    got = normalized(rewards, mask, 2, slice(0, 4), how)
    expected = [row for group in groups for row in by_hand(group, how == "group")]
    for i, row in enumerate(expected):
        assert got[i, : len(row)].tolist() == pytest.approx(row, rel=1e-5)  # fp32 against fp64


def test_return_to_go_is_the_sum_of_what_follows() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert return_to_go(rewards, mask)[mask].tolist() == [7, 6, 4, 8, 5]


def test_training_gives_the_verifier_rows_and_logs_metrics(tmp_path: Path) -> None:
    record = Record()
    trainer = grpo(
        tmp_path,
        ["process-reward:solution=answer,split=token"],
        instances=[record],
        reward=TASK.reward,
        data=prompts().map(lambda row: {"answer": row["answer"]}),
    )
    trainer.train()
    rollouts, advantages = record.seen[0]
    for row, ids, mask, got in zip(
        rollouts.inputs, rollouts.completion_ids, rollouts.mask, advantages.tolist(), strict=True
    ):
        target = [*TOKENIZER(row["answer"])["input_ids"], TOKENIZER.eos_token_id]
        right = True
        for t, token in enumerate(ids.tolist()):
            right = right and t < len(target) and token == target[t]
            assert got[t] == float(right and mask[t])
    logs = trainer.state.log_history[0]
    assert logs["process-reward/steps"] == pytest.approx(rollouts.mask.sum(1).float().mean().item())
    assert {"process-reward/reward", "process-reward/all_right"} <= set(logs)


def test_evaluation_has_groups_of_its_own(tmp_path: Path) -> None:
    record = Record()
    trainer = grpo(
        tmp_path,
        [constant_process(split="token")],
        instances=[record],
        eval_strategy="steps",
        eval_steps=3,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        eval_data=prompts(4),
    )
    trainer.train()
    assert any("eval_process-reward/reward" in logs for logs in trainer.state.log_history)
    evaluated = [(rollouts, got) for rollouts, got in record.seen if not rollouts.training]
    assert evaluated
    for rollouts, got in evaluated:
        rewards = torch.tensor(checksum_reward(rollouts.completions)).view(-1, 2)
        assert [a == b for a, b in zip(rollouts.prompts[::2], rollouts.prompts[1::2], strict=True)] == [True] * 2
        expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(got, expected.view(-1, 1) * rollouts.mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "group"])
def test_verifier_that_fails_stops_the_run(tmp_path: Path, normalize: str) -> None:
    names = [{"name": "process-reward", "verifier": "runs:failing_verifier", "normalize": normalize}]
    with pytest.raises(PluginError, match=r"process-reward.*'advantages' at step 1: LookupError: no verdict"):
        grpo(tmp_path, names).train()


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda steps, **c: [[1.0]] * (len(steps) - 1), "rewards for 1 completions instead of 2"),
        (lambda steps, **c: [row[1:] for row in steps], "gave 0 rewards for the 1 steps of completion 0"),
        (lambda steps, **c: [[float("nan")] for _ in steps], "not finite, for completion 0"),
    ],
)
def test_wrong_verdicts_are_named(verdict: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.constant_verifier", verdict)
    with pytest.raises(ValueError, match=message):
        advantages_of(fake(["a", "b"]), verifier="runs:constant_verifier")


@pytest.mark.parametrize("how", ["none", "center", "group"])
def test_what_the_verifier_did_not_judge_counts_nowhere(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for a completion or a step: advantage 0, and the group's mean and spread are those of the others."""
    verdicts = [[1.0, None], None, [0.0, 0.5]]
    monkeypatch.setattr("runs.constant_verifier", lambda **columns: verdicts)
    got = advantages_of(fake(["1,2"] * 3), verifier="runs:constant_verifier", delimiter=",", normalize=how)
    judged = [[1.0], [0.0, 0.5]]
    (first,), (second, third) = judged if how == "none" else by_hand(judged, how == "group")
    expected = torch.tensor([[first, first, 0, 0], [0.0] * 4, [second, second, third, third]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # fp32 against fp64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "word"}, "split='word' is not one of delimiter, turn, token"),
        ({"normalize": "batch"}, "normalize='batch' is not one of"),
        ({"delimiter": ""}, "delimiter=''"),
        ({"wrong": 1.0}, r"wrong=1\.0 is not < 1"),
        ({"outcome": float("inf")}, "outcome=inf"),
        ({"pattern": "("}, "pattern='\\(' is no regular expression"),
        ({"verifier": "model"}, "verifier='model', model=''"),
        ({"model": "path"}, "verifier='steps', model='path'"),
        ({"split": "turn"}, "split='turn': a reference solution has no turns"),
        ({"split": "token", "pattern": "1"}, "pattern='1': split='token' compares tokens"),
        ({"separator": ";"}, "separator=';' is for verifier='model'; leave it out with 'steps'"),
        ({"verifier": "runs:constant_verifier", "wrong": -1.0}, r"wrong=-1\.0 is for verifier='steps'"),
        ({"verifier": "runs:constant_verifier", "solution": "a"}, "solution='a' is for verifier='steps'"),
        ({"verifier": "model", "model": "path", "pattern": "a"}, "pattern='a' is for verifier='steps'"),
        ({"verifier": "runs"}, "not of the form"),
        (
            {"verifier": "runs:absent"},
            "verifier 'runs:absent' .* no attribute 'absent'",
        ),
        ({"verifier": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"verifier": "no/such/file.py:f"}, "there is no file"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(ProcessReward(**options))


def test_missing_or_clashing_column_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="solution='solution': the data set has no such column"):
        grpo(tmp_path, ["process-reward"])
    with pytest.raises(ConfigurationError, match="column 'steps'"):
        grpo(tmp_path, [constant_process()], data=prompts().rename_column("answer", "steps"))


def test_helpers_give_a_signal() -> None:
    assert len(set(checksum_reward(["a", "b", "c"]))) > 1
    with pytest.raises(LookupError):
        failing_verifier([["a"]])
