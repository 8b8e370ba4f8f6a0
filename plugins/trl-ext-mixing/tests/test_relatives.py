"""CHORD, PCGrad, HPT and ReLIFT against their formulas, with gradients taken here on full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference
from mixing_runs import (
    Recorder,
    Rolled,
    checksum_reward,
    constant_reward,
    demonstrations,
    grpo,
    mixed_reward,
    prompts,
    stopping_model,
)
from oracles import combine, completions, demonstration_nll, gradient, model_at, rl_gradient, token_log_probs
from torch import Tensor
from trl_ext_mixing import HPT, Chord, ParallelAveraging, ReLIFT, Surgery
from trl_ext_mixing.surgery import pcgrad_weights

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.testing import tiny_llama, tiny_tokenizer

# Gradients of two ways to write one loss in fp64, through a head that TRL evaluates in tiles.
EXACT = 1e-10


@dataclass(eq=False)
class Late(Recorder):
    """A recorder for the last place."""


# -- CHORD -----------------------------------------------------------------------------------------------------------


def test_chord_is_the_weighted_sum_with_mu_on_its_schedule(tmp_path: Path) -> None:
    before, after = Recorder(), Late()
    trainer = grpo(tmp_path, [Chord(mu=0.8, mu_end=0.2, decay=0.5), after], recorder=before)
    trainer.train()
    mus = [0.8, 0.5, 0.2, 0.2]
    for step, mu in enumerate(mus):
        expected = combine(before.rl[step], before.sft[step], 1 - mu, mu)
        assert largest_difference(after.rl[step], expected) < EXACT
    assert [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")] == pytest.approx(mus)


def test_a_cosine_schedule_is_half_way_in_the_middle_and_flat_at_its_ends(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, [Chord(mu=1.0, mu_end=0.0, schedule="cosine")], max_steps=4)
    trainer.train()
    logged = [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")]
    assert logged == pytest.approx([(1 + math.cos(math.pi * t)) / 2 for t in (0, 0.25, 0.5, 0.75)])


def test_a_schedule_goes_on_where_the_run_is_when_plugin_states_are_reset(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    grpo(tmp_path, ["chord:mu=0.9,mu_end=0.1"], **settings).train()
    trainer = grpo(tmp_path, ["chord:mu=0.9,mu_end=0.1"], reset_plugin_state=True, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")]
    assert logged == pytest.approx([0.9, 0.7, 0.5, 0.3])


def test_phi_weighs_tokens_by_p_times_one_minus_p(tmp_path: Path) -> None:
    data, seen = demonstrations(5), Recorder()
    grpo(tmp_path, [Chord(phi=True, batch_size=5)], recorder=seen, stream=data, max_steps=1).train()
    model, tokenizer = model_at(seen.weights[0]), tiny_tokenizer()
    logps = torch.cat(
        [
            token_log_probs(model, r["prompt"], tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id])
            for r in data
        ]
    )
    p = logps.detach().exp()
    # TRL's head gives log-probabilities in fp32, and so the weights.
    assert largest_difference(seen.sft[0], gradient(model, -(p * (1 - p) * logps).mean())) < 1e-8


# -- surgery ----------------------------------------------------------------------------------------------------------


def test_pcgrad_is_the_sum_of_the_projected_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = set()
    for _ in range(20):
        a, b = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        dot = a @ b
        x, y = pcgrad_weights(torch.stack([a, b]) @ torch.stack([a, b]).T)
        d = torch.clamp(dot, max=0.0)
        expected = (a - d / (b @ b) * b) + (b - d / (a @ a) * a)  # the projections, written out
        torch.testing.assert_close(x * a + y * b, expected)
        signs.add(bool(dot < 0))
    assert signs == {True, False}


def test_surgery_does_not_blow_up_rounding_where_no_group_tells_anything(tmp_path: Path) -> None:
    """Six times 0.3 has a mean that rounds, so TRL's advantages are not quite zero."""
    before, after = Recorder(), Late()
    six = {"per_device_train_batch_size": 6, "num_generations": 6}
    grpo(tmp_path, [Surgery(), after], recorder=before, reward=constant_reward, max_steps=2, **six).train()
    for mine, sft in zip(after.rl, before.sft, strict=True):
        assert largest_difference(mine, sft) == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_the_surgery_leaves_no_conflict_in_a_run(tmp_path: Path, normalise: bool) -> None:
    before, after = Recorder(), Late()
    grpo(tmp_path, [Surgery(normalise=normalise), after], recorder=before, max_steps=8).train()
    conflicts = 0
    for g_rl, g_sft, mixed in zip(before.rl, before.sft, after.rl, strict=True):
        a, b, got = (torch.cat([t.flatten() for t in v]) for v in (g_rl, g_sft, mixed))
        if normalise:
            mean = (a.norm() + b.norm()) / 2
            a, b = a / a.norm() * mean, b / b.norm() * mean
        conflicts += int(a @ b < 0)
        d = torch.clamp(a @ b, max=0.0)
        expected = (a - d / (b @ b) * b) + (b - d / (a @ a) * a)
        # Weights are made of fp32 scalars.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert conflicts > 0, "no step of this run had a conflict; choose another seed"


