"""Schedules, mixtures, denominators, and what is refused before a model loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl_ext_objectives.mixture import Mixture
from trl_ext_objectives.power import Power
from trl_ext_objectives.rho1 import Rho1
from trl_ext_objectives.threshold import Threshold

from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import WITH_LM_HEAD
from trl_ext.plugins import activate
from trl_ext.records import TokenRecord

MakeRecord = Callable[..., TokenRecord]


def test_option_follows_the_progress_and_is_logged(record: MakeRecord) -> None:
    objective = Power("linear:0.5:2.5")
    tokens = record(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), progress=0.25)
    assert objective.per_token_loss(tokens).item() == pytest.approx(1 - 0.5)  # alpha = 1
    assert objective.metrics("train") == {"alpha": 1.0}
    assert Power(1.0).metrics("train") == {}


def test_mixture_moves_from_the_second_to_the_first(record: MakeRecord) -> None:
    mixture = Mixture("power:alpha=1", {"name": "nll"}, "linear:0:1")
    logits = torch.log(torch.tensor([[[0.2, 0.8]]]))
    for progress in (0.0, 0.5, 1.0):
        tokens = record(logits, torch.zeros(1, 1, dtype=torch.long), progress=progress)
        expected = progress * 0.8 + (1 - progress) * -math.log(0.2)
        assert mixture.per_token_loss(tokens).item() == pytest.approx(expected, rel=1e-6)
        assert mixture.metrics("train")["weight"] == progress


def test_mixture_asks_for_what_its_parts_need() -> None:
    assert Mixture("deft", "power").fused_outputs == ("log_sum_sq_probs",)
    assert Mixture("deft", "eaft:support=5").fused_outputs == ("log_sum_sq_probs", "top5_log_probs")
    assert Mixture("dft", "nll").fused_outputs == ()
    parts = Mixture("threshold:q=0.5,normalization=kept", "power:alpha=linear:1:2")
    assert parts.metrics("train") == {"first_normalized_by_kept": 1.0}


def test_mixture_keeps_the_state_of_its_parts_apart() -> None:
    mixture = Mixture("auto", "auto")
    mixture._parts["first"]._choose(0.9)
    mixture._parts["second"]._choose(0.1)
    again = Mixture("auto", "auto")
    again.load_state_dict(mixture.state_dict())
    assert again.metrics("train") == {
        "first_mean_p": 0.9,
        "first_prior_leaning": 1.0,
        "second_mean_p": 0.1,
        "second_prior_leaning": 0.0,
    }


@pytest.mark.parametrize("steps", [1, 4])
def test_kept_tokens_are_averaged_over_each_micro_batch(record: MakeRecord, steps: int) -> None:
    """sum(loss) / denominator, as the core reduces, must be the mean over kept tokens over the micro-batches."""
    p = torch.tensor([[0.9, 0.6, 0.3, 0.1, 0.8]])
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    mask = torch.tensor([[True, True, True, True, False]])
    denominator = torch.tensor(37.0)  # whatever the window holds
    tokens = record(logits, torch.zeros_like(p).long(), mask, denominator=denominator, accumulation_steps=steps)
    kept = -math.log(0.9) - math.log(0.6)
    for normalization, expected in (("valid", kept / 37), ("kept", kept / 2 / steps)):
        objective = Threshold(0.5, normalization=normalization)
        loss = objective.per_token_loss(tokens).sum() / denominator
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        metrics = objective.metrics("train")
        assert metrics == {"normalized_by_kept": float(normalization == "kept"), "kept_share": 0.5}
        assert "kept_share" not in objective.metrics("train")  # since the last log


def test_nothing_kept_is_a_finite_zero(record: MakeRecord) -> None:
    tokens = record(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.long))
    assert Threshold(0.9, normalization="kept").per_token_loss(tokens).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("labels", "share", "kept"), [(5, 0.6, 3), (4, 0.6, 3), (10, 0.1, 1), (3, 1.0, 3), (1, 0.2, 1)]
)
def test_rho1_keeps_its_share_of_the_label_tokens(record: MakeRecord, labels: int, share: float, kept: int) -> None:
    width = labels + 2
    mask = torch.arange(width)[None] < labels
    logits = torch.randn(1, width, 7, generator=torch.Generator().manual_seed(0))
    # Masked positions would come first, were they not left out.
    reference = torch.linspace(-1, 0, width)[None].masked_fill(~mask, 50.0)
    tokens = record(logits, torch.zeros(1, width, dtype=torch.long), mask, reference_log_probs=reference)
    objective = Rho1("start", share, normalization="valid")
    loss = objective.per_token_loss(tokens)
    assert (loss != 0).sum().item() == kept
    excess = reference - tokens.log_probs
    assert excess[loss != 0].min() >= excess[mask & (loss == 0)].max() if kept < labels else True


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("power:alpha=0", "alpha=.?0.* is not > 0"),
        ("power:alpha=-1", "alpha=.?-1.* is not > 0"),
        ("power:alpha=nan", "is not > 0"),
        ("power:alpha=inf", "is not > 0"),
        ("power:alpha=linear:0:1", "alpha='linear:0:1': 0 is not > 0"),
        ("power:alpha=linear:1", r"is not a number, constant:VALUE, linear:START:END\[:UNTIL\]"),
        ("power:alpha=step:1:2", "is not a number, constant:VALUE"),
        ("threshold:q=1.5", r"q=.?1.5.? is not in \[0, 1\]"),
        ("threshold:q=-0.1", r"q=.?-0.1.? is not in \[0, 1\]"),
        ("threshold:q=linear:0:2", r"q='linear:0:2': 2 is not in \[0, 1\]"),
        ("threshold:side=left", "expected one of 'above', 'below'"),
        ("threshold:loss=mse", "expected one of 'nll', '1-p'"),
        ("threshold:normalization=all", "expected one of 'valid', 'kept'"),
        ("threshold:quantile_of=nowhere.json,q=2", r"is not in \[0, 1\]"),
        ("focal:gamma=-1", "gamma=.?-1.* is not >= 0"),
        ("huber:delta=0", r"delta=.?0.* is not in \(0, 1\]"),
        ("huber:delta=2", r"delta=.?2.* is not in \(0, 1\]"),
        ("eaft:support=1", r"support=.?1.* is not in \[2, 9999\]"),
        ("eaft:exponent=0", "exponent=.?0.* is not > 0"),
        ("eaft:gate=some", "expected one of 'top', 'whole'"),
        ("entropy:beta=-1", "beta=.?-1.* is not >= 0"),
        ("idft:low=0", "low=.?0.* is not > 0"),
        ("idft:low=3", "low=3.0 is above high=2.0"),
        ("gem:beta=0", r"beta=.?0.* is not in \(0, 1\]"),
        ("gem:h=square", "expected one of 'logsigmoid', 'linear'"),
        ("psft:low=2", r"low=.?2.* is not in \[0, 1\]"),
        ("psft:high=-1", "high=.?-1.* is not >= 0"),
        ("psft:refresh_every=0", "refresh_every=.?0.* is not >= 1"),
        ("iw-sft:temperature=0", "temperature=.?0.* is not > 0"),
        ("iw-sft:maximum=0", "maximum=.?0.* is not > 0"),
        ("iw-sft:reference=somewhere", "'somewhere' is not one of start, base, model:PATH or cache:PATH"),
        ("rho1", "needs a value for option 'reference'"),
        ("rho1:reference=start,share=0", r"share=.?0.* is not in \(0, 1\]"),
        ("asft:reference=cache:x", "the divergence is over the whole vocabulary"),
        ("asft:beta=-1", "beta=.?-1.* is not >= 0"),
        ("mixture:weight=1.1", r"weight=.?1.1.? is not in \[0, 1\]"),
        ("mixture:first=ema", "is not one objective of trl-ext-objectives"),
        ("mixture:first=gem", "cannot be mixed: it changes the temperature of the model's head"),
        ("mixture:second=power:alpha=0", "alpha=.?0.* is not > 0"),
        ("weighted:objective=gem", "cannot be mixed: it changes the temperature"),
        ("weighted:per=turn", "expected one of 'sample', 'message', 'token'"),
        ("wit:prompt=0,response=0", "would train on nothing"),
        ("wit:prompt=-1", "prompt=.?-1.* is not >= 0"),
    ],
)
def test_bad_options_are_refused_with_the_option_and_its_range(spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        activate([spec], trainer="sft")
    assert spec.split(":")[0] in str(caught.value)


@pytest.mark.parametrize("value", [None, True, "", [1.0], 0, "linear:0:1"])
def test_instances_refuse_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="alpha="):
        Power(value)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({}, "chooses nothing"),
        ({"math": "ema"}, "math='ema' is not one objective"),
        ({"chat": "gem"}, "cannot be mixed"),
    ],
)
def test_by_column_refuses_what_it_cannot_choose_from(objectives: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        activate([{"name": "by-column", "column": "domain", "objectives": objectives}], trainer="sft")


def test_mixture_works_where_both_of_its_parts_do() -> None:
    """`auto` measures in SFT only; in GRPO it would stay NLL without a word."""
    with pytest.raises(ConfigurationError, match="grpo"):
        activate(["mixture:first=auto,second=nll"], trainer="grpo")
    assert Mixture("power", {"name": "eaft", "gate": "whole"}).trainers == WITH_LM_HEAD
