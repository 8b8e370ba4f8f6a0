"""Scripts as people write them: our import in place of TRL's changes no bit, and `trl-ext run` puts plugins in."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import assert_equal_bits
from safetensors.torch import load_file
from torch import Tensor

import trl_ext
from trl_ext.cli import run
from trl_ext.startup.report import RAW_FOLDER, RUN_FILE
from trl_ext.testing import save_model
from trl_ext.testing.runs import additions, tiny_model, tokenizer

USERS = Path(__file__).parent / "users"
YAML = """
data_file: data.jsonl
model_name_or_path: model
tags: [additions]
learning_rate: 0.01
lr_scheduler_type: constant
per_device_train_batch_size: 4
save_steps: 1
logging_steps: 1
use_cpu: true
bf16: false
report_to: none
"""


@dataclass(frozen=True)
class User:
    """How a script is called, the plugin that `trl-ext run` gives it, and what shows that the plugin was active."""

    plugin: str
    effect: Callable[[], None]
    calls: tuple[str, ...] = ("{output}",)
    """Command lines, one after the other."""


def trained_otherwise() -> None:
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_equal_bits(weights("ours"), weights("plain"))


def averaged() -> None:
    assert_equal_bits(weights(f"ours/{RAW_FOLDER}"), weights("plain"))
    trained_otherwise()


def averaged_and_not_saved() -> None:
    """The script saves the model in memory, and the run has said that this has the weights that training ended with."""
    assert_equal_bits(weights("ours"), weights("plain"))


PARSED = "--config settings.yaml --output_dir {output}"
SCRIPTS = {
    "adapter_model": User("power:alpha=10", trained_otherwise),
    "adapter_config": User("ema:decay=0.5", averaged),
    "own_loss": User("ema:decay=0.5", averaged_and_not_saved),
    "parsed": User("ema:decay=0.5", averaged, (PARSED, f"{PARSED} --max_steps 4")),
    "formatted": User("power:alpha=10", trained_otherwise),
    "own_optimizer": User("power:alpha=10", trained_otherwise),
    "several_rewards": User("pg", trained_otherwise),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, the data in two forms, and settings in YAML."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tokenizer(), tmp_path / "model")
    rows = additions(32).remove_columns("corrupted")
    rows.to_json(tmp_path / "data.jsonl")
    rows.rename_column("prompt", "question").remove_columns("completion").to_json(tmp_path / "questions.jsonl")
    (tmp_path / "settings.yaml").write_text(YAML)
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("process")
def test_a_script_trains_alike_with_our_import_and_takes_plugins(name: str, here: Path) -> None:
    script, user = USERS / f"{name}.py", SCRIPTS[name]
    swapped = here / "swapped.py"
    swapped.write_text(with_our_import(script.read_text()))
    for call in user.calls:
        python(script, call.format(output="plain"))
        python(swapped, call.format(output="swapped"))
    for call in user.calls:  # afterwards: from here on TRL's names are ours
        trl_ext_run(user.plugin, script, call.format(output="ours"))
    assert_equal_bits(weights("swapped"), weights("plain"))
    assert active("ours") == [user.plugin.partition(":")[0]]
    user.effect()


def test_the_swap_replaces_what_is_ours_and_leaves_the_rest() -> None:
    text = with_our_import((USERS / "parsed.py").read_text())
    assert "from trl import ModelConfig, TrlParser\nfrom trl_ext import SFTConfig, SFTTrainer\n" in text


@pytest.mark.usefixtures("process")
def test_an_objective_beside_a_loss_of_the_script_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = USERS / "own_loss.py"
    assert run(["run", "--plugins", "ema,power", str(script), "out"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-ext: "))
    assert line.startswith("trl-ext: RampedTrainer does without TRL's compute_loss, in which 'per_token_loss' of ")
    assert "plugin 'power' is called; call super().compute_loss(...) there and go on from its result" in line
    assert f"See {script}, line " in line
    assert not (here / "out" / "model.safetensors").exists()


def with_our_import(text: str) -> str:
    """The script with its import of trainers and configs changed, as docs/start/swap.md says it."""

    def swap(line: re.Match[str]) -> str:
        names = line[1].split(", ")
        parts = {"trl": sorted(set(names) - set(trl_ext.__all__)), "trl_ext": sorted(set(names) & set(trl_ext.__all__))}
        return "\n".join(f"from {module} import {', '.join(found)}" for module, found in parts.items() if found)

    return re.sub(r"^from trl import (.+)$", swap, text, flags=re.MULTILINE)


def python(script: Path, arguments: str) -> None:
    """What `python script.py arguments` does, in this process."""
    torch.manual_seed(0)
    sys.argv = [str(script), *arguments.split()]
    runpy.run_path(str(script), run_name="__main__")


def trl_ext_run(plugin: str, script: Path, arguments: str) -> None:
    torch.manual_seed(0)
    assert run(["run", "--plugins", plugin, str(script), *arguments.split()]) == 0


def weights(folder: Path | str) -> dict[str, Tensor]:
    """The weights that a script has saved: a model's, or an adapter's."""
    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


def active(folder: str) -> list[str]:
    return [plugin["name"] for plugin in json.loads(Path(folder, RUN_FILE).read_text())["plugins"]]
