"""`trl-ext probe passk` and `probe drift` as commands: what they refuse, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_ext_mixing.passk import PasskSettings, header, load_rows, passk
from trl_ext_mixing.sample_file import SampleFile

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("trl-ext")), "probe", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


REFUSED = {
    "k": (("--n", "4", "--k", "1,8"), "--k '1,8' with --n 4: every k is in"),
    "column": (("--columns", "prompt=question"), "no column 'prompt'"),
    "data": (("--dataset", "none.jsonl"), "there is no file"),
    "reward": (("--reward", "no.such.reward"), "reward 'no.such.reward' cannot be imported"),
    "reward's column": (("--reward", "rewards.graded"), "wants the column(s) grade"),
    "dtype": (("--dtype", "bf16"), "--dtype 'bf16' is not one of"),
    "device": (("--device", "gpu"), "--device 'gpu' cannot be used"),
    "confidence": (("--confidence", "95"), "--confidence=95"),
    "model": (("--model", "./nowhere"), "model './nowhere': there is no such folder"),
    "settings": (("--temperature", "0.1"), "temperature (0.6 there, 0.1 here)"),
    "foreign": (("--output", "rewards.py"), "is not a file of samples"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    (tmp_path / "rewards.py").write_text(
        "def exact(completions, answer, **columns):\n"
        "    return [float(c.strip() == a) for c, a in zip(completions, answer)]\n"
        "def graded(completions, grade, **columns):\n    return grade\n"
    )
    save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_passk_refuses_before_a_model_loads(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ConfigurationError that has no cause but a refusal: the command line shows its message alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    arguments, message = REFUSED[case]
    settings = PasskSettings("base", "data.jsonl", "rewards.exact", n=4)
    with SampleFile(folder / "p.jsonl", header(settings, load_rows(settings))) as file:
        file.append([{"problem": 0, "sample": 0, "reward": 1.0, "tokens": 1, "cut": False}])
    kinds = {"--n": int, "--confidence": float, "--temperature": float, "--output": Path, "--model": lambda m: [m]}
    options: dict[str, Any] = {
        "model": ["base"], "dataset": "data.jsonl", "reward": "rewards.exact", "output": Path("p.jsonl"),
        "n": 4, "k": "1,4",
    }  # fmt: skip
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        options[flag.removeprefix("--")] = kinds.get(flag, str)(value)
    monkeypatch.setattr("trl_ext_mixing.passk.load_model", lambda *args: pytest.fail("a model loads"))
    before = (folder / "rewards.py").read_text()
    with pytest.raises(ConfigurationError) as caught:
        passk(**options)
    assert message in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError | None)
    assert (folder / "rewards.py").read_text() == before


def test_a_second_model_is_looked_at_before_the_first_one_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("trl_ext_mixing.passk.load_model", lambda *args: pytest.fail("a model loads"))
    save_model(tiny_llama(hidden=16, seed=1), tiny_tokenizer(), folder / "second")
    (folder / "p.second.jsonl").write_text("something else\n")
    for second, message in (("second", "not a file of samples"), ("./third", "no such folder")):
        with pytest.raises(ConfigurationError, match=message):
            passk(["base", second], "data.jsonl", "rewards.exact", Path("p.jsonl"), n=1, k="1")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["k", "model", "data", "dtype"])
def test_what_is_refused_ends_with_its_message_alone(folder: Path, case: str) -> None:
    given, message = REFUSED[case]
    arguments = {"--model": "base", "--dataset": "data.jsonl", "--reward": "rewards.exact"}
    arguments |= dict(zip(given[::2], given[1::2], strict=True))
    done = run("passk", *(text for pair in arguments.items() for text in pair), cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_both_probes_run_from_the_command_line(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model(tiny_llama(hidden=16), peft.LoraConfig(target_modules=["down_proj"], r=2))
    adapter.peft_config["default"].base_model_name_or_path = "base"
    torch.manual_seed(0)
    for name, p in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, mean=1.0)
    adapter.save_pretrained(folder / "adapter")
    common = ("--dataset", "data.jsonl", "--reward", "rewards.exact", "--n", "4", "--k", "1,4", "--max-new-tokens", "8")
    done = run("passk", "--model", "base", *common, "--output", "out/p.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pass@4:" in done.stdout
    (only,) = json.loads((folder / "out/p.jsonl.summary.json").read_text())["models"]
    assert set(only["pass@k"]) == {"1", "4"}
    assert len(lines(folder / "out/p.jsonl")) == 8

    done = run("passk", "--model", "base", "--model", "adapter", *common, "--output", "out/q.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "minus the first" in done.stdout
    drawn = [(folder / f"out/q.{name}.jsonl").read_text().splitlines()[1:] for name in ("base", "adapter")]
    assert drawn[0] == (folder / "out/p.jsonl").read_text().splitlines()[1:]
    assert drawn[0] != drawn[1], "the adapter is loaded"

    columns = ("--columns", "answer=completion")
    done = run("drift", "--model", "adapter", "--base", "base", "--dataset", "data.jsonl", *columns, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    drifted = json.loads((folder / "drift.json").read_text())
    assert "nll:" in done.stdout
    assert drifted["nll"]["change"] != 0, "the adapter is loaded"
    assert drifted["nll"]["after"] - drifted["nll"]["before"] == pytest.approx(drifted["nll"]["change"])
