"""Parallel averaging in whole runs: resume, skipped halves and steps, non-finite gradients, kinds of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_runs import Recorder, Rolled, Vector, constant_reward, demonstrations, grpo
from trl_ext_mixing import ParallelAveraging
from trl_ext_mixing.pass_rates import all_groups_equal

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, NonFiniteError
from trl_ext.records import Rewards


def same(a: Vector, b: Vector) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_equals_the_uninterrupted_run_to_the_last_bit(tmp_path: Path, accumulation: int) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
    }
    line = ["parallel-averaging:coefficient=0.9,coefficient_end=0.1,batch_size=5"]
    whole = Recorder()
    grpo(tmp_path, line, recorder=whole, **settings).train()
    rest = Recorder()
    resumed = grpo(tmp_path, line, recorder=rest, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(rest.rl) == 3
    assert same(whole.sft[3], rest.sft[0]), "the stream continues at its position"
    assert same(whole.weights[-1], rest.weights[-1])


def test_the_coefficient_follows_its_schedule_and_is_logged(tmp_path: Path) -> None:
    plugin = ParallelAveraging(coefficient=0.9, coefficient_end=0.1, schedule="linear")
    trainer = grpo(tmp_path, [plugin])
    trainer.train()
    logged = [v for entry in trainer.state.log_history for k, v in entry.items() if k.endswith("/coefficient")]
    assert logged == pytest.approx([0.9, 0.7, 0.5, 0.3])


def test_every_diagnostic_is_logged_each_step(tmp_path: Path) -> None:
    seen, rolled = Recorder(), Rolled()
    trainer = grpo(tmp_path, [rolled, ParallelAveraging(solved_at=0.5)], recorder=seen, per_device_train_batch_size=8)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = (
        "pass_rate", "sft_nll", "grad_norm_rl", "grad_norm_sft", "grad_cosine", "grad_sign_conflicts",
        "update_norm_rl", "update_norm_sft", "update_cosine", "update_sign_conflicts", "coefficient",
    )  # fmt: skip
    assert len(steps) == 4
    for entry in steps:
        for name in names:
            assert isinstance(entry[f"parallel-averaging/{name}"], float), name
    for entry, rl, sft, (_, rewards, _) in zip(steps, seen.rl, seen.sft, rolled.batches, strict=True):
        a, b = (torch.cat([t.flatten() for t in gradient]) for gradient in (rl, sft))
        solved = (rewards.total >= 0.5).view(-1, 4)
        expected = {
            "grad_norm_rl": a.norm(),
            "grad_norm_sft": b.norm(),
            "grad_cosine": torch.cosine_similarity(a, b, 0),
            "grad_sign_conflicts": ((a * b) < 0).double().mean(),
            "pass_rate": solved.double().mean(),
            "solved_prompts": solved.any(1).double().mean(),
        }
        for name, value in expected.items():
            # Sums in fp32 of gradients in fp64.
            assert entry[f"parallel-averaging/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert steps[-1]["parallel-averaging/sft_nll"] < steps[0]["parallel-averaging/sft_nll"]


def test_without_a_signal_momentum_moves_the_weights_unless_the_rl_half_is_skipped(tmp_path: Path) -> None:
    """Rewards are informative for two steps and then constant; c = 0 leaves only the RL half in the weights."""
    calls = []

    def fading(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        return [sum(map(ord, c)) % 7 / 6 if len(calls) <= 2 else 0.3 for c in completions]

    for skip in (False, True):
        calls.clear()
        seen = Recorder()
        plugin = ParallelAveraging(coefficient=0.0, skip_equal_rewards=skip)
        # Six times 0.3 has a mean that rounds, so TRL's advantages are not quite zero.
        six = {"per_device_train_batch_size": 6, "num_generations": 6}
        grpo(tmp_path / str(skip), [plugin], recorder=seen, reward=fading, **six).train()
        assert not same(seen.weights[1], seen.weights[2])
        assert same(seen.weights[2], seen.weights[4]) == skip
        assert all(float(g.abs().max()) == 0 for g in seen.rl[3]) or not skip


def test_constant_rewards_leave_pass_rate_and_sft_half_alone(tmp_path: Path) -> None:
    seen = Recorder()
    plugin = ParallelAveraging(skip_equal_rewards=True, solved_at=0.3)
    trainer = grpo(tmp_path, [plugin], recorder=seen, reward=constant_reward)
    trainer.train()
    (rate,) = {v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/pass_rate")}
    (skipped,) = {v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/skipped_rl")}
    assert (rate, skipped) == (1.0, 1.0)
    assert not same(seen.weights[0], seen.weights[1])


class Poison:
    """Makes the stream's gradient infinite at the second step."""

    requires_api = "1"
    citation = "test"
    steps = 0

    @hookimpl
    def per_token_loss(self, tokens: Any) -> torch.Tensor:
        self.steps += 1
        return -tokens.log_probs * (torch.inf if self.steps == 2 else 1.0)


def test_a_non_finite_sft_gradient_is_found_before_the_step(tmp_path: Path) -> None:
    seen = Recorder()
    trainer = grpo(tmp_path / "raise", [Poison(), ParallelAveraging()], recorder=seen)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.train()
    assert len(seen.weights) == 2
    seen = Recorder()
    grpo(tmp_path / "skip", [Poison(), ParallelAveraging()], recorder=seen, nonfinite="skip").train()
    assert same(seen.weights[1], seen.weights[2]), "skipped whole"
    assert not same(seen.weights[2], seen.weights[3])
    assert all(bool(t.isfinite().all()) for t in seen.weights[-1])


