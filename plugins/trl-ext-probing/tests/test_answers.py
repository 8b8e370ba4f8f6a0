"""Answers in GSM8K's form: 42 written-out completions, and how numbers are found in text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from trl_ext_probing.answers import answer_format, exact_answer, exact_text, final_number, latex_answer
from trl_ext_probing.rewards import Judge

ANSWERS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]
REWARD = "trl_ext_probing.answers:exact_answer"


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row["because"])
def test_completions_are_judged_as_written(row: dict[str, Any]) -> None:
    messages = [{"role": "assistant", "content": row["completion"]}]
    assert exact_answer([row["completion"], messages], answer=[row["answer"]] * 2) == [row["reward"]] * 2


@pytest.mark.parametrize("prompt", ["Q", [{"role": "user", "content": "Q"}]], ids=["text", "messages"])
def test_every_probe_s_judge_agrees_with_the_file(prompt: Any) -> None:
    rows = [{"prompt": prompt, "answer": row["answer"]} for row in ANSWERS]
    with Judge.of([REWARD], rows[0]) as judge:
        given = judge(rows, [row["completion"] for row in ANSWERS], [()] * len(rows))
    assert given == [row["reward"] for row in ANSWERS]


def test_exact_text_compares_the_whole_text() -> None:
    assert exact_text([" 7 ", [{"role": "assistant", "content": "8"}], "7"], ["7", "7", None]) == [1, 0, None]


def test_latex_answers_are_compared_as_formulas() -> None:
    pytest.importorskip("math_verify")
    given = latex_answer([r"so $\frac{1}{2}$", "$0.4$", "$1$", "$1$"], [r"$0.5$", "$0.5$", None, ""])
    assert given == [1.0, 0.0, None, None]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -3.50", "-3.5"),
        ("#### $18", "18"),
        ("#### 3 apples of 5", "3"),
        ("#### 3\n\nQuestion: How many?\nAnswer: #### 9", "3"),
        ("#### none\n\nQuestion: 5 apples?", None),
        ("#### 7 ####", "7"),
        ("####\n7", "7"),
        ("####", None),
        ("#### \u22127", "-7"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("10-12", "12"),
        ("$10-$12", "12"),
        ("on 2024-01-05", "5"),
        ("10 - 12 = -2", "-2"),
        ("x=-5", "-5"),
        ("a loss of -.5", "-0.5"),
        ("it is 10, then 12.", "12"),
        ("#### none", None),
        ("no number", None),
        (".5", "0.5"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_rewards_of_text_and_messages() -> None:
    completions = ["so #### 72.0", [{"role": "assistant", "content": "#### 71"}], "nothing"]
    assert exact_answer(completions, answer=["#### 72"] * 3, prompts=[""] * 3) == [1.0, 0.0, 0.0]
    assert answer_format(completions) == [1.0, 1.0, 0.0]
    assert answer_format([[], [{"role": "assistant", "content": None}]]) == [0.0, 0.0]


def test_answers_may_be_numbers_and_may_be_missing() -> None:
    completions = ["#### 72", "#### 0.5", "#### 3", [], "#### 1"]
    answers = [72, 0.5, None, "#### 1", float("nan")]
    assert exact_answer(completions, answer=answers) == [1.0, 1.0, None, 0.0, 0.0]
