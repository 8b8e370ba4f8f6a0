"""`trl-ext probe passk` through its functions, on tiny models: samples, results, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl_ext_mixing.estimators import pass_at_k
from trl_ext_mixing.passk import PasskSettings, header, load_rows, output_files, read_ks, sample
from trl_ext_mixing.passk_results import Result, print_results, write_results
from trl_ext_mixing.progress import Report
from trl_ext_mixing.sample_file import SampleFile

from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

TASK = Addition(digits=1)


def thirds(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    assert len(prompts) == len(completions) == len(answer) == len(columns["completion_ids"])
    return [float(len(c.encode()) % 3 == 0) for c in completions]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama(hidden=16).eval(), tiny_tokenizer()


SETTINGS = PasskSettings(model="m", dataset="d", reward="r", n=5, batch_size=4, max_new_tokens=3, temperature=1.0)
ROWS = [{"prompt": r["prompt"], "answer": r["answer"]} for r in TASK.dataset(6, "prompt_only")]


def opened(path: Path, settings: PasskSettings = SETTINGS) -> SampleFile:
    return SampleFile(path, {"settings": vars(settings), "data": {}, "weights": {}})


def draw(output: Path, tiny: tuple[Any, Any], reward: Any = thirds, stop: int | None = None) -> SampleFile:
    """Sample to the end, or until `stop`; the file comes back closed."""
    with opened(output) as file:
        for done in sample(SETTINGS, ROWS, file, loaded=tiny, reward=reward):
            if stop is not None and done >= stop:
                break
    return file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_an_interrupted_run_ends_with_the_samples_of_a_whole_one(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "whole.jsonl", tiny)
    draw(tmp_path / "parts.jsonl", tiny, stop=8)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"problem": 1, "samp')  # killed while writing
    draw(tmp_path / "parts.jsonl", tiny)
    assert (tmp_path / "whole.jsonl").read_text() == (tmp_path / "parts.jsonl").read_text()
    whole = lines(tmp_path / "whole.jsonl")
    assert len(whole) == 6 * 5
    assert len({line["completion"] for line in whole}) > 10, "samples are apart"


def test_a_batch_of_one_seed_is_no_batch_of_the_next(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    drawn = []
    for seed in (0, 1):
        same = [ROWS[0]] * 6  # so that batches differ by their seeds alone
        with opened(tmp_path / f"{seed}.jsonl") as file:
            list(sample(replace(SETTINGS, seed=seed, n=4), same, file, loaded=tiny, reward=thirds))
        texts = [line["completion"] for line in lines(tmp_path / f"{seed}.jsonl")]
        drawn.append({tuple(texts[start : start + 4]) for start in range(0, 24, 4)})
    assert all(len(batches) == 6 for batches in drawn)
    assert not drawn[0] & drawn[1]


def test_a_finished_file_is_read_without_a_model(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    draw(tmp_path / "s.jsonl", tiny)
    with opened(tmp_path / "s.jsonl") as file:
        assert list(sample(SETTINGS, ROWS, file)) == [30]


def test_each_sample_says_how_long_it_is_and_whether_it_was_cut_off(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    tokenizer = tiny_tokenizer()
    eos = tokenizer.convert_ids_to_tokens(lines_of_ids(tmp_path, tiny)[0][1])
    tokenizer.eos_token = eos  # a token that comes up, so that some end by themselves
    seen: list[list[int]] = []
    draw(
        tmp_path / "s.jsonl",
        (model, tokenizer),
        reward=lambda completion_ids, **kw: seen.extend(completion_ids) or [0.0] * len(completion_ids),
    )
    for line, ids in zip(lines(tmp_path / "s.jsonl"), seen, strict=True):
        assert line["tokens"] == len(ids)
        assert line["cut"] == (ids[-1] not in (tokenizer.eos_token_id, model.generation_config.eos_token_id))
    assert {line["cut"] for line in lines(tmp_path / "s.jsonl")} == {True, False}


def lines_of_ids(tmp_path: Path, tiny: tuple[Any, Any]) -> list[list[int]]:
    seen: list[list[int]] = []
    draw(
        tmp_path / "ids.jsonl",
        tiny,
        reward=lambda completion_ids, **kw: seen.extend(completion_ids) or [0.0] * len(completion_ids),
    )
    return seen


# -- results ---------------------------------------------------------------------------------------------------------


def result(file: SampleFile, ks: Sequence[int] = (1, 2), solved_at: float = 1.0) -> Result:
    return Result.of("m", file, 6, ks, solved_at, 0.95)


def test_estimates_are_means_over_problems_of_the_unbiased_value(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    file = draw(tmp_path / "s.jsonl", tiny)
    counts = [0] * 6
    for line in lines(tmp_path / "s.jsonl"):
        counts[line["problem"]] += len(line["completion"].encode()) % 3 == 0
    found = result(file).estimates
    for k in (1, 2):
        assert found[k].mean == pytest.approx(sum(pass_at_k(5, c, k) for c in counts) / 6)
    assert 0 < found[1].mean < found[2].mean < 1


def test_another_threshold_judges_the_same_samples_anew(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    file = draw(tmp_path / "s.jsonl", tiny, reward=lambda completions, **kw: [0.5] * len(completions))
    assert result(file).estimates[1].mean == 0
    with opened(tmp_path / "s.jsonl", replace(SETTINGS, solved_at=0.5)) as again:
        assert list(sample(SETTINGS, ROWS, again)) == [30]
    assert result(again, solved_at=0.5).estimates[1].mean == 1


def test_samples_without_a_reward_are_left_out_and_counted(
    tmp_path: Path, tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of problem 0 none applies, of problem 1 one, of the others all."""

    order = iter([(i, j) for i in range(6) for j in range(5)])

    def some(prompts: Sequence[str], **columns: Any) -> list[float | None]:
        places = [next(order) for _ in prompts]
        return [None if i == 0 or (i == 1 and j > 0) else 1.0 for i, j in places]

    found = result(draw(tmp_path / "s.jsonl", tiny, reward=some))
    assert [p.rated for p in found.problems] == [0, 1, 5, 5, 5, 5]
    assert found.unrated == 9
    assert (found.estimates[1].problems, found.estimates[2].problems) == (5, 4)
    assert found.estimates[1].mean == 1
    print_results([found])
    shown = capsys.readouterr().out
    assert "9 of 30 samples have no reward" in shown
    assert "problems with fewer than 2 rewards, left out of pass@2: 2" in shown
    with pytest.raises(ConfigurationError, match="lower --k"):
        result(draw(tmp_path / "none.jsonl", tiny, reward=lambda prompts, **kw: [None] * len(prompts)))


