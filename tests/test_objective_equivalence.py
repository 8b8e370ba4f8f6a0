"""An objective given as a plugin trains as TRL would with it: same parameters, same metrics, one forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from helpers import (
    Nll,
    Plugin,
    additions,
    assert_close,
    assert_equal_bits,
    logged,
    lora,
    make_sft,
    moved,
    parameters,
    tiny_model,
    without_timing,
)

from trl_ext import hookimpl
from trl_ext.records import TokenRecord
from trl_ext.testing import tiny_moe, tiny_qwen2

Case = dict[str, Any]
"""`model`: makes the model; `peft`: whether to train an adapter; anything else goes into the config."""

CASES: dict[str, Case] = {
    "full": {},
    "tied": {"model": lambda: tiny_qwen2(hidden=16, layers=1, tie=True)},
    "dropout": {"model": lambda: tiny_model(attention_dropout=0.2)},
    "lora": {"peft": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    # 64 rows in batches of 4 are 16 a pass: the last window of each pass has one micro-batch instead of three.
    "short last window": {"gradient_accumulation_steps": 3, "max_steps": 7},
    "activation checkpointing": {"activation_checkpointing": True, "model": lambda: tiny_model(layers=2)},
    "moe": {
        "model": lambda: tiny_moe(hidden=16, layers=1, output_router_logits=True),
        "gradient_accumulation_steps": 2,
    },
    "packing bfd": {"packing": True, "max_length": 32, "packing_strategy": "bfd"},
    "packing wrapped": {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "all tokens": {"completion_only_loss": False},
    "assistant only": {
        "assistant_only_loss": True,
        "train": lambda: additions(64, "language_modeling", conversational=True),
    },
    "bf16": {"bf16": True},
    "bf16 weights": {"model": lambda: tiny_model().to(torch.bfloat16)},
    "tokens not averaged": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


class Finished(NamedTuple):
    parameters: dict[str, torch.Tensor]
    logs: list[dict[str, Any]]


def build(folder: Any, case: Case, **overrides: Any) -> Any:
    case = {"max_steps": 5, **case, **overrides}
    model, train = case.pop("model", tiny_model)(), case.pop("train", additions)()
    trainer = {"peft_config": lora()} if case.pop("peft", False) else {}
    return make_sft(folder, model=model, train=train, trainer=trainer | case.pop("trainer", {}), **case)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[[str, str], Finished]:
    """Runs of a case, each made once: "plain" and "dft" are TRL's, "nll" and "power" the same objectives as plugins."""

    @functools.cache
    def run(name: str, which: str) -> Finished:
        case = {**CASES[name], "max_steps": 20 if which in ("dft", "power") else 5, "learning_rate": 2e-3}
        options = {
            "plain": {"plain": True},
            "dft": {"plain": True, "loss_type": "dft"},
            "nll": {"plugins": [Nll()]},
            "power": {"names": ["power:alpha=1"]},
        }
        trainer = build(tmp_path_factory.mktemp(which), case, **options[which])
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 1e-3
        return Finished(parameters(trainer), logged(trainer))

    return run


@EVERY_CASE
def test_nll_as_a_plugin_is_plain_trl_bit_for_bit(finished, case):
    ours, plain = finished(case, "nll"), finished(case, "plain")
    assert_equal_bits(ours.parameters, plain.parameters)
    assert [{k: v for k, v in entry.items() if k != "nll"} for entry in ours.logs] == plain.logs
    assert {"entropy", "mean_token_accuracy", "num_tokens", "loss", "nll"} <= set(ours.logs[0])


@EVERY_CASE
def test_power_of_one_is_dft(finished, case):
    # -p and -p.detach() log p have one gradient; its last bits depend on the order of two products, and Adam passes a
    # relative error on: a parameter moves by up to 2e-3 a step whatever its gradient's size. bf16 has 3 digits.
    mine, theirs = finished(case, "power").parameters, finished(case, "dft").parameters
    assert_close(mine, theirs, rtol=0, atol=2e-2 if "bf16" in case else 2e-5)