def least_norm(a: Tensor, b: Tensor) -> Tensor:
    """MGDA for two (Sener and Koltun, arXiv:1810.04650, eq. 4): the shortest convex combination, by a fine grid."""
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    a, b = a.double(), b.double()
    squared = shares**2 * (a @ a) + (1 - shares) ** 2 * (b @ b) + 2 * shares * (1 - shares) * (a @ b)
    share = shares[squared.argmin()]
    return share * a + (1 - share) * b


@pytest.mark.parametrize("weighting", ["half-space", "mgda"])
def test_the_weightings_of_the_projection_distribution_apply_to_the_two_gradients(
    tmp_path: Path, weighting: str
) -> None:
    pytest.importorskip("trl_ext_data_regularization", reason="its weightings are used")
    if weighting == "mgda":
        pytest.importorskip("torchjd", reason="MGDA is torchjd's")
    before, after = Recorder(), Late()
    plugin = Surgery(weighting=weighting, normalise=False)
    grpo(tmp_path, [plugin, after], recorder=before, max_steps=8).train()
    conflicts = 0
    for g_rl, g_sft, mixed in zip(before.rl, before.sft, after.rl, strict=True):
        a, b, got = (torch.cat([t.flatten() for t in v]).double() for v in (g_rl, g_sft, mixed))
        conflicts += int(a @ b < 0)
        expected = a - torch.clamp(a @ b, max=0.0) / (b @ b) * b if weighting == "half-space" else least_norm(a, b)
        # Weights are made of fp32 scalars; torchjd stops its iteration at 1e-3 of the norm.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 if weighting == "half-space" else 2e-3)
    assert conflicts > 0, "no step of this run had a conflict; choose another seed"


def test_a_weighting_that_is_none_is_refused() -> None:
    pytest.importorskip("trl_ext_data_regularization", reason="its weightings are named")
    with pytest.raises(ValueError, match="surgery: weighting='majority' is not one of half-space, pcgrad, upgrad"):
        Surgery(weighting="majority")


# -- demonstrations of the same prompts ------------------------------------------------------------------------------


def test_same_prompt_demonstrations_replace_the_stream(tmp_path: Path) -> None:
    data = demonstrations(12)
    rolled, seen = Rolled(), Recorder()
    trainer = grpo(
        tmp_path,
        [rolled, ParallelAveraging(demonstrations="completion", batch_size=1, coefficient=1.0)],
        recorder=seen,
        stream=False,
        data=data,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_grad_norm=0.0,
        optim="sgd",
        max_steps=2,
    )
    trainer.train()
    for step, (rollouts, _, _) in enumerate(rolled.batches):
        rows = {row["prompt"]: row for row in rollouts.inputs}
        assert len(rows) == 2
        model = model_at(seen.weights[step])
        expected = gradient(model, demonstration_nll(model, list(rows.values())))
        moved = [(a - b) / 1e-2 for a, b in zip(seen.weights[step], seen.weights[step + 1], strict=True)]
        assert largest_difference(moved, expected) < EXACT


def test_evaluation_does_not_exchange_the_rows_of_the_step(tmp_path: Path) -> None:
    """With two steps a generation batch would be refused, so evaluation comes between generation and step only here."""
    data = demonstrations(12)
    plugin, rolled = ParallelAveraging(stream_row="row"), Rolled()
    rows = data.remove_columns("completion").add_column("row", list(range(12)))
    trainer = grpo(tmp_path, [rolled, plugin], stream=data, data=rows, eval_data=rows.select([11]), max_steps=1)
    trainer.train()
    chosen = list(plugin._rows)
    trainer.evaluate()
    assert not rolled.batches[-1][0].training
    assert plugin._rows == chosen == [rolled.batches[0][0].inputs[0]["row"]] != [11]