def test_the_demonstrations_are_required_and_sft_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="role 'sft'"):
        grpo(tmp_path, ["parallel-averaging"], stream=False)


def test_options_of_the_stream_reach_it(tmp_path: Path) -> None:
    trainer = grpo(tmp_path / "stop", ["parallel-averaging:batch_size=5,on_exhausted=stop"], max_steps=9)
    trainer.train()
    assert trainer.state.global_step == 2, "12 demonstrations are two whole batches"
    whole, cut = Recorder(), Recorder()
    grpo(tmp_path / "whole", ["parallel-averaging:batch_size=12"], recorder=whole, max_steps=1).train()
    grpo(tmp_path / "cut", ["parallel-averaging:batch_size=12,max_length=9"], recorder=cut, max_steps=1).train()
    assert not same(whole.sft[0], cut.sft[0])


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "summed", "equal"),
    [
        ([[0.3], [0.3], [1.0], [1.0]], True, True),
        ([[0.3], [0.4], [1.0], [1.0]], True, False),
        ([[0.3], [NAN], [1.0], [1.0]], True, True),  # TRL gives an unscored completion no advantage
        ([[NAN], [NAN], [0.0], [0.0]], True, True),
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], True, True),  # the sums are equal
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], False, False),  # each function tells them apart
        ([[NAN, 0.5], [0.0, 0.5], [1.0, NAN], [1.0, NAN]], False, True),
    ],
)
def test_groups_without_a_signal(values: list[list[float]], summed: bool, equal: bool) -> None:
    rewards = Rewards(torch.tensor(values), ("a", "b")[: len(values[0])], torch.ones(len(values[0])), slice(0, 4))
    assert all_groups_equal(rewards, 2, summed) == equal


def test_messages_and_text_serve_as_demonstrations(tmp_path: Path) -> None:
    from mixing_runs import TASK

    for kind, conversational in (
        ("language_modeling", False),
        ("language_modeling", True),
        ("prompt_completion", True),
    ):
        data = TASK.dataset(8, kind, conversational=conversational, seed=1)
        seen = Recorder()
        folder = tmp_path / f"{kind}-{conversational}"
        grpo(folder, ["parallel-averaging"], recorder=seen, stream=data, max_steps=1).train()
        assert max(float(g.abs().max()) for g in seen.sft[0]) > 0


def test_stream_gradient_is_that_of_the_mean_log_likelihood(tmp_path: Path) -> None:
    """Against transformers' own loss on the same rows, all in one batch, at a sampling temperature other than 1."""
    from trl_ext.testing import tiny_llama, tiny_tokenizer

    data, seen = demonstrations(6), Recorder()
    grpo(tmp_path, [ParallelAveraging(batch_size=6)], recorder=seen, stream=data, max_steps=1, temperature=0.5).train()
    model, tokenizer = tiny_llama(hidden=16).double(), tiny_tokenizer()
    rows = [
        (tokenizer(r["prompt"])["input_ids"], tokenizer(r["completion"] + tokenizer.eos_token)["input_ids"])
        for r in data
    ]
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.tensor([p + c + [256] * (width - len(p) - len(c)) for p, c in rows])
    labels = torch.tensor([[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in rows])
    model(input_ids=ids, attention_mask=(ids != 256).long(), labels=labels).loss.backward()
    for mine, p in zip(seen.sft[0], model.parameters(), strict=True):
        # transformers takes the cross-entropy in fp32.
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-7)


def test_in_company_of_an_average_and_an_objective(tmp_path: Path) -> None:
    pytest.importorskip("trl_ext_averaging")
    pytest.importorskip("trl_ext_objectives")
    seen = Recorder()
    trainer = grpo(tmp_path, ["dft", "parallel-averaging", "ema:decay=0.5"], recorder=seen, max_steps=3)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert 0 < last["parallel-averaging/sft_loss"] < 0.1 * last["parallel-averaging/sft_nll"], "dft weighs by p"
    trainer.save_model(str(tmp_path / "final"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "final" / "model.safetensors")
    average = seen.weights[0]
    for weights in seen.weights[1:]:
        average = [(a.float() + w.float()) / 2 for a, w in zip(average, weights, strict=True)]
    for (name, _), mean in zip(trainer.model.named_parameters(), average, strict=True):
        torch.testing.assert_close(saved[name].float(), mean, rtol=1e-5, atol=1e-6)


def test_adapters_alone_are_averaged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from branches import SCHEDULE, largest_difference, two_branches

    from trl_ext.testing import tiny_llama

    model = peft.get_peft_model(tiny_llama(hidden=16), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    seen = Recorder()
    settings: dict[str, Any] = {"optim": "adamw_torch", "max_grad_norm": 0.2, **SCHEDULE}
    grpo(tmp_path, [ParallelAveraging(batch_size=3)], recorder=seen, model=model.double(), **settings).train()
    expected = two_branches("adamw_torch", seen, 4, (1e-2, 1e-2), (0.2, 0.2))
    assert largest_difference(seen.weights[-1], expected[-1]) == 0
    assert largest_difference(seen.weights[-1], seen.weights[0]) > 1e-3
    assert same([p.detach().float() for p in model.parameters() if not p.requires_grad], frozen)
