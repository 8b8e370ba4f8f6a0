"""Scores of predictions: by hand, against loops, and on outcomes that are calibrated by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruption import killed_after
from scipy.stats import binom  # type: ignore[import-untyped]
from trl_ext_probing.commands import reachability
from trl_ext_probing.reachability.calibration import (
    brier_score,
    calibration_bins,
    expected_calibration_error,
    score_calibration,
)
from trl_ext_probing.reachability.checking import ALIKE, check_against
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer


def test_scores_by_hand() -> None:
    predicted, observed = [0.1, 0.15, 0.3, 1.0], [0, 1, 0, 1]
    assert brier_score(predicted, observed) == pytest.approx((0.01 + 0.7225 + 0.09 + 0) / 4)
    # Bins 0.1-0.2 with two prompts (0.125 against 0.5), 0.3-0.4 (0.3 against 0), 0.9-1 (1 against 1).
    assert expected_calibration_error(predicted, observed) == pytest.approx((2 * 0.375 + 0.3) / 4)
    assert expected_calibration_error(predicted, observed, bins=1) == pytest.approx(0.5 - 1.55 / 4)
    score = score_calibration(predicted, observed)
    assert score["brier_constant"] == 0.25
    assert score["skill"] == pytest.approx(1 - 0.205625 / 0.25)
    assert (score["predicted_share"], score["observed_share"]) == (pytest.approx(0.3875), 0.5)


def test_bins_hold_every_prompt_once() -> None:
    rng = np.random.default_rng(0)
    predicted = np.concatenate([rng.random(200), [0.0, 0.1, 0.3, 0.7, 1.0]])
    observed = (rng.random(205) < predicted).astype(int)
    bins = calibration_bins(predicted, observed)
    assert sum(b["prompts"] for b in bins) == 205
    for b in bins:
        mine = [i for i, p in enumerate(predicted) if b["from"] <= p + 1e-12 < b["to"] or p == b["to"] == 1]
        assert len(mine) == b["prompts"]
        assert np.mean([predicted[i] for i in mine]) == pytest.approx(b["predicted"])
        hits = sum(observed[i] for i in mine)
        assert hits / len(mine) == pytest.approx(b["observed"])
        if hits:  # P(K >= hits) at the lower bound
            assert float(binom.sf(hits - 1, len(mine), b["low"])) == pytest.approx(0.025, rel=1e-6)
    assert [b["from"] for b in calibration_bins([0.05, 0.95], [0, 1])] == [0.0, 0.9]


def test_calibrated_outcomes_lie_in_the_intervals() -> None:
    """400 sets of outcomes with the predicted probabilities: a share of 0.95 has a standard error of 0.011."""
    rng = np.random.default_rng(0)
    predicted = rng.beta(0.5, 1.0, 150)
    inside = np.zeros(3)
    for _ in range(400):
        score = score_calibration(predicted, rng.random(150) < predicted)
        inside += [
            score["brier_if_calibrated"][0] <= score["brier"] <= score["brier_if_calibrated"][1],
            score["observed_share_if_calibrated"][0]
            <= score["observed_share"]
            <= score["observed_share_if_calibrated"][1],
            score["ece"] <= score["ece_if_calibrated"],
        ]
    assert (np.abs(inside / 400 - 0.95) < 0.035).all()


def test_overconfident_predictions_lie_outside() -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(2.0, 2.0, 500)
    observed = rng.random(500) < rates
    sharpened = rates**3 / (rates**3 + (1 - rates) ** 3)
    good, bad = score_calibration(rates, observed), score_calibration(sharpened, observed)
    assert bad["brier"] > bad["brier_if_calibrated"][1]
    assert bad["ece"] > bad["ece_if_calibrated"]
    assert good["skill"] > max(bad["skill"], 0)
    assert score_calibration(np.full(500, observed.mean()), observed)["skill"] == pytest.approx(0)


def test_a_sure_and_right_prediction_has_no_skill_to_show() -> None:
    score = score_calibration([0.0, 0.0], [0, 0])
    assert (score["brier"], score["ece"], score["skill"]) == (0, 0, None)
    assert score["brier_if_calibrated"] == score["observed_share_if_calibrated"] == [0, 0]


@pytest.mark.parametrize(
    ("predicted", "observed", "message"),
    [
        ([], [], "not empty"),
        ([0.5], [0, 1], "same length"),
        ([1.5], [1], r"outside of \[0, 1\]"),
        ([float("nan")], [1], r"outside of \[0, 1\]"),
        ([0.5], [2], "other than 0 and 1"),
    ],
)
def test_what_is_no_probability_is_refused(predicted: list[float], observed: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_calibration(predicted, observed)


def write_measurement(
    folder: Path, counts: list[tuple[str, tuple[int, int], tuple[int, int]]], **settings: Any
) -> Path:
    """A finished measurement of rows with a key, counts of all rounds, and counts of the first one."""
    folder.mkdir()
    common = {"seed": 0, "n": 4, "solved_at": 1.0, "reward": ["r:f"], **settings}
    models = [{"model": "m", "prior": [0.5, 2.0]}]
    content = {
        "schema": 1,
        "probe": "reachability",
        "settings": {**dict.fromkeys(ALIKE, 1), **common},
        "models": models,
    }
    (folder / "results.json").write_text(json.dumps(content))
    names = ("successes", "rollouts", "first_successes", "first_rollouts")
    more = ("low", "high", "worst_token", "route", "demonstration_correct")
    lines = [",".join(["key", *names, *more])]
    lines += [",".join([key, *map(str, (*every, *first)), *[""] * len(more)]) for key, every, first in counts]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder


def reached(successes: int, rollouts: int, draws: int) -> float:
    """1 - E[(1-p)^draws] under Beta(0.5 + successes, 2 + failures), factor by factor."""
    failed, a, b = 1.0, 0.5 + successes, 2.0 + rollouts - successes
    for i in range(draws):
        failed *= (b + i) / (a + b + i)
    return 1 - failed


def test_prediction_meets_the_first_round_of_another_measurement(tmp_path: Path) -> None:
    """Rows a, b, b again and the unseen c: 4 first draws each, those of b counted together; later ones are not used."""
    mine = [("a", (3, 20), (0, 4)), ("b", (0, 8), (0, 4)), ("x", (1, 2), (1, 2))]
    other = [("a", (8, 12), (0, 4)), ("b", (0, 4), (0, 4)), ("b", (4, 12), (1, 4)), ("c", (9, 9), (0, 4))]
    mine_at = write_measurement(tmp_path / "mine", mine)
    result = check_against(mine_at, write_measurement(tmp_path / "other", other, seed=1))
    expected = [reached(3, 20, 4), reached(0, 8, 8), reached(0, 0, 4)]
    assert result["predicted_share"] == pytest.approx(np.mean(expected))
    assert result["observed_share"] == pytest.approx(1 / 3)
    assert result["brier"] == pytest.approx((expected[0] ** 2 + (1 - expected[1]) ** 2 + expected[2] ** 2) / 3)
    assert (result["draws"], result["unseen"], result["models"]) == (4, 1, ["m", "m"])
    assert json.loads((mine_at / "calibration.json").read_text()) == result
    assert (mine_at / "calibration.png").stat().st_size > 10_000
    text = (mine_at / "calibration.md").read_text()
    assert f"| Brier score | {result['brier']:.4f} |" in text
    assert "of which 1 were not measured before" in text


def test_measurements_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    counts = [("a", (1, 4), (1, 4))]
    mine = write_measurement(tmp_path / "mine", counts)
    with pytest.raises(ConfigurationError, match="has the same seed"):
        check_against(mine, write_measurement(tmp_path / "same", counts))
    with pytest.raises(ConfigurationError, match="with another temperature; a comparison"):
        check_against(mine, write_measurement(tmp_path / "warm", counts, seed=1, temperature=0.5))
    with pytest.raises(ConfigurationError, match="holds no finished measurement"):
        check_against(mine, tmp_path / "absent")


def test_command_compares_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Success rates 0, 0.39 and 1 under a uniform model, 8 draws: every prompt is predicted well, no constant is."""
    model = tiny_llama(hidden=16, layers=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    path = save_model(model, tiny_tokenizer(), tmp_path / "model")
    rows = [{"prompt": f"{i:02d}", "completion": "!", "answer": str((0, 100, 259)[i % 3])} for i in range(30)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "reward": ["test_reachability_probe:first_token_reward"],
        "max_rollouts": 8,
        "device": "cpu",
        "max_completion_length": 1,
    }
    reachability(model=[path], dataset=str(data), output=tmp_path / "other", seed=1, **common)
    capsys.readouterr()
    reachability(
        model=[path], dataset=str(data), output=tmp_path / "mine", seed=2, check_against=tmp_path / "other", **common
    )
    shown = capsys.readouterr().out
    assert "# Reach on" in shown
    assert "# Predicted against observed" in shown
    with pytest.raises(ConfigurationError, match="has the same seed"):
        reachability(
            model=[path], dataset=str(data), output=tmp_path / "new", seed=1, check_against=tmp_path / "other", **common
        )
    assert not (tmp_path / "new").exists()  # refused before anything is drawn
    result = json.loads((tmp_path / "mine" / "calibration.json").read_text())
    # 1 - 0.61^8 = 0.98 of the 10 in the middle, and all of the last 10.
    assert result["observed_share"] == pytest.approx(2 / 3, abs=0.07)
    assert result["skill"] > 0.8
    assert result["draws"] == 8
    mine = tmp_path / "mine"
    (journal,) = mine.glob("journal*")
    assert {path.name for path in mine.iterdir()} == {journal.name, *ReachabilitySettings.files}
    with killed_after(0):
        reachability(model=[path], dataset=str(data), output=mine, seed=3, overwrite=True, **common)
    assert not list(mine.iterdir()), "nothing of the other settings is left"
