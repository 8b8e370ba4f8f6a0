"""The objectives that read columns, against sums written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_ext_objectives.by_column import ByColumn
from trl_ext_objectives.talr import TALR
from trl_ext_objectives.weighted import Weighted
from trl_ext_objectives.wit import WIT

from trl_ext.errors import ConfigurationError
from trl_ext.plugins import activate
from trl_ext.records import Column, TokenRecord

MakeRecord = Callable[..., TokenRecord]

P = torch.tensor([[0.9, 0.5, 0.2, 0.7], [0.1, 0.6, 0.3, 0.8]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
LABELS = int(MASK.sum())


def tokens_of(record: MakeRecord, columns: dict[str, Tensor]) -> TokenRecord:
    """Two samples of two rows; column totals as the core gives them, over this batch as the whole window."""
    logits = torch.stack([P.log(), (1 - P).log()], -1)
    tokens = record(logits, torch.zeros_like(P).long(), MASK, columns=columns)
    totals = {name: (tokens.per_token(name).abs() * MASK).sum().float() for name in columns}
    return replace(tokens, column_totals=totals)


def mean(loss: Tensor, tokens: TokenRecord) -> float:
    """What the core makes of a loss: masked, summed, and divided by the label tokens."""
    return float(torch.where(tokens.mask, loss, 0.0).sum() / tokens.denominator)


@pytest.mark.parametrize(("denominator", "divisor"), [("tokens", LABELS), ("weights", 3 * 2.0 + 4 * 0.5)])
def test_weights_of_samples_negative_ones_too(record: MakeRecord, denominator: Any, divisor: float) -> None:
    tokens = tokens_of(record, {"weight": torch.tensor([2.0, -0.5])})
    loss = Weighted(denominator=denominator).per_token_loss(tokens)
    by_hand = -2 * sum(map(math.log, (0.9, 0.5, 0.2))) + 0.5 * sum(map(math.log, (0.1, 0.6, 0.3, 0.8)))
    assert mean(loss, tokens) == pytest.approx(by_hand / divisor, rel=1e-6)


def test_weights_of_tokens_times_another_objective(record: MakeRecord) -> None:
    weights = torch.tensor([[0.0, 1.0, 2.0, 9.0], [3.0, 0.0, 0.0, 0.5]])
    tokens = tokens_of(record, {"quality": weights})
    objective = Weighted("quality", per="token", objective="power:alpha=1")
    by_hand = 0.5 + 2 * 0.8 + 3 * 0.9 + 0.5 * 0.2
    assert mean(objective.per_token_loss(tokens), tokens) == pytest.approx(by_hand / LABELS)
    assert objective.columns == (Column("quality", "token"),)


def test_no_weight_at_all_is_a_finite_zero(record: MakeRecord) -> None:
    tokens = tokens_of(record, {"weight": torch.zeros(2)})
    assert mean(Weighted(denominator="weights").per_token_loss(tokens), tokens) == 0.0


@pytest.mark.parametrize(
    ("prompt", "response", "divisor"), [(0.4, 0.6, LABELS), (0.0, 0.6, 4), (0.4, 0.0, LABELS - 4), (1.0, 1.0, LABELS)]
)
def test_wit_divides_by_the_tokens_whose_weight_is_not_zero(
    record: MakeRecord, prompt: float, response: float, divisor: int
) -> None:
    completion = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    tokens = tokens_of(record, {"completion_mask": completion})
    of_prompt, of_response = sum(map(math.log, (0.9, 0.5, 0.1))), sum(map(math.log, (0.2, 0.6, 0.3, 0.8)))
    loss = WIT(prompt, response).per_token_loss(tokens)
    by_hand = -(prompt * of_prompt + response * of_response) / divisor
    assert mean(loss, tokens) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("setting", ["completion_only_loss", "assistant_only_loss"])
def test_wit_refuses_a_prompt_without_labels(setting: str) -> None:
    args = SimpleNamespace(**{"completion_only_loss": False, "assistant_only_loss": False, setting: True})
    run: Any = SimpleNamespace(args=args)
    with pytest.raises(ValueError, match=rf"prompt=0.4 weighs tokens that have no label; set {setting}: false"):
        WIT().check(run)
    WIT(prompt=0).check(run)


def test_each_value_has_its_objective_which_sees_no_other_tokens(record: MakeRecord) -> None:
    """`talr` takes the median of its tokens: of one sample alone it is that of the record of that sample alone."""
    tokens = tokens_of(record, {"domain": torch.tensor([1, 0])})
    loss = ByColumn("domain", {"chat": "talr", "math": "power:alpha=1"}).per_token_loss(tokens)
    torch.testing.assert_close(loss[0], torch.where(MASK[0], 1 - P[0], 0.0))
    logits = torch.stack([P.log(), (1 - P).log()], -1)
    alone = record(logits[1:], torch.zeros(1, 4, dtype=torch.long), MASK[1:])
    torch.testing.assert_close(loss[1:], TALR().per_token_loss(alone))


def test_by_column_asks_for_the_column_and_for_what_its_parts_need() -> None:
    objective = ByColumn("domain", {"chat": "deft", "math": "weighted"}, per="message")
    assert objective.fused_outputs == ("log_sum_sq_probs",)
    texts = Column("domain", "message", dtype="text", values=("chat", "math"))
    assert objective.columns == (Column("weight"), texts)
    assert objective.metrics("train") == {}


def test_a_text_names_the_objectives_as_a_config_does() -> None:
    with pytest.raises(ConfigurationError, match="needs a value for option 'objectives'"):
        activate(["by-column:column=domain"], trainer="sft")