@EVERY_CASE
def test_nll_is_logged_whatever_the_objective(finished, case):
    mine, theirs = finished(case, "power").logs[0], finished(case, "plain").logs[0]
    expected = theirs["loss"]
    if "aux_loss" in theirs:
        expected -= 0.001 * theirs["aux_loss"]  # Mixtral's `router_aux_loss_coef`
    tolerance = 1e-3 if case == "bf16" else 1e-6  # fp32 sums in another order; autocast sums in bf16
    assert mine["nll"] == pytest.approx(expected, rel=tolerance)
    assert mine["loss"] != pytest.approx(theirs["loss"], rel=1e-2)
    for metric in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert mine[metric] == theirs[metric]


def test_evaluation_logs_the_objective_and_the_nll(tmp_path):
    evaluated = {"trainer": {"eval_dataset": additions(4, seed=5)}}
    plain = build(tmp_path / "plain", evaluated, plain=True).evaluate()
    ours = build(tmp_path / "ours", evaluated, names=["power:alpha=1"]).evaluate()
    dft = build(tmp_path / "nll", evaluated, plugins=[Nll()]).evaluate()
    assert ours["eval_nll"] == pytest.approx(plain["eval_loss"], rel=1e-6)  # one batch: the token mean is the loss
    assert 0 < ours["eval_loss"] <= 1 < ours["eval_nll"]
    assert without_timing(dft, {"eval_nll"}) == without_timing(plain)


def test_evaluation_of_several_data_sets_logs_one_nll_each(tmp_path):
    parts = {"short": additions(4, seed=5), "long": additions(4, seed=6)}
    plain = build(tmp_path / "plain", {"trainer": {"eval_dataset": parts}}, plain=True).evaluate()
    ours = build(tmp_path / "ours", {"trainer": {"eval_dataset": parts}}, names=["power:alpha=1"]).evaluate()
    for name in parts:
        assert ours[f"eval_{name}_nll"] == pytest.approx(plain[f"eval_{name}_loss"], rel=1e-6)


def test_compute_metrics_sees_the_same_logits(tmp_path):
    results = []
    for plain in (True, False):

        def compute_metrics(prediction: Any) -> dict[str, float]:
            return {"sum": float(prediction.predictions.sum()), "labels": float(prediction.label_ids.sum())}

        trainer = {"eval_dataset": additions(8, seed=5), "compute_metrics": compute_metrics}
        ours = {} if plain else {"plugins": [Nll()]}
        result = build(tmp_path / str(plain), {"trainer": trainer}, plain=plain, **ours).evaluate()
        results.append(without_timing(result, {"eval_nll"}))
    assert results[0] == results[1]
    assert "eval_sum" in results[0]


def test_there_is_one_forward_a_micro_batch(tmp_path):
    trainer = build(tmp_path, {"gradient_accumulation_steps": 2, "max_steps": 3}, plugins=[Nll()])
    forwards = []
    trainer.model.model.register_forward_hook(lambda *args: forwards.append(1))
    trainer.train()
    assert len(forwards) == 6


# -- equivalent ways to the same step --------------------------------------------------------------------------------

# Plain SGD: what differs between two ways of summing stays of the size of fp32's rounding.
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 5, "names": ["power:alpha=0.2"]}
ROUNDING = {"rtol": 0, "atol": 2e-6}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_one_batch_of_eight_is_eight_of_one(tmp_path, peft):
    finals = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = build(tmp_path, {**SGD, **sizes, "peft": peft})
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 500 * ROUNDING["atol"]
        finals.append(parameters(trainer))
    assert_close(finals[1], finals[0], **ROUNDING)
    assert_close(finals[2], finals[0], **ROUNDING)


def test_padding_free_agrees_with_padding(tmp_path):
    """On CPU too: transformers 5.23 builds the block-diagonal mask from `position_ids` where the cache is off."""
    padded, free = build(tmp_path, SGD), build(tmp_path, {**SGD, "padding_free": True, "max_length": None})
    start = parameters(padded)
    for trainer in (padded, free):
        trainer.train()
    assert moved(padded, start) > 500 * ROUNDING["atol"]
    assert_close(parameters(free), parameters(padded), **ROUNDING)


def test_packing_agrees_with_padding(tmp_path):
    """All samples in every step: packing puts them together in another way, but the same ones."""
    samples = additions(9)
    packed = build(tmp_path, {**SGD, "train": lambda: samples, "packing": True, "max_length": 32})
    rows = len(packed.train_dataset)
    assert rows < 9
    packed = build(
        tmp_path,
        {**SGD, "train": lambda: samples, "packing": True, "max_length": 32, "per_device_train_batch_size": rows},
    )
    padded = build(tmp_path, {**SGD, "train": lambda: samples, "per_device_train_batch_size": 9})
    start = parameters(padded)
    for trainer in (packed, padded):
        trainer.train()
    assert moved(padded, start) > 500 * ROUNDING["atol"]
    assert_close(parameters(packed), parameters(padded), **ROUNDING)


