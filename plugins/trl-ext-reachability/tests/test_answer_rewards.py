"""Answers in GSM8K's form: 42 written-out completions, judged alike by every reward that reads them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from trl_ext_reachability.answer_rewards import exact

ANSWERS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]
READERS = ["trl_ext_reachability.answer_rewards:final_number", "trl_ext_mixing.answers:exact_answer"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row["because"])
def test_completions_are_judged_as_written(row: dict[str, Any], reader: str) -> None:
    module, name = reader.split(":")
    if module.startswith("trl_ext_mixing"):
        pytest.importorskip("trl_ext_mixing")  # another distribution
    judge = getattr(importlib.import_module(module), name)
    messages = [{"role": "assistant", "content": row["completion"]}]
    assert judge(completions=[row["completion"], messages], answer=[row["answer"]] * 2) == [row["reward"]] * 2


def test_exact_compares_the_whole_text() -> None:
    assert exact([" 7 ", [{"role": "assistant", "content": "8"}], "7"], ["7", "7", None]) == [1, 0, None]
