"""`trl-ext probe reachability`: on models of known likelihoods, interrupted and resumed, and against TRL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from runs import SETTINGS, TASK, checksum_reward, prompts
from trl_ext_reachability.keys import prompt_key
from trl_ext_reachability.measurement import Measurement, load_rows
from trl_ext_reachability.measurement_settings import MeasurementSettings
from trl_ext_reachability.reach_probe import measure
from trl_ext_reachability.reach_summary import summarize
from trl_ext_reachability.sampled_policy import Policy, Sampler

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

FILES = ("prompts.jsonl", "reachability.md", "reachability.png", "reachability.json")
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
def uniform(tmp_path_factory: pytest.TempPathFactory) -> MeasurementSettings:
    """A model that finds every token equally likely, and 12 prompts with a two-byte demonstration and EOS."""
    folder = tmp_path_factory.mktemp("uniform")
    model = tiny_llama(hidden=16, layers=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = [{"question": f"{i:02d}", "solution": "!!", "answer": str(SUCCESSES[i % 3])} for i in range(12)]
    return MeasurementSettings(
        model=save_model(model, tiny_tokenizer(), folder / "model"),
        dataset=write_rows(folder / "data.jsonl", rows),
        reward="test_probe:first_token_reward",
        columns="question=prompt,solution=completion",
        num_generations=8,
        epochs=4.0,
        rollouts=8,
        max_rollouts=64,
        max_completion_length=3,
        batch_size=20,
        seed=1,
    )


@pytest.fixture(scope="module")
def measured(uniform: MeasurementSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    list(measure(uniform, folder))
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_likelihoods_of_a_uniform_policy(measured: Path) -> None:
    """k^-N for a whole answer of N tokens, 1/k for its worst token; the curves are constant."""
    summary = json.loads((measured / "reachability.json").read_text())
    for record in records(measured):
        assert record["log_likelihood"] == pytest.approx(-3 * np.log(VOCABULARY), rel=1e-5)  # fp32 softmax
        assert record["worst_steps"] == pytest.approx([1 / VOCABULARY] * 3, rel=1e-5)
        assert record["demonstration_correct"] is True
    curves = summary["log_quantiles"]
    assert curves["demonstrations"][:-1] == pytest.approx([-3 * np.log(VOCABULARY)] * 100, rel=1e-5)
    assert curves["worst_tokens"][:-1] == pytest.approx([-np.log(VOCABULARY)] * 100, rel=1e-5)
    assert curves["demonstrations"][-1] == 0  # all prompts may be below


def test_rollouts_go_where_the_route_is_open(uniform: MeasurementSettings, measured: Path) -> None:
    found = records(measured)
    for record in found:
        p = SUCCESSES[record["row"] % 3] / VOCABULARY
        assert record["low"] <= p <= record["high"]  # at 95 %, with a fixed seed
        assert 8 <= record["rollouts"] <= 64
        assert 0 <= record["successes"] <= record["rollouts"]
    assert all(record["rollouts"] < 64 for record in found[2::3])
    assert all(record["rollouts"] == 64 for record in found[1::3])
    lines = (measured / "journal.jsonl").read_text().splitlines()[1:]
    drawn = [row for line in map(json.loads, lines) if line["part"] != "demonstrations" for row in line["rows"]]
    assert [drawn.count(i) for i in range(12)] == [record["rollouts"] for record in found]
    for part in {line["part"] for line in map(json.loads, lines)}:
        sizes = [len(line["rows"]) for line in map(json.loads, lines) if line["part"] == part]
        assert all(size == uniform.batch_size for size in sizes[:-1])


def test_decided_prompts_get_no_more_rollouts(uniform: MeasurementSettings) -> None:
    """A rate of a half is in reach whatever it is exactly; 1 of 32 may be one in ten, or one in a thousand."""
    measurement = Measurement(uniform, load_rows(uniform))
    measurement.trials[:] = 32
    measurement.successes[0], measurement.successes[1] = 16, 1
    assert measurement.open.tolist()[:2] == [False, True]


def test_likely_demonstrations_bound_the_rate_if_they_are_correct(uniform: MeasurementSettings) -> None:
    measurement = Measurement(uniform, load_rows(uniform))
    measurement.trials[:] = 8
    measurement.log_likelihoods[:2] = np.log(0.3)
    measurement.worst[:] = 0.3
    measurement.correct[0] = True
    assert measurement.bounds()[0].tolist()[:2] == [pytest.approx(0.3), 0.0]
    found = measurement.prompts()
    assert (found[0]["route"], found[1]["route"]) == ("in_reach", "marginal")
    nucleus = Measurement(replace(uniform, top_p=0.9), load_rows(uniform))
    nucleus.trials[:], nucleus.correct[:], nucleus.log_likelihoods[:] = 8, True, np.log(0.3)
    assert nucleus.bounds()[0][0] == 0.0  # cut-off sampling may never draw it


def test_summary_counts_what_the_prompts_say(uniform: MeasurementSettings, measured: Path) -> None:
    summary = json.loads((measured / "reachability.json").read_text())
    found = records(measured)
    assert summary["rollouts"] == sum(record["rollouts"] for record in found)
    assert summary["routes"] == {
        route: sum(record["route"] == route for record in found) for route in summary["routes"]
    }
    rates = [record["successes"] / record["rollouts"] for record in found]
    assert summary["success_rate"] == pytest.approx(np.mean(rates))
    assert np.exp(summary["log_quantiles"]["rollouts"][50]) == pytest.approx(sorted(rates)[6])
    assert 0 < summary["predicted_solved_share"] < 1
    assert summary["predicted_solved_share"] == pytest.approx(np.mean([record["at_least_one"] for record in found]))
    assert found[3]["key"] == prompt_key("03")
    demonstrations = (measured / "demonstrations.jsonl").read_text().splitlines()
    assert len(demonstrations) == summary["routes"]["demonstration"]
    text = (measured / "reachability.md").read_text()
    assert "12 prompts" in text
    assert "8 generations x 4 epochs = 32 draws" in text


@pytest.mark.parametrize("batches", [0, 1, 3, 8])
def test_interrupted_measurement_resumes_to_the_same_bytes(
    uniform: MeasurementSettings, measured: Path, tmp_path: Path, batches: int
) -> None:
    interrupted = measure(uniform, tmp_path)
    for _ in range(batches):
        next(interrupted)
    interrupted.close()
    assert not (tmp_path / "reachability.json").exists()
    if batches:
        with (tmp_path / "journal.jsonl").open("ab") as file:
            file.write(b'{"part": "half a li')
    list(measure(uniform, tmp_path))
    for name in (*FILES, "journal.jsonl"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes(), name


def test_journal_of_another_measurement_is_refused(uniform: MeasurementSettings, tmp_path: Path) -> None:
    interrupted = measure(uniform, tmp_path)
    next(interrupted)
    interrupted.close()
    with pytest.raises(ValueError, match="holds a measurement with other settings"):
        next(measure(replace(uniform, temperature=0.5), tmp_path))


def test_log_probs_equal_those_of_plain_trl(tmp_path: Path) -> None:
    """TRL's GRPO at temperature 0.7, one completion at a time without padding, against ours in one batch."""
    torch.manual_seed(0)
    model = tiny_llama(hidden=16)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a model with opinions
    path = save_model(model, tiny_tokenizer(), tmp_path / "model")
    policy = Policy(path, Sampler(temperature=0.7))
    rows = [row for row in TASK.dataset(6)] + [{"prompt": "x", "completion": "a longer answer"}]
    starts = [policy.prompt_ids(row["prompt"]) for row in rows]
    answers = [policy.demonstration_ids(row["prompt"], row["completion"]) for row in rows]
    ours = policy.log_probs(starts, answers)
    trainer = trl.GRPOTrainer(
        model=path,
        reward_funcs=checksum_reward,
        args=trl.GRPOConfig(str(tmp_path), temperature=0.7, **SETTINGS),
        train_dataset=prompts(),
    )
    trainer.model.eval()
    for start, answer, mine in zip(starts, answers, ours, strict=True):
        ids = torch.tensor([[*start, *answer]])
        with torch.no_grad():
            theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), len(answer))
        torch.testing.assert_close(mine, theirs[0][0].double(), rtol=1e-4, atol=1e-5)  # fp32, other batch shapes


