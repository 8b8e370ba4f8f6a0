"""S and its interval, what may be concluded from it, n-gram contamination and floors: pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from trl_ext_probing.answers import exact_text
from trl_ext_probing.from_scratch.conclusions import conclude
from trl_ext_probing.from_scratch.contamination import contaminated, words
from trl_ext_probing.from_scratch.floors import DRAWS, floor_of
from trl_ext_probing.from_scratch.row_texts import completion_text, evaluation_row, prompt_text, whole_text
from trl_ext_probing.intervals import Estimate, seed_difference, share
from trl_ext_probing.rewards import Judge

# -- S ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_bounds_of_s_are_where_a_paired_test_begins_to_reject(confidence: float) -> None:
    control, pretrained, floor = np.array([0.5, 0.62, 0.48, 0.55]), np.array([0.8, 0.9, 0.82, 0.78]), 0.1
    found = share(control.tolist(), pretrained.tolist(), floor, confidence)
    assert found.value == pytest.approx((control.mean() - floor) / (pretrained.mean() - floor))
    for bound in (found.low, found.high):
        assert bound is not None
        test = ttest_1samp((control - floor) - bound * (pretrained - floor), 0)
        assert test.pvalue == pytest.approx(1 - confidence, rel=1e-6)
    assert found.low < found.value < found.high  # type: ignore[operator]


def test_bounds_of_s_cover_at_the_nominal_rate() -> None:
    """Three seeds whose scores share half of their variance, as arms on the same data do; 4000 draws, 3 sigma = 1 %."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(4000, 3, 1))
    scores = 0.02 * (common + rng.normal(size=(4000, 3, 2))) / np.sqrt(2) + np.array([0.4, 0.8])
    found = [share(row[:, 0].tolist(), row[:, 1].tolist(), 0.2) for row in scores]
    truth = (0.4 - 0.2) / (0.8 - 0.2)
    covered = [i.low <= truth <= i.high for i in found if i.low is not None and i.high is not None]
    assert len(covered) == 4000
    assert np.mean(covered) == pytest.approx(0.95, abs=0.0104)


def test_s_of_equal_arms_is_one_and_of_the_floor_is_zero() -> None:
    scores = [0.7, 0.8, 0.75]
    assert share(scores, scores, 0.1).bounds == pytest.approx((1, 1, 1))
    assert share([0.1] * 3, scores, 0.1).bounds == pytest.approx((0, 0, 0))
    assert share([0.5] * 3, [0.9] * 3, 0.1).bounds == pytest.approx((0.5, 0.5, 0.5))  # no spread at all


@pytest.mark.parametrize("pretrained", [[0.1, 0.1, 0.1], [0.1, 0.2, 0.15], [0.0, 0.02, 0.01]])
def test_s_is_undefined_where_the_pretrained_model_is_at_the_floor(pretrained: list[float]) -> None:
    found = share([0.5, 0.6, 0.55], pretrained, 0.1)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "not above the floor" in found.reason


def test_nll_gap_is_the_paired_t_interval() -> None:
    control, pretrained = [1.3, 1.1, 1.25], [0.9, 0.8, 0.7]
    found = seed_difference(control, pretrained, 0.9)
    expected = ttest_1samp(np.subtract(control, pretrained), 0)
    assert found.bounds == pytest.approx((0.41666667, *expected.confidence_interval(0.9)))
    with pytest.raises(ValueError, match="needs two or more of both arms, not 2 and 3"):
        seed_difference([1.0, 2.0], [1.0, 2.0, 3.0])


# -- conclusions -----------------------------------------------------------------------------------------------------

HIGH, LOW, OPEN = Estimate(0.9, 0.8, 1.0, 3), Estimate(0.1, 0.0, 0.2, 3), Estimate(0.6, 0.4, 0.8, 3)
UNDEFINED = Estimate(None, None, None, 3, "no score")


@pytest.mark.parametrize(
    ("inside", "outside", "finding"),
    [
        (HIGH, LOW, "this points to distribution fitting"),
        (HIGH, HIGH, "does not need the pre-trained weights"),
        (LOW, LOW, "rests on the pre-trained weights"),
        (LOW, HIGH, "look at the two sets"),
        (HIGH, OPEN, "The seeds do not decide whether the training fits the distribution"),
        (OPEN, LOW, "The seeds do not decide whether the training fits the distribution"),
        (HIGH, UNDEFINED, None),
    ],
)
def test_a_joint_finding_needs_both_intervals(inside: Estimate, outside: Estimate, finding: str | None) -> None:
    lines = conclude({"in": inside, "out": outside})
    findings = ("points to", "does not need", "rests on", "look at", "fits the distribution")
    named = [line for line in lines if any(text in line for text in findings)]
    assert len(named) == (finding is not None)
    assert finding is None or finding in named[0]


def test_each_set_gets_its_sentence() -> None:
    assert conclude({"in": OPEN}) == [
        "S in distribution is 0.600 [0.400, 0.800]: the seeds do not decide whether it is above or below 0.5."
    ]
    assert conclude({"out": LOW}) == ["S out of distribution is 0.100 [0.000, 0.200], below 0.5."]
    assert conclude({"out": UNDEFINED}) == ["S out of distribution is undefined: no score."]


