"""Averages chosen by a metric: greedy soup, sweeps, and the metrics themselves."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from on_disk import average, save, save_adapter, weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_ext_averaging.offline.metric import held_out_loss, metric_of, read_rows

from trl_ext.errors import ConfigurationError


def model_at(folder, value: float):
    """A checkpoint whose weights are all `value`."""
    save(folder)
    save_file(
        {n: torch.full_like(t, value) for n, t in weights(folder).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


METRIC = """
from safetensors.torch import load_file

def distance(folder):
    return abs(float(load_file(folder + "/model.safetensors")["lm_head.weight"].mean()) - {target})
"""


@pytest.fixture
def distance(tmp_path):
    """A metric with its minimum where all weights are a target."""

    def write(target: float) -> str:
        (tmp_path / "metric.py").write_text(METRIC.format(target=target))
        return f"{tmp_path}/metric.py:distance"

    return write


def value(folder) -> float:
    return float(weights(folder)["lm_head.weight"].mean())


def test_a_sweep_finds_the_point_of_the_path_draws_it_and_writes_it(tmp_path, distance):
    start, tuned = model_at(tmp_path / "start", 0.0), model_at(tmp_path / "tuned", 1.0)
    text = average(
        start, tuned, "-o", tmp_path / "out", "-m", "wise-ft", "--sweep", "0,0.25,0.5,0.75,1",
        "--metric", distance(0.7), "--no-maximize",
    )  # fmt: skip
    assert "best: alpha 0.75" in text
    assert value(tmp_path / "out") == pytest.approx(0.75)
    points = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [point["value"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert [point["score"] for point in points] == pytest.approx([0.7, 0.45, 0.2, 0.05, 0.3], rel=1e-6)
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "alpha=0.75" in (tmp_path / "out/README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"start", "tuned", "out"}
    assert not list(tmp_path.glob(".out*"))


def test_decays_and_lengths_are_swept_over_a_run(tmp_path, distance):
    for step in range(4):
        model_at(tmp_path / f"run/checkpoint-{step}", float(step))
    run = tmp_path / "run"
    # d = 0.5: weights 1/8, 1/8, 1/4, 1/2, so 2.125
    average(
        run, "-o", tmp_path / "ema", "-m", "ema", "--sweep", "0,0.5,0.9", "--metric", distance(2.1), "--no-maximize"
    )
    assert value(tmp_path / "ema") == pytest.approx(2.125)
    average(run, "-o", tmp_path / "lawa", "-m", "lawa", "--sweep", "1,2,3", "--metric", distance(0.0), "--maximize")
    assert value(tmp_path / "lawa") == pytest.approx(3.0)


def test_the_greedy_soup_takes_what_helps_in_the_order_of_merit(tmp_path, distance):
    values = {"a": 4.0, "b": 1.0, "c": -2.0, "d": 2.6}
    folders = [model_at(tmp_path / name, value) for name, value in values.items()]
    # Distances to 2: d 0.6, b 1, a 2, c 4. Start with d; with b 1.8, kept; with a 2.53, out; with c 0.53, out.
    text = average(*folders, "-o", tmp_path / "out", "-m", "soup", "--metric", distance(2.0), "--no-maximize")
    assert value(tmp_path / "out") == pytest.approx(1.8)
    assert text.count("left out") == 2
    assert f"{tmp_path}/a" not in (tmp_path / "out/README.md").read_text()
    assert not list(tmp_path.glob(".out*"))


def test_larger_is_better_unless_told_otherwise(tmp_path, distance):
    folders = [model_at(tmp_path / str(value), value) for value in (1.0, 2.0, 5.0)]
    average(*folders, "-o", tmp_path / "out", "-m", "soup", "--metric", distance(0.0))
    assert value(tmp_path / "out") == pytest.approx(5.0)


def test_a_dry_run_of_a_search_measures_nothing(tmp_path):
    folders = [model_at(tmp_path / str(value), value) for value in (1.0, 2.0)]
    fails = "false {}"
    average(*folders, "-o", tmp_path / "out", "-m", "soup", "--metric", fails, "--dry-run")
    average(*folders, "-o", tmp_path / "out", "-m", "slerp", "--sweep", "0,1", "--metric", fails, "--dry-run")
    assert not (tmp_path / "out").exists()


# Metrics.


def test_a_command_prints_its_number_last(tmp_path):
    script = "import sys, pathlib; print('noise'); print(len(pathlib.Path(sys.argv[1]).name))"
    metric = metric_of(f'{sys.executable} -c "{script}" {{}}')
    folder = tmp_path / "name with blanks"
    folder.mkdir()
    assert metric(folder) == len("name with blanks")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false {}", "failed \\(1\\)"),
        ("echo {} high", "must print a number last, not 'high'"),
        ("echo {} nan", "gave NaN"),
    ],
)
def test_commands_that_give_no_number_are_errors(tmp_path, command, message):
    with pytest.raises(ConfigurationError, match=message):
        metric_of(command)(tmp_path)


def test_the_held_out_loss_is_the_mean_over_label_tokens(tmp_path):
    folder = save(tmp_path / "model")
    rows = [{"text": "1+2=3"}, {"prompt": "12+3=", "completion": "15"}, {"text": "9"}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def log_probs(text):
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids  # as TRL's SFT has it
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]]

    labels = [log_probs("1+2=3"), log_probs("12+3=15")[-3:], log_probs("9")]
    assert [len(part) for part in labels] == [5, 3, 1]
    expected = -float(torch.cat(labels).mean())
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    assert metric_of("loss", data)(folder) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(math.log(259), rel=0.05)


def test_the_held_out_loss_reads_adapters(tmp_path):
    base = save(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    rows = [{"text": "1+2=3"}]
    assert abs(held_out_loss(adapter, rows) - held_out_loss(base, rows)) > 1e-3


@pytest.mark.parametrize("content", ["", "[", '{"question": "?"}'])
def test_data_of_another_form_is_refused(tmp_path, content):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    with pytest.raises(ConfigurationError, match=r"data\.jsonl"):
        read_rows(data)