def test_completions_are_drawn_as_the_model_has_them(tmp_path: Path) -> None:
    """First tokens of 3000 completions against the softmax at the temperature, padding on the left included."""
    torch.manual_seed(0)
    model = tiny_llama(hidden=16, layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    model.generation_config.repetition_penalty = 1.7  # GRPO does not take it from the model
    model.generation_config.do_sample = True
    path = save_model(model, tiny_tokenizer(), tmp_path / "model")
    policy = Policy(path, Sampler(max_completion_length=1, temperature=0.8))
    # Half of the vocabulary is in the prompt, where a repetition penalty would bite.
    short, long = list(range(0, 250, 2)), list(range(256))
    drawn = [ids for seed in range(6) for ids in policy.sample([short, long] * 500, seed)]
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn[::2]]), minlength=VOCABULARY) / 3000
    with torch.no_grad():
        expected = (model(torch.tensor([short])).logits[0, -1] / 0.8).softmax(-1)
    assert expected.max() > 0.05
    assert (counts - expected).abs().max() < 0.04  # four standard errors of a share of 1/2


def test_messages_are_rendered_as_grpo_does(tmp_path: Path) -> None:
    path = save_model(tiny_llama(hidden=16, layers=1), tiny_tokenizer(), tmp_path / "model")
    policy = Policy(path, Sampler())
    row = TASK.dataset(1, conversational=True)[0]
    decode = policy.tokenizer.decode
    start = policy.prompt_ids(row["prompt"])
    assert decode(start).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = policy.demonstration_ids(row["prompt"], row["completion"])
    assert decode(answer) == row["completion"][0]["content"] + "<|im_end|>"  # without the template's line end


