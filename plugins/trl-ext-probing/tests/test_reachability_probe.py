"""`trl-ext probe reachability`: on models of known likelihoods, interrupted and resumed, and against TRL."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from interruption import killed_after, lines_of, results_of, same_results
from trl_ext_probing.encoding import Encoded, drawn_ids, prompt_ids
from trl_ext_probing.journal import Journal
from trl_ext_probing.passk.passk_run import run as passk
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.reachability.keys import prompt_key
from trl_ext_probing.reachability.measurement import Measurement
from trl_ext_probing.reachability.reach_run import run
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.results import read_rows
from trl_ext_probing.rows import load_problems
from trl_ext_probing.scoring import Scorer

from trl_ext.errors import ConfigurationError
from trl_ext.testing import ModularChain, save_model, tiny_llama, tiny_tokenizer

VOCABULARY = 259
SUCCESSES = (1, 26, 130)
"""First tokens that succeed, of prompts number 0, 1 and 2 of three: 0.1, 3.2 and 16 of 32 draws."""


def first_token_reward(completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[float]:
    """A success where the first token is one of the first `answer` of the vocabulary: with known probability under a
    uniform model."""
    return [float(ids[0] < int(a)) for ids, a in zip(completion_ids, answer, strict=True)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> ReachabilitySettings:
    """A model that finds every token equally likely, and 12 prompts with a two-byte demonstration and EOS."""
    folder = tmp_path_factory.mktemp("uniform")
    model = tiny_llama(hidden=16, layers=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = [{"question": f"{i:02d}", "solution": "!!", "answer": str(SUCCESSES[i % 3])} for i in range(12)]
    return ReachabilitySettings(
        model=[save_model(model, tiny_tokenizer(), folder / "model")],
        dataset=write_rows(folder / "data.jsonl", rows),
        reward=["test_reachability_probe:first_token_reward"],
        columns="question=prompt,solution=completion",
        num_generations=8,
        epochs=4.0,
        n=8,
        max_rollouts=64,
        max_completion_length=3,
        batch_size=20,
        seed=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def measured(uniform: ReachabilitySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    run(replace(uniform, output=folder))
    return folder


KINDS: dict[str, Any] = {
    **dict.fromkeys(("row", "rollouts", "successes", "first_rollouts", "first_successes"), int),
    **dict.fromkeys(("low", "high", "log_likelihood", "worst_token", "at_least_one"), float),
    **dict.fromkeys(("key", "route", "demonstration_correct"), str),
}


def records(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder, KINDS)


def summary_of(folder: Path) -> dict[str, Any]:
    return results_of(folder)["models"][0]  # type: ignore[no-any-return]


def journal(folder: Path) -> Path:
    (path,) = folder.glob("journal*")
    return path


def test_likelihoods_of_a_uniform_policy(measured: Path) -> None:
    """k^-N for a whole answer of N tokens, 1/k for its worst token; the curves are constant."""
    for record in records(measured):
        assert record["log_likelihood"] == pytest.approx(-3 * np.log(VOCABULARY), rel=1e-5)  # fp32 softmax
        assert record["worst_token"] == pytest.approx(1 / VOCABULARY, rel=1e-5)
        assert record["demonstration_correct"] == "True"
    curves = summary_of(measured)["log_quantiles"]
    assert curves["demonstrations"][:-1] == pytest.approx([-3 * np.log(VOCABULARY)] * 100, rel=1e-5)
    assert curves["worst_tokens"][:-1] == pytest.approx([-np.log(VOCABULARY)] * 100, rel=1e-5)
    assert curves["demonstrations"][-1] == 0  # all prompts may be below


def test_passk_draws_and_judges_the_same_completions(
    uniform: ReachabilitySettings, measured: Path, tmp_path: Path
) -> None:
    """So that their success rates of the same problems are the same number."""
    shared = {field.name for field in fields(PasskSettings)} & {field.name for field in fields(uniform)}
    same = {name: getattr(uniform, name) for name in shared - {"output", "overwrite"}}
    passk(PasskSettings(**same, k="1,8", output=tmp_path))
    found, expected = (
        {
            (line["row"], line["sample"]): (line["completion"], line["reward"])
            for line in map(json.loads, journal(folder).read_text().splitlines())
            if line.get("sample", uniform.n) < uniform.n
        }
        for folder in (tmp_path, measured)
    )
    assert len(found) == 12 * uniform.n
    assert found == expected


def test_rollouts_go_where_the_route_is_open(measured: Path) -> None:
    found = records(measured)
    for record in found:
        p = SUCCESSES[record["row"] % 3] / VOCABULARY
        assert record["low"] <= p <= record["high"]  # at 95 %, with a fixed seed
        assert 8 <= record["rollouts"] <= 64
        assert record["first_rollouts"] == 8
        assert 0 <= record["first_successes"] <= record["successes"] <= record["rollouts"]
    assert all(record["rollouts"] < 64 for record in found[2::3])
    assert all(record["rollouts"] == 64 for record in found[1::3])
    drawn = [line["row"] for line in lines_of(journal(measured)) if "sample" in line]
    assert [drawn.count(i) for i in range(12)] == [record["rollouts"] for record in found]


def made_up(settings: ReachabilitySettings, path: Path, rewards: dict[int, list[float]], **shown: Any) -> Measurement:
    """A measurement with these rewards of some rows, 8 failures of the others, and a demonstration of rows 0 and 1."""
    rows = load_problems(settings)
    with Journal(path, {}, overwrite=True) as there:
        for row in range(len(rows)):
            for j, reward in enumerate(rewards.get(row, [0.0] * 8)):
                there.append({"row": row, "sample": j, "reward": reward, "tokens": 1, "cut": False})
        if shown:
            common = {"worst_token": 0.3, "too_long": False, **shown}
            there.append(*({"demonstration": i, "correct": i == 0, **common} for i in (0, 1)))
        return Measurement(settings, rows, "m", there)


def test_decided_prompts_get_no_more_rollouts(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    """A rate of a half is in reach whatever it is exactly; 1 of 32 may be one in ten, or one in a thousand."""
    measurement = made_up(uniform, tmp_path / "j", {0: [1.0, 0.0] * 16, 1: [1.0] + [0.0] * 31})
    assert measurement.open(32).tolist()[:2] == [False, True]


def test_likely_demonstrations_bound_the_rate_if_they_are_correct(
    uniform: ReachabilitySettings, tmp_path: Path
) -> None:
    likely = {"log_likelihood": float(np.log(0.3))}
    measurement = made_up(uniform, tmp_path / "j", {}, **likely)
    assert measurement.bounds()[0].tolist()[:2] == [pytest.approx(0.3), 0.0]
    found = measurement.prompts()
    assert (found[0]["route"], found[1]["route"]) == ("in_reach", "marginal")
    nucleus = made_up(replace(uniform, top_p=0.9), tmp_path / "j", {}, **likely)
    assert nucleus.bounds()[0][0] == 0.0  # cut-off sampling may never draw it


def test_results_count_what_the_rows_say(uniform: ReachabilitySettings, measured: Path) -> None:
    summary, found = summary_of(measured), records(measured)
    assert summary["rollouts"] == sum(record["rollouts"] for record in found)
    assert summary["routes"] == {
        route: sum(record["route"] == route for record in found) for route in summary["routes"]
    }
    rates = [record["successes"] / record["rollouts"] for record in found]
    assert summary["success_rate"] == pytest.approx(np.mean(rates))
    curve = summary["log_quantiles"]["rollouts"]  # of 12 prompts, the one behind the half
    assert np.exp(curve[50]) == pytest.approx(sorted(rates)[6])
    assert summary["predicted_solved_share"] == pytest.approx(np.mean([record["at_least_one"] for record in found]))
    assert found[3]["key"] == prompt_key("03")
    demonstrations = (measured / "demonstrations.jsonl").read_text().splitlines()
    assert len(demonstrations) == summary["routes"]["demonstration"]
    text = (measured / "table.md").read_text()
    assert "12 prompts" in text
    assert "8 generations x 4 epochs = 32 draws" in text


@pytest.mark.parametrize("writes", [0, 1, 7])
def test_an_interrupted_measurement_goes_on_to_the_same_results(
    uniform: ReachabilitySettings, measured: Path, tmp_path: Path, writes: int
) -> None:
    chosen = replace(uniform, output=tmp_path)
    with killed_after(writes):
        run(chosen)
    assert not (tmp_path / "results.json").exists()
    if writes:
        with journal(tmp_path).open("ab") as file:
            file.write(b'{"row": 3, "sam')
    run(chosen)
    same_results(tmp_path, measured)


def test_log_probs_of_demonstrations_equal_those_of_plain_trl(tmp_path: Path) -> None:
    """TRL's GRPO at temperature 0.7, one completion at a time without padding, against ours in one batch."""
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(hidden=16), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a model with opinions
    path = save_model(model, tokenizer, tmp_path / "model")
    rows = [*ModularChain(steps=2).dataset(6), {"prompt": "x", "completion": "a longer answer"}]
    starts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    answers = [drawn_ids(tokenizer, row["prompt"], row["completion"], [tokenizer.eos_token_id]) for row in rows]
    ours = Scorer(model, 0.7).score([Encoded(s + a, len(s)) for s, a in zip(starts, answers, strict=True)])
    trainer = trl.GRPOTrainer(
        model=path,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=trl.GRPOConfig(
            str(tmp_path), temperature=0.7, num_generations=4, per_device_train_batch_size=4, bf16=False, use_cpu=True,
            report_to="none",
        ),
        train_dataset=ModularChain(steps=2).dataset(4, "prompt_only"),
    )  # fmt: skip
    trainer.model.eval()
    for start, answer, mine in zip(starts, answers, ours, strict=True):
        ids = torch.tensor([[*start, *answer]])
        with torch.no_grad():
            theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), len(answer))
        assert mine.log_probs == pytest.approx(theirs[0][0].tolist(), rel=1e-4, abs=1e-5)  # fp32, other batch shapes