# -- what the hook receives ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Keep(Plugin):
    fused_outputs: ClassVar[tuple[str, ...]] = (
        "log_sum_sq_probs",
        "mean_logits",
        "is_top1",
        "label_rank",
        "top3_log_probs",
    )
    records: list[TokenRecord] = field(default_factory=list)

    @hookimpl
    def per_token_loss(self, tokens):
        self.records.append(tokens)
        return -tokens.log_probs


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_record_holds_what_full_logits_give(tmp_path, padding_free):
    keep = Keep()
    trainer = build(
        tmp_path,
        {
            "max_steps": 1,
            "padding_free": padding_free,
            "max_length": None,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.0,
        },
        plugins=[keep],
    )
    trainer.train()
    assert len(keep.records) == 2
    window_tokens = sum(int(record.mask.sum()) for record in keep.records)
    for record in keep.records:
        inputs = {k: v for k, v in record.inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            logits = trainer.model(**inputs, use_cache=False).logits[:, :-1].double()
        labels = record.inputs["labels"][:, 1:]
        mask = labels != -100
        log_probs = logits.log_softmax(-1)
        picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = {
            "log_probs": (record.log_probs, picked),
            "entropy": (record.entropy, -(log_probs.exp() * log_probs).sum(-1)),
            "log_sum_sq_probs": (record.extras["log_sum_sq_probs"], (2 * log_probs).logsumexp(-1)),
            "mean_logits": (record.extras["mean_logits"], logits.mean(-1)),
            "is_top1": (record.extras["is_top1"], logits.argmax(-1) == labels),
            "label_rank": (record.extras["label_rank"], (log_probs > picked.unsqueeze(-1)).sum(-1)),
            "top3_log_probs": (record.extras["top3_log_probs"], log_probs.topk(3).values),
        }
        assert torch.equal(record.mask, mask)
        assert (record.log_probs[~mask] == 0).all()
        for name, (mine, theirs) in expected.items():
            close = torch.isclose(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)  # fp32 against fp64
            assert close[mask].all(), name
        assert record.log_probs.requires_grad
        assert record.entropy.requires_grad
        assert not any(extra.requires_grad for extra in record.extras.values())
        assert record.training
        assert record.accumulation_steps == 2
        assert float(record.denominator) == window_tokens
        assert record.progress == 0
        assert record.stream is None
        assert record.num_samples == 4
        assert sorted(record.sample_index[mask].unique().tolist()) == [0, 1, 2, 3]


def test_samples_are_told_apart_under_padding_free(tmp_path):
    keep = Keep()
    trainer = build(
        tmp_path, {"max_steps": 1, "padding_free": True, "max_length": None, "learning_rate": 0.0}, plugins=[keep]
    )
    trainer.train()
    (record,) = keep.records
    lengths = torch.diff(record.inputs["cu_seq_lens_q"]).tolist()
    expected = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[1:]
    assert torch.equal(record.sample_index[0], expected)


def test_padding_to_a_multiple_adds_no_samples(tmp_path):
    keep = Keep()
    config = {"max_steps": 1, "padding_free": True, "max_length": None, "pad_to_multiple_of": 32}
    build(tmp_path, config, plugins=[keep]).train()
    (record,) = keep.records
    assert record.inputs["input_ids"].shape[1] % 32 == 0
    assert record.num_samples == 4


def test_an_infinite_loss_at_masked_positions_does_no_harm(tmp_path):
    @dataclass(eq=False)
    class InverseSurprise(Plugin):
        @hookimpl
        def per_token_loss(self, tokens):
            return 1 / tokens.log_probs  # infinite where there is no label

    trainer = build(tmp_path, {"max_steps": 2}, plugins=[InverseSurprise()])
    trainer.train()
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_progress_runs_from_nought_to_one(tmp_path):
    keep = Keep()
    build(tmp_path, {"max_steps": 4}, plugins=[keep]).train()
    assert [record.progress for record in keep.records] == [0, 0.25, 0.5, 0.75]