def test_demonstrations_may_be_wrong_missing_or_certain(uniform: MeasurementSettings, tmp_path: Path) -> None:
    """Wrong ones are counted, missing ones left out, and likely ones do not spare the first round."""
    rows = load_rows(uniform)
    rows[0]["completion"] = "AA"  # its answer takes only the first token
    rows[1]["completion"] = None
    measurement = Measurement(replace(uniform, rollouts=1, max_rollouts=1), rows)
    journal: Any = type("Journal", (), {"lines": [], "append": lambda self, line: self.lines.append(line)})()
    parts = measurement.run(journal)
    next(parts)
    measurement.log_likelihoods[2] = np.log(0.99)
    list(parts)
    assert measurement.correct.tolist() == [False, False] + [True] * 10
    assert measurement.trials.tolist() == [1] * 12
    found = measurement.prompts()
    assert (found[1]["worst_steps"], found[1]["log_likelihood"], found[1]["demonstration_correct"]) == (None,) * 3
    summary = summarize(measurement, found)
    assert summary["demonstrations_refused"] == 1
    assert summary["log_quantiles"]["demonstrations"][0] == pytest.approx(-3 * np.log(VOCABULARY), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_rollouts": 4}, "rollouts=8, max_rollouts=4"),
        ({"rollouts": 0, "max_rollouts": None}, "rollouts=0: at least 1"),
        ({"confidence": 1.0}, r"confidence=1\.0"),
        ({"temperature": 0.0}, "greedy completions have no success rate"),
        ({"num_generations": 1}, "num_generations=1"),
    ],
)
def test_settings_out_of_range_are_refused(uniform: MeasurementSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(uniform, **change)


@pytest.mark.parametrize("limit", [None, 64])
def test_failures_alone_close_a_route_unless_the_limit_forbids_it(
    uniform: MeasurementSettings, tmp_path: Path, limit: int | None
) -> None:
    """8 generations and 3 epochs take 125 failures; no token at all succeeds here."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "0"}, {"prompt": "b", "answer": "0"}])
    plan: dict[str, Any] = {"dataset": data, "columns": None, "epochs": 3.0, "max_rollouts": limit}
    settings = replace(uniform, **plan, max_completion_length=1)
    interrupted = measure(settings, tmp_path / "out")
    next(interrupted)
    interrupted.close()
    list(measure(settings, tmp_path / "out"))
    header = json.loads((tmp_path / "out" / "journal.jsonl").read_text().splitlines()[0])
    summary = json.loads((tmp_path / "out" / "reachability.json").read_text())
    text = (tmp_path / "out" / "reachability.md").read_text()
    used = limit or 125
    assert header["settings"]["max_rollouts"] == summary["settings"]["max_rollouts"] == used
    assert summary["rounds"] == [8, 16, 32, 64, 125][: 4 + (limit is None)]
    assert f"Limit: {used} rollouts a prompt" in text
    assert summary["routes"]["out_of_reach"] == (0 if limit else 2)
    assert ("Warning: 64 failures in 64 rollouts do not show" in text) == (limit is not None)
    assert ("set --max-rollouts 125, or leave it out" in text) == (limit is not None)


def test_demonstration_that_cannot_be_drawn_is_not_used(uniform: MeasurementSettings, tmp_path: Path) -> None:
    """Two bytes and EOS are three tokens; a completion of two has no bound from them and takes no step of them."""
    list(measure(replace(uniform, max_completion_length=2), tmp_path))
    summary = json.loads((tmp_path / "reachability.json").read_text())
    assert (summary["demonstrations_too_long"], summary["demonstrations_refused"]) == (12, 0)
    assert list(summary["log_quantiles"]) == ["rollouts"]
    for record in records(tmp_path):
        assert (record["worst_steps"], record["demonstration_correct"]) == (None, None)
        assert record["low"] == 0 or record["successes"] > 0
        assert record["route"] not in ("process_reward", "demonstration")
    text = (tmp_path / "reachability.md").read_text()
    assert "12 demonstrations have more tokens than a completion (2)" in text
    assert "Raise --max-completion-length" in text


def test_ends_of_a_completion_are_those_of_plain_trl(tmp_path: Path) -> None:
    """The model's own ends and the tokenizer's; a text demonstration ends as SFT would have it."""
    tokenizer = tiny_tokenizer()
    own = tokenizer.convert_tokens_to_ids("!")
    for name, ends in (("one", own), ("both", [own, tokenizer.eos_token_id]), ("none", None)):
        model = tiny_llama(hidden=16, layers=1)
        model.config.eos_token_id = model.generation_config.eos_token_id = ends
        path = save_model(model, tokenizer, tmp_path / name)
        trainer = trl.GRPOTrainer(
            model=path,
            reward_funcs=checksum_reward,
            args=trl.GRPOConfig(str(tmp_path), **SETTINGS),
            train_dataset=prompts(),
        )
        policy = Policy(path, Sampler())
        assert policy.eos_ids == policy.model.generation_config.eos_token_id == trainer.eos_token_ids
        assert policy.demonstration_ids("x", "ab")[-1] == tokenizer.eos_token_id


def test_another_model_under_the_same_name_is_refused(uniform: MeasurementSettings, tmp_path: Path) -> None:
    model = tiny_llama(hidden=16, layers=1)
    settings = replace(uniform, model=save_model(model, tiny_tokenizer(), tmp_path / "model"))
    interrupted = measure(settings, tmp_path / "out")
    next(interrupted)
    interrupted.close()
    torch.nn.init.zeros_(model.lm_head.weight)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"other settings \(the model's files\)"):
        next(measure(settings, tmp_path / "out"))


def test_several_processes_are_refused(
    uniform: MeasurementSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="probe reachability runs in one process; start it without a launch"):
        next(measure(uniform, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_data_without_prompts_is_refused(uniform: MeasurementSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'prompt' but question, solution, answer; name it by --columns"):
        next(measure(replace(uniform, columns=None), tmp_path))


def test_reward_that_lacks_a_column_is_refused_before_the_model_loads(
    uniform: MeasurementSettings, tmp_path: Path
) -> None:
    settings = replace(uniform, model="none", reward="trl_ext_reachability.answer_rewards:final_number")
    settings = replace(settings, columns=f"{settings.columns},answer=result")
    with pytest.raises(ConfigurationError, match=r"final_number wants the column\(s\) answer, .* it has prompt, "):
        next(measure(settings, tmp_path))


def unjudging_reward(completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[float | None]:
    """As `first_token_reward`, without a verdict on completions whose first token is odd."""
    rewards = first_token_reward(completion_ids, answer)
    return [None if ids[0] % 2 else value for ids, value in zip(completion_ids, rewards, strict=True)]


def test_rollouts_without_a_verdict_are_neither_success_nor_failure(
    uniform: MeasurementSettings, tmp_path: Path
) -> None:
    settings = replace(uniform, reward="test_probe:unjudging_reward", columns="question=prompt", max_rollouts=32)
    list(measure(settings, tmp_path))
    verdicts: list[list[Any]] = [[] for _ in range(12)]
    for line in map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines()[1:]):
        for row, correct in zip(line["rows"], line["correct"], strict=True):
            verdicts[row].append(correct)
    assert any(None in row for row in verdicts)
    for record, row in zip(records(tmp_path), verdicts, strict=True):
        assert len(row) <= 32  # rounds count what is drawn
        assert (record["rollouts"], record["successes"]) == (len(row) - row.count(None), row.count(True))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda **columns: None, "gave None for every completion of 12 prompts of .* leave these rows out"),
        (lambda **columns: float("nan"), "gave the reward nan; a reward is a finite number, or None"),
    ],
    ids=["None", "NaN"],
)
def test_prompts_without_a_score_are_no_failures(
    uniform: MeasurementSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any, message: str
) -> None:
    def constant(completions: list[str], **columns: Any) -> list[Any]:
        return [reward()] * len(completions)

    monkeypatch.setattr(sys.modules[__name__], "first_token_reward", constant)
    monkeypatch.setitem(sys.modules, "test_probe", sys.modules[__name__])
    with pytest.raises(ValueError, match=message):
        list(measure(replace(uniform, columns="question=prompt"), tmp_path))


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_bytes(uniform: MeasurementSettings, measured: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-c", "from trl_ext.cli import main; main()", "probe", "reachability"),
        *("--model", uniform.model, "--dataset", uniform.dataset, "--reward", uniform.reward),
        *("--columns", str(uniform.columns), "--epochs", "4", "--max-completion-length", "3"),
        *("--max-rollouts", "64"),
        *("--batch-size", "20", "--seed", "1", "--output", str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    assert not (tmp_path / "reachability.json").exists()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "Predicted share" in done.stdout
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes(), name
