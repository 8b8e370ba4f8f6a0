"""The files of a finished probe, and the pictures in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.intervals import Estimate
from trl_ext_probing.plots import draw_estimates, figure, log_axis_with_zero, save, short_names, undefined
from trl_ext_probing.results import forget_results, read_results, read_rows, slug, write_results
from trl_ext_probing.tables import percent, shown, table

from trl_ext.errors import ConfigurationError

SETTINGS = DriftSettings(base="b", model=["m"], dataset="d")
ROWS = [{"key": "00123456789012e5", "n": 3, "p": 0.1 + 0.2, "none": None}, {"key": "b", "n": 4, "p": 1.0, "none": None}]


def draw(path: Path) -> None:
    whole, axis = figure()
    draw_estimates(axis, [1, 2, 3], [Estimate(0.5, 0.4, 0.6, 9), None, Estimate(None, None, None, 9, "no")], 0, "x")
    save(whole, path)


def test_what_is_written_can_be_read_and_is_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_results(replace(SETTINGS, output=folder), {"x": float("nan"), "y": [1, float("inf")]}, ROWS, "T\n", draw)
    content = read_results(folders[0], "drift", "test")
    assert (content["schema"], content["x"], content["y"]) == (1, None, [1, None])
    assert content["command"].startswith("trl-ext probe drift --output")
    assert content["settings"]["base"] == "b"
    assert "NaN" not in (folders[0] / "results.json").read_text()
    rows = read_rows(folders[0], {"key": str, "n": int, "p": float, "none": float})
    assert rows == ROWS, "floats come back to the last bit, and keys as texts"
    assert "T\n\nMade by `trl-ext probe drift" in capsys.readouterr().out
    for name in ("rows.csv", "plot.png"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_only_a_missing_matplotlib_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def without(name: str) -> Callable[[Path], None]:
        def fails(path: Path) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return fails

    asked = replace(SETTINGS, output=tmp_path)
    write_results(asked, {}, ROWS, "T\n", without("matplotlib"))
    assert "no plot.png: matplotlib is not installed" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["probe"] == "drift"
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        write_results(asked, {}, ROWS, "T\n", without("PIL"))


@pytest.mark.parametrize("content", ["[1]", "{broken", '{"schema": 99, "probe": "drift"}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"^option: .*make one with `trl-ext probe drift`"):
        read_results(tmp_path, "drift", "option")


def test_estimates_in_words() -> None:
    estimate = Estimate(0.4123, -0.5, 0.6, 9)
    assert shown(estimate) == "0.412 [-0.500, 0.600]"
    assert percent(estimate, "+") == "+41.2 [-50.0, +60.0]"
    assert (shown(None), shown(Estimate(None, None, None, 0, "why"))) == ("", "undefined")
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"
    assert slug("/runs/a b/checkpoint-10") == "runs-a-b-checkpoint-10"


def test_small_values_and_zero_have_a_place_and_no_offset_is_shown() -> None:
    _, axis = figure()
    axis.plot([0, 1, 2], [0.0, 0.003, 1.0])
    log_axis_with_zero(axis, 0.003)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1", "0.1", "0.01", "0.001"]
    pixels = axis.transData.transform([(0, y) for y in (0.0, 0.001, 0.01, 0.1, 1.0)])[:, 1]
    steps = pixels[1:] - pixels[:-1]
    assert (steps > 0).all()
    assert steps[2] == pytest.approx(steps[3]), "a decade is as high as another"
    assert axis.get_ylim()[0] < 0, "0 is not cut off"
    log_axis_with_zero(axis, 2e-57)
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["0", "1", "1e-08", "1e-16", "1e-24", "1e-32", "1e-40", "1e-48", "1e-56"]
    zero, least, one = axis.transData.transform([(0, y) for y in (0.0, 2e-57, 1.0)])[:, 1]
    assert least - zero > (one - zero) / 20, "what is small is not 0"
    assert not axis.xaxis.get_major_formatter().get_useOffset()


def test_models_are_told_apart_by_the_last_parts_of_their_paths() -> None:
    assert short_names(["org/model", "runs/sft"]) == ["model", "sft"]
    assert short_names(["a/x/1", "b/x/1", "c"]) == ["a/x/1", "b/x/1", "c"]
    assert short_names(["runs/a/1", "runs/b/1"]) == ["a/1", "b/1"]
    assert short_names(["x", "x"]) == ["x", "x"]


def test_an_empty_picture_says_why() -> None:
    _, axis = figure()
    undefined(axis, "S is undefined: no seeds")
    assert [text.get_text() for text in axis.texts] == ["S is undefined: no seeds"]
    assert not list(axis.get_xticks()), "there is nothing to read off"


def test_overwriting_removes_what_this_probe_wrote_and_nothing_else(tmp_path: Path) -> None:
    asked = replace(SETTINGS, output=tmp_path)
    write_results(asked, {}, ROWS, "T\n", draw)
    (tmp_path / "notes.md").write_text("mine")
    forget_results(asked)
    assert (tmp_path / "results.json").exists()
    forget_results(replace(asked, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "table.md").write_text("mine")
    forget_results(replace(asked, overwrite=True))
    assert (tmp_path / "table.md").exists(), "of somebody else"
