"""`trl-ext probe passk` on tiny models: samples, results, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from interruption import killed_after, lines_of, results_of, same_results
from stub_server import Stub
from trl_ext_probing.commands import passk
from trl_ext_probing.journal import Journal
from trl_ext_probing.passk.estimator import pass_at_k
from trl_ext_probing.passk.passk_results import Result, describe
from trl_ext_probing.passk.passk_run import run
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.rows import load_problems
from trl_ext_probing.sampling import Samples
from trl_ext_probing.work import describe_work, journal_of

from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

REWARD = "test_passk:thirds"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--", "trl_ext")


def thirds(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    assert len(prompts) == len(completions) == len(answer) == len(columns["completion_ids"])
    return [float(len(c.encode()) % 3 == 0) for c in completions]


def graded(completions: Sequence[str], grade: Sequence[float], **columns: Any) -> Sequence[float]:
    return grade


def half(completions: Sequence[str], **columns: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PasskSettings:
    folder = tmp_path_factory.mktemp("passk")
    for seed in (0, 1):
        save_model(tiny_llama(hidden=16, seed=seed), tiny_tokenizer(), folder / f"m{seed}")
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in Addition(digits=1).dataset(6, "prompt_only")]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PasskSettings(
        model=[str(folder / "m0")],
        dataset=str(folder / "data.jsonl"),
        reward=[REWARD],
        n=5,
        k="1,2",
        batch_size=4,
        max_completion_length=3,
        temperature=1.0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(settings: PasskSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("whole")
    (result,) = run(replace(settings, output=folder))
    return result, folder


def journal(folder: Path) -> Path:
    (path,) = folder.glob("journal*")
    return path


def test_an_interrupted_run_ends_with_the_samples_of_a_whole_one(
    settings: PasskSettings, whole: tuple[Result, Path], tmp_path: Path
) -> None:
    with killed_after(2):
        run(replace(settings, output=tmp_path))
    assert len(lines_of(journal(tmp_path))) == 8
    with journal(tmp_path).open("a") as file:
        file.write('{"row": 1, "samp')  # killed while writing
    run(replace(settings, output=tmp_path, batch_size=7))
    found = lines_of(journal(whole[1]))
    assert sorted(map(str, lines_of(journal(tmp_path)))) == sorted(map(str, found))
    assert len(found) == 6 * 5
    assert len({line["completion"] for line in found}) > 10, "samples are apart"
    assert {line["cut"] for line in found} <= {True, False}
    assert all(line["tokens"] <= 3 for line in found)


def test_more_samples_are_added_to_those_that_are_there(
    settings: PasskSettings, whole: tuple[Result, Path], tmp_path: Path
) -> None:
    run(replace(settings, output=tmp_path, n=2))
    run(replace(settings, output=tmp_path))
    assert sorted(map(str, lines_of(journal(tmp_path)))) == sorted(map(str, lines_of(journal(whole[1]))))


def test_a_finished_folder_is_read_without_a_model_and_judged_anew(
    settings: PasskSettings, whole: tuple[Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_ext_probing.sampling.load_model", lambda *args: pytest.fail("a model loads"))
    assert run(replace(settings, output=whole[1])) == [whole[0]]
    (strict,) = run(replace(settings, output=whole[1], solved_at=2.0, confidence=0.9))
    assert strict.estimates[1].value == 0
    run(replace(settings, output=whole[1]))


def test_estimates_are_means_over_problems_of_the_unbiased_value(whole: tuple[Result, Path]) -> None:
    result, folder = whole
    counts = [0] * 6
    for line in lines_of(journal(folder)):
        counts[line["row"]] += len(line["completion"].encode()) % 3 == 0
    for k in (1, 2):
        assert result.estimates[k].value == pytest.approx(sum(pass_at_k(5, c, k) for c in counts) / 6)
    values = [result.estimates[k].bounds[0] for k in (1, 2)]
    assert 0 < values[0] < values[1] < 1
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["solved"]) for row in rows] == counts
    content = results_of(folder)
    assert (content["schema"], content["probe"], content["settings"]["n"]) == (1, "passk", 5)
    assert content["models"][0]["pass@k"]["2"]["value"] == result.estimates[2].value
    assert "trl-ext probe passk" in (folder / "table.md").read_text()
    assert (folder / "plot.png").stat().st_size > 10_000


def made_up(settings: PasskSettings, rewards: list[list[float | None]]) -> Result:
    samples = Samples([{}] * len(rewards))
    samples.held = {
        (i, j): {"reward": reward, "tokens": 2, "cut": False}
        for i, row in enumerate(rewards)
        for j, reward in enumerate(row)
    }
    return Result.of("m", {"data": {}, "weights": {}}, samples, replace(settings, n=len(rewards[0])))


def test_samples_without_a_reward_are_left_out_and_counted(settings: PasskSettings) -> None:
    """Of problem 0 none applies, of problem 1 one, of the others all."""
    found = made_up(settings, [[None] * 5, [1.0, *[None] * 4], *[[1.0] * 5] * 4])
    assert [p.rated for p in found.problems] == [0, 1, 5, 5, 5, 5]
    assert found.unrated == 9
    assert (found.estimates[1].count, found.estimates[2].count) == (5, 4)
    assert found.estimates[1].value == 1
    text = describe(settings, [found])
    assert "9 of 30 samples have no reward" in text
    assert "problems with fewer than 2 rewards, left out of pass@2: 2" in text
    with pytest.raises(ConfigurationError, match="lower --k"):
        made_up(settings, [[None] * 5] * 2)


def test_several_models_are_compared_problem_by_problem(
    settings: PasskSettings, whole: tuple[Result, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [settings.model[0], settings.model[0].replace("m0", "m1")]
    first, second = run(replace(settings, model=both, output=tmp_path))
    assert first == whole[0]
    expected = sum(second.values[2][i] - first.values[2][i] for i in range(6)) / 6
    difference = second.differences(first)[2]
    assert difference.value == pytest.approx(expected)
    assert difference.bounds[1] <= expected <= difference.bounds[2]
    assert difference.value != 0
    assert "| minus the first |" in capsys.readouterr().out
    models = results_of(tmp_path)["models"]
    assert models[0]["difference_from_first"] is None
    assert models[1]["difference_from_first"]["2"]["value"] == pytest.approx(expected)


def test_a_server_is_asked_for_each_sample_once_and_interrupted_runs_go_on(
    settings: PasskSettings, tmp_path: Path, serve: Callable[..., Stub]
) -> None:
    """Its completions tell their seeds, so that none can be of another draw; it says nothing of tokens."""
    stub = serve()
    asked = replace(settings, engine="server", base_url=[stub.url], model=["m"], output=tmp_path / "out")
    with killed_after(2):
        run(asked)
    begun = len(stub.requests)
    kept = lines_of(journal(tmp_path / "out"))
    assert len(kept) == 8
    (result,) = run(asked)
    later = {f"seed {body['seed']}" for _, body in stub.requests[begun:]}
    assert not later & {line["completion"] for line in kept}, "what is kept is not asked for again"
    run(replace(asked, output=tmp_path / "whole"))
    same_results(tmp_path / "out", tmp_path / "whole")
    assert {body["model"] for _, body in stub.requests} == {"m"}
    assert {body["prompt"] for _, body in stub.requests} == {row["prompt"] for row in load_problems(settings)}
    assert len({line["completion"] for line in lines_of(journal(tmp_path / "out"))}) == 30
    assert result.about["weights"] == {"model": "m"}
    assert [problem.mean_tokens for problem in result.problems] == [None] * 6


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": "1,8"}, "--k '1,8' with --n 5: every k is in"),
    "k's form": ({"k": "one"}, "--k 'one' is not a list of whole numbers"),
    "n": ({"n": 0}, "--n 0: at least 1"),
    "column": ({"columns": "prompt=question"}, r"no column 'prompt' \(there are question, answer\); rename one"),
    "data": ({"dataset": "none.jsonl"}, "there is no file"),
    "reward": ({"reward": ["no.such:reward"]}, "--reward 'no.such:reward' cannot be loaded: ModuleNotFoundError"),
    "reward's column": ({"reward": ["test_passk:graded"]}, r"wants the column\(s\) grade"),
    "weights": ({"reward_weights": "1,2"}, "2 weights for 1 rewards"),
    "dtype": ({"dtype": "bf16"}, "--dtype 'bf16' is not one of auto"),
    "confidence": ({"confidence": 95.0}, "--confidence 95: between 0 and 1"),
    "model": ({"model": ["./nowhere"]}, "model './nowhere': there is no such folder"),
    "model twice": ({"model": ["a", "a"]}, "--model: 'a' is there twice"),
    "one file": ({"model": ["a/b", "a-b"]}, "--model 'a-b': its journal would be"),
    "base url": ({"base_url": ["http://localhost"]}, "--base-url goes with --engine server"),
    "settings": ({"temperature": 0.1}, r"temperature \(1\.0 there, 0\.1 here\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_before_a_model_loads(
    settings: PasskSettings, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSED[case]
    monkeypatch.setattr("trl_ext_probing.sampling.load_model", lambda *args: pytest.fail("a model loads"))
    options = {f.name: getattr(settings, f.name) for f in fields(settings)} | {"output": tmp_path / "out"}
    if case == "settings":
        about = describe_work(settings, settings.model, load_problems(settings))[settings.model[0]]
        with Journal(journal_of(tmp_path / "out", settings.model)[settings.model[0]], about) as there:
            there.append({"row": 0, "sample": 0, "reward": 1.0, "tokens": 1, "cut": False})
    with pytest.raises(ConfigurationError, match=message) as caught:
        passk(**{**options, **change})
    assert "\n" not in str(caught.value)
    if case != "settings":
        assert not (tmp_path / "out").exists(), "a failed attempt blocks nothing"


def test_a_second_model_is_looked_at_before_the_first_one_draws(
    settings: PasskSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_ext_probing.sampling.load_model", lambda *args: pytest.fail("a model loads"))
    with pytest.raises(ConfigurationError, match="no such folder"):
        run(replace(settings, model=[*settings.model, "./third"], output=tmp_path / "out"))


def test_a_line_that_is_no_sample_of_these_rows_is_named(tmp_path: Path) -> None:
    good = {"row": 0, "sample": 0, "reward": 1.0, "tokens": 1, "cut": False}
    for bad, message in (
        ({"sample": 1}, "line 3 is not a sample"),
        ({**good, "row": 9}, "line 3 is a sample of row 9, which there is not"),
        (good, "line 3 has sample 0 of row 0 again"),
    ):
        with Journal(tmp_path / "j.jsonl", {}, overwrite=True) as there:
            there.append(good, bad)
            with pytest.raises(ConfigurationError, match=message):
                Samples([{}], there)


def test_rows_beyond_the_limit_are_not_read(settings: PasskSettings) -> None:
    assert len(load_problems(replace(settings, limit=3))) == 3
    assert len(load_problems(replace(settings, limit=30))) == 6


@pytest.mark.slow
def test_the_command_runs_and_can_be_interrupted(settings: PasskSettings, tmp_path: Path) -> None:
    """Also with an adapter, and what it prints as the command is one that can be run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = replace(settings, output=tmp_path / "out").command.split()
    assert command[0] == "trl-ext"
    done = subprocess.run(
        [str(Path(sys.executable).with_name("trl-ext")), *command[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| model | pass@1 | pass@2 |" in done.stdout
    assert len(lines_of(journal(tmp_path / "out"))) == 30


@pytest.mark.slow
def test_two_processes_share_the_work_and_write_one_journal(
    settings: PasskSettings, whole: tuple[Result, Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    launch = [sys.executable, *TORCHRUN]
    command = replace(settings, output=tmp_path).command.split()[1:]
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    same_results(tmp_path, whole[1])
