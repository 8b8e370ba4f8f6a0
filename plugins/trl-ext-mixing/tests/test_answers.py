"""The exact-answer reward, and the mixing example as one YAML through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from trl_ext_mixing.answers import answer_format, exact_answer, final_number

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[3] / "examples"


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


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["", "dft"])
def test_the_example_trains_from_one_yaml(tmp_path: Path, objective: str) -> None:
    """As it is, and with an objective in addition."""
    model = save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "model")
    work = tmp_path / "checkout"
    work.mkdir()
    (work / "examples").symlink_to(EXAMPLES)
    config = tmp_path / "config.yaml"
    more = f"plugins:\n  - name: {objective}\n" if objective else "plugins:\n"
    config.write_text((EXAMPLES / "mixing.yaml").read_text().replace("plugins:\n", more))
    command = [str(Path(sys.executable).with_name("trl-ext")), "grpo", "--config", str(config)]
    small = "--max_steps 2 --max_completion_length 4 --gradient_accumulation_steps 1 --use_cpu --bf16 false"
    result = subprocess.run(
        [*command, "--model_name_or_path", model, *small.split(), "--gradient_checkpointing", "false"],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "parallel-averaging/update_cosine" in result.stdout
    run = json.loads((work / "runs/mixing/trl_ext_run.json").read_text())
    assert [plugin["name"] for plugin in run["plugins"]] == [*filter(None, [objective]), "parallel-averaging", "ema"]
    assert run["streams"]["sft"]["samples"] == 200
    assert (work / "runs/mixing/model.safetensors").is_file()
