"""Sample weights: what they do to the step, what the window offers, and that computing them leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Nll, Plugin, assert_close, assert_equal_bits
from torch import Tensor, nn

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.gradients import trainable_parameters
from trl_ext.records import SampleWeights, StreamRequest, Window
from trl_ext.testing import tiny_moe
from trl_ext.testing.runs import additions, logged, lora, make_sft, moved, parameters, tiny_model

ROUNDING = {"rtol": 0, "atol": 2e-6}  # sums of fp32 in another order, under SGD
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
PADDING_FREE = {"padding_free": True, "max_length": None}


@dataclass(eq=False)
class Weigh(Plugin):
    """Weights by a function of the window."""

    choose: Callable[[Window], Any]
    windows: list[Window] = field(default_factory=list)

    @hookimpl
    def sample_weights(self, window):
        self.windows.append(window)
        return self.choose(window)


def ones(window: Window) -> Tensor:
    return torch.ones(window.num_samples)


def every_second(window: Window) -> Tensor:
    return torch.arange(window.num_samples) % 2.0


CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "padding-free": {**PADDING_FREE, "gradient_accumulation_steps": 2},
    "lora": {"trainer": {"peft_config": lora()}},
    "moe": {"model": "moe"},
    "dropout": {"model": "dropout"},
    "activation checkpointing": {"activation_checkpointing": True},
}
MODELS = {
    "moe": lambda: tiny_moe(hidden=16, layers=1, output_router_logits=True),
    "dropout": lambda: tiny_model(attention_dropout=0.2),
}


def build(folder: Any, case: dict[str, Any], **more: Any) -> Any:
    config = {"max_steps": 4, **case, **more}
    model = MODELS[config.pop("model")]() if "model" in config else None
    return make_sft(folder, model=model, **config)


@pytest.mark.parametrize("choose", [ones, lambda window: None], ids=["ones", "none"])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_one_are_plain_trl_bit_for_bit(tmp_path, case, choose):
    plain = build(tmp_path / "plain", CASES[case], plain=True)
    start = parameters(plain)
    plain.train()
    ours = build(tmp_path / "ours", CASES[case], plugins=[Weigh(choose)])
    ours.train()
    assert moved(plain, start) > 1e-3
    assert_equal_bits(parameters(ours), parameters(plain))
    assert logged(ours, "nll") == logged(plain)


@pytest.mark.parametrize("extra", [{}, PADDING_FREE], ids=["padded", "padding-free"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_weights_train_on_the_rest_alone(tmp_path, accumulation, extra):
    """One step on 8 samples with every second weight 0 is one step on the 4 others, with their token mean."""
    samples = additions(8)
    size = 8 // accumulation
    weigh = Weigh(every_second)
    config = {**SGD, **extra, "max_steps": 1}
    weighted = make_sft(
        tmp_path / "a",
        train=samples,
        plugins=[weigh],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **config,
    )
    start = parameters(weighted)
    weighted.train()
    # Which samples the window had, in its order: found by their tokens.
    (window,) = weigh.windows
    kept = [row for i, row in enumerate(rows_of(window)) if i % 2]
    prepared = weighted.train_dataset
    indices = [i for i in range(8) if prepared[i]["input_ids"] in kept]
    assert len(indices) == 4
    subset = make_sft(
        tmp_path / "b", train=samples.select(indices), plain=True, per_device_train_batch_size=4, **config
    )
    subset.train()
    assert moved(weighted, start) > 500 * ROUNDING["atol"]
    assert_close(parameters(weighted), parameters(subset), **ROUNDING)
    assert logged(weighted)[0]["loss"] == pytest.approx(logged(subset)[0]["loss"], rel=1e-5)


def rows_of(window: Window) -> list[list[int]]:
    """Token ids of each sample of a window, without padding."""
    rows = []
    for batch in window.micro_batches:
        if "attention_mask" in batch:
            pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            rows += [ids[mask.bool()].tolist() for ids, mask in pairs]
        else:
            rows += [part.tolist() for part in batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())]
    return rows


@dataclass(eq=False)
class Look(Plugin):
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients):
        self.gradients.append(
            {n: t.clone() for n, t in zip(gradients.names, gradients.tensors, strict=True) if t is not None}
        )


@pytest.mark.parametrize("denominator", ["weighted", "tokens"])
@pytest.mark.parametrize("extra", [{}, PADDING_FREE], ids=["padded", "padding-free"])
def test_gradient_with_each_denominator_against_autograd(tmp_path, extra, denominator):
    """sum_i w_i nll_i / N, with N the label tokens ("tokens") or sum_i w_i x tokens of i ("weighted")."""
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25, 3.0, 0.1])
    weigh, look = Weigh(lambda window: SampleWeights(weights, denominator)), Look()
    trainer = make_sft(
        tmp_path,
        plugins=[weigh, look],
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **extra,
    )
    trainer.train()
    (window,) = weigh.windows
    model = tiny_model().double()
    total, plain_tokens, weighted_tokens = torch.zeros((), dtype=torch.float64), 0, 0.0
    for weight, (sum_nll, tokens) in zip(weights.double(), sample_losses(model, trainer, window), strict=True):
        total = total + weight * sum_nll
        plain_tokens += tokens
        weighted_tokens += float(weight) * tokens
    (total / (plain_tokens if denominator == "tokens" else weighted_tokens)).backward()
    for name, p in trainable_parameters(model).items():
        torch.testing.assert_close(look.gradients[0][name].double(), p.grad, rtol=0, atol=2e-6)  # fp32 against fp64


def sample_losses(model: nn.Module, trainer: Any, window: Window) -> list[tuple[Tensor, int]]:
    """(summed NLL, label tokens) of each sample, each run alone through the model with full logits."""
    by_ids = {tuple(row["input_ids"]): row["labels"] for row in trainer.train_dataset}
    losses = []
    for ids in rows_of(window):
        labels = torch.tensor(by_ids[tuple(ids)])[1:]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        mask = labels != -100
        losses.append((nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum"), int(mask.sum())))
    return losses


@pytest.mark.parametrize("extra", [{}, PADDING_FREE], ids=["padded", "padding-free"])
def test_the_windows_gradient_is_autograds(tmp_path, extra):
    """`window.gradient(i, w)`: of micro-batch i's share of the window's loss, its samples weighted by w."""
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5])
    found: dict[tuple[int, bool], dict[str, Tensor]] = {}

    def choose(window: Window) -> None:
        for i in range(2):
            for w in (None, weights):
                gradient = window.gradient(i, w)
                found[i, w is not None] = {
                    n: t.clone() for n, t in zip(gradient.names, gradient.tensors, strict=True) if t is not None
                }

    weigh = Weigh(choose)
    trainer = make_sft(
        tmp_path,
        plugins=[weigh],
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        **extra,
    )
    trainer.train()
    (window,) = weigh.windows
    for i in range(2):
        for weighted in (False, True):
            model = tiny_model().double()
            losses = sample_losses(model, trainer, window)
            tokens = sum(count for _, count in losses)
            share = weights.double() if weighted else torch.ones(4)
            (sum(share[j] * losses[j][0] for j in (2 * i, 2 * i + 1)) / tokens).backward()
            for name, p in trainable_parameters(model).items():
                torch.testing.assert_close(found[i, weighted][name].double(), p.grad, rtol=0, atol=2e-6)


def test_the_windows_forward_gives_the_micro_batchs_record(tmp_path):
    seen: list[tuple[float, float]] = []

    def choose(window: Window) -> None:
        records = [window.forward(i) for i in range(len(window.micro_batches))]
        total = sum(float(-r.log_probs.sum()) for r in records)
        seen.append((total / sum(int(r.mask.sum()) for r in records), float(records[0].denominator)))

    trainer = make_sft(tmp_path, plugins=[Weigh(choose)], max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert [s[0] for s in seen] == pytest.approx([entry["nll"] for entry in logged(trainer)[:2]], rel=1e-5)


@pytest.mark.parametrize("case", ["accumulation", "lora", "moe", "dropout", "activation checkpointing"])
def test_looking_at_a_window_leaves_no_trace(tmp_path, case):
    """Counters, metrics, gradients and random state stay: the run is bitwise the one without a plugin."""

    def choose(window: Window) -> None:
        window.forward(0)
        window.gradient(0, None)
        window.gradient(len(window.micro_batches) - 1, torch.rand(window.num_samples, generator=torch.Generator()))

    plain = build(tmp_path / "plain", CASES[case], plain=True)
    plain.train()
    weigh = Weigh(choose)
    ours = build(tmp_path / "ours", CASES[case], plugins=[weigh])
    ours.train()
    assert len(weigh.windows) == 4
    assert_equal_bits(parameters(ours), parameters(plain))
    assert logged(ours, "nll") == logged(plain)


def test_streams_asked_for_before_are_there(tmp_path):
    @dataclass(eq=False)
    class Aligned(Plugin):
        cosines: list[float] = field(default_factory=list)

        @hookimpl
        def streams(self):
            return [StreamRequest("target", when="before", batch_size=2)]

        @hookimpl
        def sample_weights(self, window):
            gradient = window.gradient(0, None)
            self.cosines.append(float(gradient.cosine(window.streams["target"].gradients)))

    plugin = Aligned()
    trainer = make_sft(tmp_path, plugins=[plugin], streams={"target": additions(8, seed=4)}, max_steps=2)
    trainer.train()
    assert all(0.1 < cosine < 1 for cosine in plugin.cosines)


def test_weights_apply_to_the_objective_of_another_plugin(tmp_path):
    """Weights 0 and 1 with `power` are `power` on the kept samples."""
    samples = additions(8)
    weigh = Weigh(every_second)
    config = {**SGD, "max_steps": 1, "per_device_train_batch_size": 8, "names": ["power:alpha=0.2"]}
    weighted = make_sft(tmp_path / "a", train=samples, plugins=[weigh], **config)
    start = parameters(weighted)
    weighted.train()
    kept = [row for i, row in enumerate(rows_of(weigh.windows[0])) if i % 2]
    indices = [i for i in range(8) if weighted.train_dataset[i]["input_ids"] in kept]
    subset = make_sft(tmp_path / "b", train=samples.select(indices), **{**config, "per_device_train_batch_size": 4})
    subset.train()
    assert moved(weighted, start) > 500 * ROUNDING["atol"]
    assert_close(parameters(weighted), parameters(subset), **ROUNDING)


def test_evaluation_is_not_weighted(tmp_path):
    config = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    held_out = {"eval_dataset": additions(4, seed=5)}
    plain = make_sft(tmp_path / "a", plain=True, trainer=held_out, **config)
    ours = make_sft(tmp_path / "b", plugins=[Weigh(every_second)], trainer=held_out, **config)
    for trainer in (plain, ours):
        trainer.train()
    losses = [[entry["eval_loss"] for entry in logged(t) if "eval_loss" in entry] for t in (plain, ours)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_only_the_ratio_of_weights_matters_where_they_are_the_denominator(tmp_path, scale):
    """Weights that sum to less than one token too: a mean has no floor."""
    finals = []
    for factor in (1.0, scale):
        trainer = make_sft(tmp_path, plugins=[Weigh(lambda w, f=factor: f * torch.ones(w.num_samples))], **SGD)
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 1e-3
        finals.append(parameters(trainer))
    assert_close(finals[1], finals[0], **ROUNDING)


def test_all_weights_zero_give_a_zero_step_and_no_nan(tmp_path):
    trainer = make_sft(tmp_path, plugins=[Weigh(lambda w: torch.zeros(w.num_samples))], max_steps=2, **SGD)
    start = parameters(trainer)
    trainer.train()
    assert_equal_bits(parameters(trainer), start)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(2, 2)], ids=["too few", "two dimensions"])
def test_weights_of_another_shape_are_refused(tmp_path, weights):
    trainer = make_sft(tmp_path, plugins=[Weigh(lambda window: weights), Nll()])
    with pytest.raises(PluginError, match=r"'Weigh'.*hook 'sample_weights' at step 1.*expected \(4,\)"):
        trainer.train()