def test_demonstrations_may_be_wrong_or_missing(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    """Wrong ones are counted, missing ones left out."""
    rows = load_problems(uniform)
    rows[0]["completion"] = "AA"  # its answer takes only the first token
    rows[1]["completion"] = None
    data = write_rows(tmp_path / "data.jsonl", rows)
    run(replace(uniform, dataset=data, columns=None, n=1, max_rollouts=1, output=tmp_path / "out"))
    found = records(tmp_path / "out")
    assert [record["demonstration_correct"] for record in found[:3]] == ["False", None, "True"]
    assert [record["rollouts"] for record in found] == [1] * 12
    assert (found[1]["worst_token"], found[1]["log_likelihood"]) == (None, None)
    summary = summary_of(tmp_path / "out")
    assert summary["demonstrations_refused"] == 1
    assert summary["log_quantiles"]["demonstrations"][0] == pytest.approx(-3 * np.log(VOCABULARY), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_rollouts": 4}, "--n 8, --max-rollouts 4"),
        ({"n": 0, "max_rollouts": None}, "--n 0: at least 1"),
        ({"confidence": 1.0}, "--confidence 1: between 0 and 1"),
        ({"temperature": 0.0}, "greedy completions have no success rate"),
        ({"num_generations": 1}, "--num-generations 1: at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(uniform: ReachabilitySettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(uniform, **change)


@pytest.mark.parametrize("limit", [None, 64])
def test_failures_alone_close_a_route_unless_the_limit_forbids_it(
    uniform: ReachabilitySettings, tmp_path: Path, limit: int | None
) -> None:
    """8 generations and 3 epochs take 125 failures; no token at all succeeds here."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "0"}, {"prompt": "b", "answer": "0"}])
    plan: dict[str, Any] = {"dataset": data, "columns": None, "epochs": 3.0, "max_rollouts": limit}
    run(replace(uniform, **plan, max_completion_length=1, output=tmp_path / "out"))
    content = results_of(tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    used = limit or 125
    assert content["settings"]["max_rollouts"] == used
    assert content["rounds"] == [8, 16, 32, 64, 125][: 4 + (limit is None)]
    assert f"Limit: {used} rollouts a prompt" in text
    assert content["models"][0]["routes"]["out_of_reach"] == (0 if limit else 2)
    assert ("Warning: 64 failures in 64 rollouts do not show" in text) == (limit is not None)
    assert ("set --max-rollouts 125, or leave it out" in text) == (limit is not None)
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000, "rates of 0 are drawn"


def test_demonstration_that_cannot_be_drawn_is_not_used(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    """Two bytes and EOS are three tokens; a completion of two has no bound from them and takes no step of them."""
    run(replace(uniform, max_completion_length=2, output=tmp_path))
    summary = summary_of(tmp_path)
    assert (summary["demonstrations_too_long"], summary["demonstrations_refused"]) == (12, 0)
    assert list(summary["log_quantiles"]) == ["rollouts"]
    for record in records(tmp_path):
        assert (record["worst_token"], record["demonstration_correct"]) == (None, None)
        assert record["low"] == 0 or record["successes"] > 0
        assert record["route"] not in ("process_reward", "demonstration")
    assert "12 demonstrations have more tokens than a completion (2)" in (tmp_path / "table.md").read_text()


def test_another_model_under_the_same_name_is_refused(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    model = tiny_llama(hidden=16, layers=1)
    path = save_model(model, tiny_tokenizer(), tmp_path / "model")
    settings = replace(uniform, model=[path], output=tmp_path / "out")
    with killed_after(1):
        run(settings)
    torch.nn.init.zeros_(model.lm_head.weight)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"other settings: weights: model \('content"):
        run(settings)


def test_a_reward_that_lacks_a_column_is_refused_before_the_model_loads(
    uniform: ReachabilitySettings, tmp_path: Path
) -> None:
    settings = replace(uniform, reward=["trl_ext_probing.answers:exact_answer"], output=tmp_path / "out")
    settings = replace(settings, columns=f"{settings.columns},answer=result")
    with pytest.raises(ConfigurationError, match=r"exact_answer wants the column\(s\) answer, .* it has prompt, "):
        run(settings)


def unjudging_reward(completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[float | None]:
    """As `first_token_reward`, without a verdict on completions whose first token is odd."""
    rewards = first_token_reward(completion_ids, answer)
    return [None if ids[0] % 2 else value for ids, value in zip(completion_ids, rewards, strict=True)]


def unjudging(completions: list[str], **columns: Any) -> list[Any]:
    return [None] * len(completions)


def test_rollouts_without_a_verdict_are_neither_success_nor_failure(
    uniform: ReachabilitySettings, tmp_path: Path
) -> None:
    chosen = {"columns": "question=prompt", "max_rollouts": 32, "output": tmp_path}
    run(replace(uniform, reward=["test_reachability_probe:unjudging_reward"], **chosen))
    verdicts: list[list[Any]] = [[] for _ in range(12)]
    for line in lines_of(journal(tmp_path)):
        verdicts[line["row"]].append(line["reward"])
    assert any(None in row for row in verdicts)
    for record, row in zip(records(tmp_path), verdicts, strict=True):
        assert len(row) <= 32  # rounds count what is drawn
        assert (record["rollouts"], record["successes"]) == (len(row) - row.count(None), row.count(1.0))


def test_prompts_without_a_score_are_no_failures(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    chosen = {"reward": ["test_reachability_probe:unjudging"], "columns": "question=prompt", "output": tmp_path}
    with pytest.raises(ConfigurationError, match=r"gave None for every completion of 12 prompts of .* leave these"):
        run(replace(uniform, **chosen))


def test_several_models_are_compared_in_the_first_round(uniform: ReachabilitySettings, tmp_path: Path) -> None:
    other = save_model(tiny_llama(hidden=16, layers=1), tiny_tokenizer(), tmp_path / "other")
    run(replace(uniform, model=[*uniform.model, other], max_rollouts=8, output=tmp_path / "out"))
    first, second = ([r for r in read_rows(tmp_path / "out", {**KINDS, "model": str}) if r["model"] == m]
                     for m in (*uniform.model, other))  # fmt: skip
    expected = sum(b["first_successes"] - a["first_successes"] for a, b in zip(first, second, strict=True)) / 12 / 8
    found = results_of(tmp_path / "out")["models"][1]["difference_from_first"]
    assert found["value"] == pytest.approx(expected)
    assert found["low"] <= expected <= found["high"]