@pytest.mark.parametrize("objective", [False, True])
def test_stream_rows_of_the_same_prompts_go_through_the_stream(tmp_path: Path, objective: bool) -> None:
    """Also with an objective, which `demonstrations` does not have; the objective here doubles the loss."""

    class Double:
        requires_api = "1"
        citation = "test"

        @hookimpl
        def per_token_loss(self, tokens: Any) -> Tensor:
            return -2 * tokens.log_probs

    data = demonstrations(12)
    rolled, seen = Rolled(), Recorder()
    grpo(
        tmp_path,
        [rolled, *([Double()] if objective else []), ParallelAveraging(stream_row="row")],
        recorder=seen,
        stream=data,
        data=data.remove_columns("completion").add_column("row", list(range(12))),
        per_device_train_batch_size=8,
        max_steps=2,
    ).train()
    for step, (rollouts, _, _) in enumerate(rolled.batches):
        prompts = [row["prompt"] for row in rollouts.inputs[::4]]
        assert len(set(prompts)) == 2
        rows = [row for prompt in prompts for row in data if row["prompt"] == prompt]
        model = model_at(seen.weights[step])
        nll = demonstration_nll(model, rows)
        # TRL's head works in fp32.
        assert largest_difference(seen.sft[step], gradient(model, (2 if objective else 1) * nll)) < 1e-6