# -- contamination ---------------------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from("ab+"), max_size=8).map(" ".join)
samples = st.fixed_dictionaries({"prompt": texts, "completion": texts})


def shares_words(row: dict[str, str], training: dict[str, str], n: int) -> bool:
    """By trying every place of every run of words."""
    text = (training["prompt"] + training["completion"]).replace(" ", "")
    prompt, answer = row["prompt"].replace(" ", ""), row["completion"].replace(" ", "")
    if 0 < len(prompt) < n and prompt in text:
        return True
    return any(part[i : i + n] in text for part in (prompt, answer) for i in range(len(part) - n + 1))


@given(rows=st.lists(samples, max_size=6), training=st.lists(samples, max_size=6), n=st.integers(1, 5))
def test_contamination_equals_that_of_a_search_at_every_place(rows: Any, training: Any, n: int) -> None:
    for row in training:  # one word for each letter, as the oracle has it
        row["prompt"] += " "
    expected = {}
    for i, row in enumerate(rows):
        where = [j for j, other in enumerate(training) if shares_words(row, other, n)]
        if where:
            expected[i] = where[0]
    assert contaminated(rows, training, n) == expected


def test_contaminated_samples_are_found_and_clean_ones_are_not() -> None:
    story = "Weng earns 12 dollars an hour for babysitting; yesterday she did 50 minutes of it. How much did she earn?"
    training = [
        {"prompt": "12+34=", "completion": "46"},
        {"text": f"A problem: {story.upper()} She earned 10."},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7*8?"}]},
    ]
    rows = [
        {"prompt": story},
        {"prompt": story.replace("50 minutes", "70 minutes").replace("12 dollars", "9 dollars")},
        {"prompt": "12 + 34 ="},
        {"prompt": "112+34="},
        {"prompt": "12+35=", "completion": "46"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7*8?"}]},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7*9?"}]},
    ]
    assert contaminated(rows, training) == {0: 1, 2: 0, 5: 2}
    assert words("It's 3.5, OK?") == ["it", "'", "s", "3", ".", "5", ",", "ok", "?"]


def test_texts_of_every_format() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    assert evaluation_row({"messages": turns, "id": 3}) == {"id": 3, "prompt": turns[:2], "completion": turns[2:]}
    assert (prompt_text({"messages": turns}), completion_text({"messages": turns})) == ("u", "a")
    assert whole_text({"messages": turns}) == "s\nu\na"
    assert whole_text({"prompt": "12+", "completion": "3"}) == "12+3"
    assert whole_text({"prompt": turns[1:2], "completion": turns[2:]}) == "u\na"
    assert completion_text({"text": "t"}) is None


# -- floors ----------------------------------------------------------------------------------------------------------

TRAINING = [{"prompt": str(i), "completion": c} for i, c in enumerate(["4", "7", "7", "8"])]
EXACT = Judge({"exact": exact_text}, ["prompt", "answer"])
ROWS = [{"prompt": "a", "answer": "7"}, {"prompt": "b", "answer": "4"}, {"prompt": "c", "answer": "1"}]


def test_floors_of_majority_format_and_number() -> None:
    majority = floor_of("majority", ROWS, TRAINING, EXACT)
    assert majority.scores == [1, 0, 0]
    assert majority.about == "the most frequent training answer, '7' (2 of 4)"
    with_answers = [{**row, "answer": "1"} for row in TRAINING]
    assert floor_of("majority", ROWS, with_answers, EXACT).scores == [0, 0, 1]
    many = [row for row in ROWS for _ in range(200)]
    shuffled = floor_of("format", many, TRAINING, EXACT)
    by_row = np.reshape(shuffled.scores, (3, 200)).mean(1)  # a share of 1/2 in 200 * 16 draws: 0.009
    assert by_row == pytest.approx([0.5, 0.25, 0.0], abs=0.03)
    assert all(score * DRAWS == round(score * DRAWS) for score in shuffled.scores)
    assert floor_of("format", many, TRAINING, EXACT) == shuffled
    assert floor_of(0.25, ROWS, [], EXACT).scores == [0.25] * 3
    with pytest.raises(ValueError, match="no completions apart from their prompts; give the floor as a number"):
        floor_of("majority", ROWS, [{"text": "x"}], EXACT)


def test_completions_without_a_verdict_are_left_out_of_scores() -> None:
    """The function is silent about "8": the floor is the share of "7" among the other training answers, 2 in 3."""

    def silent(completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
        return [None if c == "8" else float(c == a) for c, a in zip(completions, answer, strict=True)]

    rows, judge = [{"prompt": "a", "answer": "7"}] * 200, Judge({"silent": silent}, ["prompt", "answer"])
    scores = floor_of("format", rows, TRAINING, judge).scores
    assert np.mean(scores) == pytest.approx(2 / 3, abs=0.04)  # 4 standard errors of 200 * 12 draws
    with pytest.raises(ValueError, match=r"silent gave None for every completion of 200 prompts .*rows 0, 1, 2, 3, 4,"):
        floor_of("majority", rows, TRAINING[3:], judge)
