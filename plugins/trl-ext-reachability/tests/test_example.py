"""The closed forms in `examples/base_model_barrier.py`: against autograd, and against the samples' frequencies."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "examples" / "base_model_barrier.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def problem(example: Any) -> Any:
    setting = replace(example.SIZES["small"], length=3, tokens=4, centres=5, base_steps=3, base_batch=16)
    return example.Problem(setting, 0)


def brute_log_probs(problem: Any, weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One token after the other, as the definition has it."""
    found = []
    for context, tokens in zip(x, y, strict=True):
        before, row = problem.setting.tokens, []
        for i, token in enumerate(tokens):
            row.append((weights[i] @ (context * problem.signs[before])).log_softmax(-1)[token])
            before = int(token)
        found.append(torch.stack(row))
    return torch.stack(found)


def test_gradients_and_norms_are_those_of_autograd(example: Any, problem: Any) -> None:
    weights = example.train_base(problem).requires_grad_()
    x, _ = problem.draw(6)
    y = problem.sample(weights.detach(), x)
    coefficients = torch.randn(6, 3)
    expected = brute_log_probs(problem, weights, x, y)
    (gradient,) = torch.autograd.grad((expected * coefficients).sum() / 6, weights, retain_graph=True)
    with torch.no_grad():
        features = problem.features(x, y)
        log_probs, residual = example.log_probs_and_residual(weights, features, y)
        torch.testing.assert_close(log_probs, expected.detach())
        torch.testing.assert_close(example.ascent(weights, features, residual, coefficients), gradient)
        norms = example.squared_norms(features, residual)
    for row, norm in zip(expected.sum(1), norms, strict=True):
        (one,) = torch.autograd.grad(row, weights, retain_graph=True)
        torch.testing.assert_close(norm, (one**2).sum())


def test_sequences_come_with_their_probability(example: Any, problem: Any) -> None:
    """64 sequences, 20000 samples: a share of 0.3 has a standard error of 0.003."""
    weights = example.train_base(problem)
    x = problem.centres[:1]
    drawn = problem.sample(weights, x.expand(20_000, -1))
    codes = (drawn * torch.tensor([16, 4, 1])).sum(1)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    expected = brute_log_probs(problem, weights, x.expand(64, -1), every).sum(1).exp()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    shares = torch.bincount(codes, minlength=64) / 20_000
    assert float((shares - expected).abs().max()) < 0.015


def test_rewards_of_the_arms(example: Any) -> None:
    right = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert example.rewards(right, "outcome").tolist() == [[-1, -1, -1], [1, 1, 1]]
    assert example.rewards(right, "outcome, 0/1").tolist() == [[0, 0, 0], [1, 1, 1]]
    assert example.rewards(right, "outcome, adaptive rate").tolist() == [[-1, -1, -1], [1, 1, 1]]
    assert example.rewards(right, "process").tolist() == [[1, 1, -1], [1, 1, 1]]
    assert example.rewards(right, "process, 0/1").tolist() == [[1, 1, 0], [1, 1, 1]]


def test_script_runs_with_few_steps(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "2", "--seeds", "1", "--output", str(tmp_path)])
    monkeypatch.setitem(example.SIZES, "small", replace(example.SIZES["small"], base_steps=2, batch=16))
    example.main()
    assert (tmp_path / "base_model_barrier.png").exists()
    assert "outcome, adaptive rate: error" in (tmp_path / "report.txt").read_text()