@pytest.mark.parametrize(("loss_type", "gamma", "accumulation"), [("dapo", 0, 1), ("dapo", 0.25, 2), ("grpo", 0.25, 1)])
def test_hpt_gives_each_prompt_one_of_two_losses_each_a_mean_of_its_own(
    tmp_path: Path, loss_type: str, gamma: float, accumulation: int
) -> None:
    rolled, seen = Rolled(), Recorder()
    trainer = grpo(
        tmp_path,
        [rolled, HPT(sft_coefficient=0.7, gamma=gamma)],
        recorder=seen,
        stream=False,
        data=demonstrations(16),
        model=stopping_model(),
        reward=mixed_reward,
        loss_type=loss_type,
        max_completion_length=8,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
    )
    trainer.train()
    mixed, lengths, at_gamma = 0, set(), 0
    for step, (rollouts, rewards, advantages) in enumerate(rolled.batches):
        rates = rewards.total.view(-1, 4).gt(0).float().mean(1)
        lengths |= set(rollouts.mask.sum(1).tolist())
        at_gamma += int((rates == 0.25).sum())
        keep = [bool(rates[i // 4] > gamma) for i in range(len(rollouts.prompts))]
        rows = [rollouts.inputs[i] for i in range(0, len(keep), 4) if not keep[i]]
        mixed += 0 < len(rows) < 4
        model = model_at(seen.weights[step])
        kept = [c for c, keeps in zip(completions(rollouts, advantages), keep, strict=True) if keeps]
        expected = rl_gradient(model, kept, per_token=loss_type == "dapo")
        if rows:
            expected = combine(expected, gradient(model, demonstration_nll(model, rows)), 1.0, 0.7)
        # TRL's advantages are fp32.
        assert largest_difference(seen.rl[step], expected) < 1e-6, step
    assert mixed, "no batch had both kinds of prompt"
    assert len(lengths) > 2, "no two denominators differ"
    assert at_gamma, "no pass rate was 1/4"


def test_hpt_with_every_prompt_solved_is_plain_grpo_and_asks_for_no_demonstration(tmp_path: Path) -> None:
    runs = []
    for i, plugins in enumerate(([HPT(solved_at=0.0)], [])):
        seen = Recorder()
        data = prompts(16).add_column("completion", [""] * 16)
        grpo(tmp_path / str(i), plugins, recorder=seen, stream=False, data=data).train()
        runs.append(seen)
    assert largest_difference(runs[0].weights[-1], runs[1].weights[-1]) == 0
    assert largest_difference(runs[0].weights[0], runs[0].weights[-1]) > 1e-3


def never(completions: Sequence[str], **columns: Any) -> list[float]:
    """Differs within groups, and never reaches 1."""
    return [0.9 * r for r in checksum_reward(completions)]


def test_relift_steps_on_the_unsolved_prompts_when_the_buffer_is_full(tmp_path: Path) -> None:
    rolled, seen = Rolled(), Late()
    trainer = grpo(
        tmp_path,
        [rolled, ReLIFT(buffer_size=3, batch_size=1, lr_ratio=0.5), seen],
        stream=False,
        data=demonstrations(16),
        reward=mixed_reward,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        max_steps=6,
    )
    trainer.train()
    buffered: list[Any] = []
    steps = solved = 0
    for step, (rollouts, rewards, _) in enumerate(rolled.batches):
        for i in range(0, len(rollouts.inputs), 4):
            unsolved = not bool(rewards.total[i : i + 4].any())
            buffered += [rollouts.inputs[i]] * unsolved
            solved += not unsolved
        expected = combine(seen.weights[step], seen.rl[step], 1.0, -1e-2)
        if len(buffered) >= 3:
            model = model_at(expected)
            expected = combine(expected, gradient(model, demonstration_nll(model, buffered[:3])), 1.0, -5e-3)
            buffered, steps = buffered[3:], steps + 1
        # Llama's norms work in fp32, where the last bit of the weights in between shows; the SFT step moves by 1e-3.
        assert largest_difference(seen.weights[step + 1], expected) < 1e-9, step
    assert solved > 0
    assert steps > 1
    assert trainer.state.log_history[-2]["relift/sft_steps"] == steps


def test_relift_clips_its_step_and_leaves_evaluation_and_skipped_steps_alone(tmp_path: Path) -> None:
    class Break:
        """Makes the RL gradient of the second step infinite."""

        requires_api, citation, steps = "1", "test", 0

        @hookimpl
        def gradients_ready(self, gradients: Any, streams: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                gradients.mul_(torch.inf)

    rolled, seen = Rolled(), Late()
    trainer = grpo(
        tmp_path,
        [rolled, ReLIFT(buffer_size=1, max_grad_norm=0.1), Break(), seen],
        stream=False,
        data=demonstrations(16),
        eval_data=demonstrations(4),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        reward=never,
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=3,
        nonfinite="skip",
    )
    trainer.train()
    batches = [rollouts for rollouts, _, _ in rolled.batches if rollouts.training]
    assert len(rolled.batches) > len(batches) == 3
    waiting: list[Any] = []
    for step, rollouts in enumerate(batches):
        waiting.append(rollouts.inputs[0])
        expected = seen.weights[step]
        if step != 1:
            expected = combine(expected, seen.rl[step], 1.0, -1e-2)
            while waiting:
                model = model_at(expected)
                sft = gradient(model, demonstration_nll(model, [waiting.pop(0)]))
                norm = float(torch.sqrt(sum((g * g).sum() for g in sft)))
                assert norm > 0.1
                expected = combine(expected, sft, 1.0, -1e-2 * 0.1 / (norm + 1e-6))
        assert largest_difference(seen.weights[step + 1], expected) < 1e-9, step


def test_a_non_finite_gradient_of_the_buffer_is_left_out_or_stops_the_run(tmp_path: Path) -> None:
    def poisoned() -> Any:
        model = tiny_llama(hidden=16).double()

        def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            # Only `Demonstrations` asks for plain logits without a cache.
            if kwargs.get("use_cache") is False and not kwargs.get("fused_lm_head"):
                output.logits = output.logits * torch.inf
            return output

        model.register_forward_hook(spoil, with_kwargs=True)
        return model

    given: dict[str, Any] = {"stream": False, "data": demonstrations(16), "reward": never, "max_steps": 3}
    trainer = grpo(tmp_path, ["relift:buffer_size=1"], model=poisoned(), nonfinite="skip", **given)
    trainer.train()
    last = trainer.state.log_history[-2]
    assert (last["relift/sft_steps"], last["relift/skipped_sft_steps"]) == (0, 3)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    with pytest.raises(PluginError, match=r"relift.*nonfinite='skip' leaves such steps out"):
        grpo(tmp_path, ["relift:buffer_size=1"], model=poisoned(), **given).train()


def test_relift_keeps_its_buffer_over_a_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "reward": never}

    def run(**more: Any) -> tuple[Any, Late]:
        seen = Late()
        plugins = ["relift:buffer_size=5", seen]
        return grpo(tmp_path, plugins, stream=False, data=demonstrations(16), **settings), seen

    whole, seen_whole = run()
    whole.train()
    resumed, seen = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(seen_whole.weights[-1], seen.weights[-1]) == 0
    assert resumed.state.log_history[-2]["relift/sft_steps"] == 1