def test_an_unfinished_file_is_not_estimated_from(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError, match="8 samples, not 5 of each of 6"):
        result(draw(tmp_path / "s.jsonl", tiny, stop=8))


def test_results_of_names_with_dots_do_not_overwrite_each_other(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    for name in ("lr.1", "lr.2"):
        write_results(tmp_path / name, [result(draw(tmp_path / name, tiny))])
    assert {p.name for p in tmp_path.iterdir()} == {
        f"lr.{i}{end}" for i in (1, 2) for end in ("", ".summary.json", ".problems.csv")
    }


def test_several_models_are_compared_problem_by_problem(
    tmp_path: Path, tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        draw(tmp_path / f"{i}.jsonl", model)
        for i, model in enumerate((tiny, (tiny_llama(hidden=16, seed=1).eval(), tiny[1])))
    ]
    first, second = (Result.of(f"m{i}", file, 6, [1, 2], 1.0, 0.95) for i, file in enumerate(files))
    expected = sum(second.values[2][i] - first.values[2][i] for i in range(6)) / 6
    difference = second.differences(first)[2]
    assert difference.mean == pytest.approx(expected)
    assert difference.low <= difference.mean <= difference.high
    assert second.differences(first)[1].mean != 0
    write_results(tmp_path / "both.jsonl", [first, second])
    print_results([first, second])
    shown = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in shown[:3]] == ["model", "m0", "m1"]
    assert "minus the first" in shown[3]
    summary = json.loads((tmp_path / "both.jsonl.summary.json").read_text())["models"]
    assert "difference_from_first" not in summary[0]
    assert summary[1]["difference_from_first"]["2"]["mean"] == pytest.approx(expected)
    with (tmp_path / "both.jsonl.problems.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[7]["pass@2"]) == pytest.approx(second.values[2][1])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_the_flag_to_change(tmp_path: Path) -> None:
    for text in ("1,8", "0", "one"):
        with pytest.raises(ConfigurationError, match="--k"):
            read_ks(text, 4)
    assert read_ks("4, 1", 4) == [1, 4]
    (tmp_path / "d.jsonl").write_text('{"question": "1+1="}\n')
    with pytest.raises(ConfigurationError, match="--columns question=prompt"):
        load_rows(replace(SETTINGS, dataset=str(tmp_path / "d.jsonl")))
    (tmp_path / "e.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": ""}\n')
    with pytest.raises(ConfigurationError, match="the prompt of row 1 is ''"):
        load_rows(replace(SETTINGS, dataset=str(tmp_path / "e.jsonl")))
    assert len(load_rows(replace(SETTINGS, dataset=str(tmp_path / "e.jsonl"), limit=1))) == 1


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    rows = Dataset.__iter__
    monkeypatch.setattr(Dataset, "__iter__", lambda self: (read.append(row) or row for row in rows(self)))
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1="}\n' * 100)
    assert len(load_rows(replace(SETTINGS, dataset=str(tmp_path / "d.jsonl"), limit=3))) == 3
    assert len(read) == 3


def test_each_model_has_a_file_of_its_own() -> None:
    output = Path("out/p.jsonl")
    assert output_files(output, ["runs/a"]) == {"runs/a": output}
    models = ["runs/rl/checkpoint-10", "runs/rl/checkpoint-20", "./base"]
    assert [str(p) for p in output_files(output, models).values()] == [
        "out/p.runs-rl-checkpoint-10.jsonl", "out/p.runs-rl-checkpoint-20.jsonl", "out/p.base.jsonl",
    ]  # fmt: skip
    for models in (["a", "a"], ["a/b", "a-b"]):
        with pytest.raises(ConfigurationError, match="--model"):
            output_files(output, models)


def test_a_finished_file_of_other_weights_or_rows_is_refused(tmp_path: Path) -> None:
    path = save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "model")
    settings = replace(SETTINGS, model=path)
    with SampleFile(tmp_path / "s.jsonl", header(settings, ROWS)) as file:
        list(sample(settings, ROWS, file, reward=thirds, device="cpu"))
    with SampleFile(tmp_path / "s.jsonl", header(settings, ROWS)) as file:
        assert len(file.samples) == 30
    with pytest.raises(ConfigurationError, match="data: digest"):
        SampleFile(tmp_path / "s.jsonl", header(settings, [*ROWS[:-1], ROWS[-1] | {"answer": "x"}]))
    tiny_llama(hidden=16, seed=1).save_pretrained(path)
    with pytest.raises(ConfigurationError, match="weights: model"):
        SampleFile(tmp_path / "s.jsonl", header(settings, ROWS))


def test_off_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, expected in ((0.0, ["m: 1 of 3", "m: 2 of 3"]), (1000.0, [])):
        with Report(seconds) as report:
            report.start("m", 3)
            report.update(1)
            report.update(2)
        assert capsys.readouterr().err.splitlines() == expected
