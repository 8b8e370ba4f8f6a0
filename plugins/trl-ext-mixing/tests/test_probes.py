"""`trl-ext probe passk` and `probe drift` on tiny models, through the functions and through the real command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from trl_ext_mixing.drift import Score, compare, score
from trl_ext_mixing.estimators import pass_at_k
from trl_ext_mixing.passk import Settings, estimate, load_rows, read_ks, sample
from trl_ext_mixing.sampling import complete, load_reward

from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

TASK = Addition(digits=1)


def thirds(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    assert len(prompts) == len(completions) == len(answer) == len(columns["completion_ids"])
    return [float(len(c.encode()) % 3 == 0) for c in completions]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama(hidden=16).eval(), tiny_tokenizer()


SETTINGS = Settings(model="m", dataset="d", reward="r", n=5, batch_size=4, max_new_tokens=3, temperature=1.0)
ROWS = [{"prompt": r["prompt"], "answer": r["answer"]} for r in TASK.dataset(6, "prompt_only")]


def draw(output: Path, tiny: tuple[Any, Any], settings: Settings = SETTINGS, stop: int | None = None) -> None:
    for done in sample(settings, ROWS, output, loaded=tiny, reward=thirds):
        if stop is not None and done >= stop:
            return


def test_an_interrupted_run_ends_with_the_samples_of_a_whole_one(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "whole.jsonl", tiny)
    draw(tmp_path / "parts.jsonl", tiny, stop=8)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"problem": 1, "samp')  # killed while writing
    draw(tmp_path / "parts.jsonl", tiny)
    whole, parts = ((tmp_path / name).read_text() for name in ("whole.jsonl", "parts.jsonl"))
    assert whole == parts
    assert len(whole.splitlines()) == 1 + 6 * 5
    assert len({json.loads(line)["completion"] for line in whole.splitlines()[1:]}) > 10, "samples are apart"


def test_a_finished_file_is_read_without_a_model(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "s.jsonl", tiny)
    assert list(sample(SETTINGS, ROWS, tmp_path / "s.jsonl")) == [30]


def test_estimates_are_means_over_problems_of_the_unbiased_value(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "s.jsonl", tiny)
    counts = [0] * 6
    for line in (tmp_path / "s.jsonl").read_text().splitlines()[1:]:
        entry = json.loads(line)
        counts[entry["problem"]] += len(entry["completion"].encode()) % 3 == 0
    found = estimate(tmp_path / "s.jsonl", [1, 2])
    for k in (1, 2):
        assert found[k].mean == pytest.approx(sum(pass_at_k(5, c, k) for c in counts) / 6)
    assert 0 < found[1].mean < found[2].mean < 1


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "s.jsonl", tiny)
    with pytest.raises(ValueError, match="other settings"):
        draw(tmp_path / "s.jsonl", tiny, replace(SETTINGS, temperature=0.5))


def test_padding_and_batching_do_not_change_greedy_completions(tiny: tuple[Any, Any]) -> None:
    prompts = ["1+2=", "a much longer prompt than the others: 3+4=", "5"]
    settings: dict[str, Any] = {"seed": 0, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4}
    together = complete(*tiny, prompts, **settings)
    alone = [complete(*tiny, [p], **settings)[0] for p in prompts]
    assert together == alone


def test_messages_give_messages(tiny: tuple[Any, Any]) -> None:
    prompt = [{"role": "user", "content": "1+1="}]
    ((completion, ids),) = complete(*tiny, [prompt], seed=0, temperature=1.0, top_p=1.0, max_new_tokens=2)
    assert completion[0]["role"] == "assistant"
    assert len(ids) <= 2


def test_bad_input_is_refused_with_the_flag_to_change(tmp_path: Path) -> None:
    for text in ("1,8", "0", "one"):
        with pytest.raises(ValueError, match="--k"):
            read_ks(text, 4)
    assert read_ks("4, 1", 4) == [1, 4]
    (tmp_path / "d.jsonl").write_text('{"question": "1+1="}\n')
    with pytest.raises(ValueError, match="--columns question=prompt"):
        load_rows(replace(SETTINGS, dataset=str(tmp_path / "d.jsonl")))
    with pytest.raises(ValueError, match=r"no\.such\.reward"):
        load_reward("no.such.reward")
    lacking = [{"prompt": row["prompt"], "level": 1} for row in ROWS]
    with pytest.raises(ConfigurationError, match=r"reward r wants the column\(s\) answer, .* it has prompt, level\."):
        next(step for step in sample(SETTINGS, lacking, tmp_path / "new.jsonl", reward=thirds) if step)


# -- drift -----------------------------------------------------------------------------------------------------------


def test_scores_match_one_example_at_a_time(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = [
        {"prompt": "1+2=", "completion": "3"},
        {"text": "some general text"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    (scores,) = score(model, tokenizer, rows, batch_size=3)
    texts = ["1+2=3", "some general text", tokenizer.apply_chat_template(rows[2]["messages"], tokenize=False)]
    for text, first, got in zip(texts, (4, 1, 1), scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(ids).logits[0, first - 1 : -1]
        nll = float(cross_entropy(logits, ids[0, first:], reduction="sum"))
        assert got.nll == pytest.approx(nll, rel=1e-5)
        assert got.hits == int((logits.argmax(-1) == ids[0, first:]).sum())
        assert got.tokens == ids.shape[1] - first


def test_the_change_is_a_ratio_and_its_interval_covers() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, repeats = 0, 600
    for _ in range(repeats):
        tokens = torch.randint(5, 50, (80,), generator=generator)
        level = torch.randn(80, generator=generator) * 0.3 + 2.0
        moved = torch.randn(80, generator=generator) * 0.2 + 0.1  # per token, alike within an example
        before = [Score(float(a * t), 0, int(t)) for a, t in zip(level, tokens, strict=True)]
        after = [Score(float((a + m) * t), 0, int(t)) for a, m, t in zip(level, moved, tokens, strict=True)]
        change = compare(before, after, confidence=0.9)["nll"]
        total = sum(s.nll for s in after) - sum(s.nll for s in before)
        assert change.change == pytest.approx(total / int(tokens.sum()))
        covered += change.low <= 0.1 <= change.high
    assert 0.85 < covered / repeats < 0.95  # four standard errors of 600 repeats at 90 %


def test_the_same_model_has_not_drifted_and_another_tokenizer_is_refused() -> None:
    scores = [Score(3.0, 1, 4), Score(5.0, 2, 6)]
    change = compare(scores, scores)["accuracy"]
    assert (change.before, change.change, change.low, change.high) == (0.3, 0, 0, 0)
    with pytest.raises(ValueError, match="one tokenizer"):
        compare(scores, [Score(3.0, 1, 4), Score(5.0, 2, 7)])


# -- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("trl-ext")), "probe", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_both_probes_run_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    base = save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "base")
    adapter = get_peft_model(tiny_llama(hidden=16), LoraConfig(target_modules=["q_proj"], r=2))
    adapter.peft_config["default"].base_model_name_or_path = base
    for name, p in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    adapter.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    TASK.dataset(3, "prompt_completion").rename_column("prompt", "question").to_json(tmp_path / "data.jsonl")
    (tmp_path / "rewards.py").write_text(
        "def exact(completions, answer, **columns):\n"
        "    return [float(c.strip() == a) for c, a in zip(completions, answer)]\n"
    )
    common = ("--dataset", "data.jsonl", "--columns", "question=prompt")
    text = run(
        "passk", "--model", "base", *common, "--reward", "rewards.exact", "--n", "4", "--k", "1,4",
        "--max-new-tokens", "2", "--output", "out/p.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert "pass@4:" in text
    summary = json.loads((tmp_path / "out/p.summary.json").read_text())
    assert set(summary["pass@k"]) == {"1", "4"}
    text = run("drift", "--model", "adapter", "--base", "base", *common, cwd=tmp_path)
    result = json.loads((tmp_path / "drift.json").read_text())
    assert "nll:" in text
    assert result["nll"]["change"] != 0, "the adapter is loaded"
    assert math.isclose(result["nll"]["after"] - result["nll"]["before"], result["nll"]["change"])
