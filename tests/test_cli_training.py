"""Real runs from the command line: TRL's own scripts, with and without our classes in place."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import trl
from helpers import assert_close, assert_equal_bits
from safetensors.torch import load_file

from trl_ext.cli import run
from trl_ext.cli.train import run_script, train
from trl_ext.startup.report import RAW_FOLDER, RUN_FILE
from trl_ext.testing import save_model
from trl_ext.testing.runs import additions, judged, preferences, tiny_model, tokenizer

SCRIPTS = Path(trl.__file__).parent / "scripts"
REWARD = (
    "def digits(completions, **columns):\n    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a model, data under TRL's column names and under others, and a reward."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tokenizer(), tmp_path / "model")
    rows = additions(32).to_list()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renamed = [{"question": row["prompt"], "reply": row["completion"]} for row in rows]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    )
    (tmp_path / "reward_functions.py").write_text(REWARD)
    preferences(32).to_json(tmp_path / "pairs.jsonl")
    judged(32).to_json(tmp_path / "judged.jsonl")
    save_model(tiny_model(seed=1, initializer_range=0.5), tokenizer(), tmp_path / "teacher")
    return tmp_path


def flags(output: str, **changed: object) -> list[str]:
    settings = {
        "model_name_or_path": "model",
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 3,
        **changed,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


SAMPLING = {"max_completion_length": 5, "max_steps": 2}
OTHERS: dict[str, dict[str, object]] = {
    "dpo": {"dataset_name": "pairs.jsonl"},
    "kto": {"dataset_name": "judged.jsonl"},
    "rloo": {
        "dataset_name": "prompts/train.jsonl",
        "num_generations": 2,
        "reward_funcs": "reward_functions.digits",
        **SAMPLING,
    },
    "reward": {"dataset_name": "pairs.jsonl"},
    "distillation": {
        "dataset_name": "prompts/train.jsonl",
        "teacher_model_name_or_path": "teacher",
        **SAMPLING,
    },
}
GRPO = {"num_generations": 2, "max_completion_length": 5, "reward_funcs": "reward_functions.digits", "max_steps": 2}


def run_plain(kind: str, arguments: list[str]) -> None:
    """TRL's script as TRL runs it."""
    script = import_module(f"trl.scripts.{kind}")
    script.main(*script.make_parser().parse_args_and_config(arguments))


def weights(folder: str) -> dict:
    return load_file(Path(folder) / "model.safetensors")


def active(folder: str) -> list[tuple[str, dict]]:
    return [
        (plugin["name"], plugin["options"]) for plugin in json.loads((Path(folder) / RUN_FILE).read_text())["plugins"]
    ]


@pytest.mark.parametrize(("kind", "data", "options"), [("sft", "plain", {}), ("grpo", "prompts", GRPO)])
def test_without_plugins_the_command_trains_as_trl_s_script_does(process, here, kind, data, options):
    run_plain(kind, flags("theirs", dataset_name=data, **options))
    train(kind, flags("ours", dataset_name=data, **options))
    assert_equal_bits(weights("ours"), weights("theirs"))
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_equal_bits(weights("ours"), weights("model"))


def test_a_data_file_with_other_columns_trains_as_the_same_data_does(process, here):
    run_plain("sft", flags("theirs", dataset_name="plain"))
    train("sft", flags("flags", dataset_name="qa.jsonl", dataset_columns="question=prompt,reply=completion"))
    assert_equal_bits(weights("flags"), weights("theirs"))


YAML = """
dataset_name: qa.jsonl
dataset_columns: {question: prompt, reply: completion}
plugins:
  - {name: power, alpha: 1}
  - ema:decay=0.5
"""


def test_yaml_and_flags_and_an_unmodified_script_train_alike(process, here):
    (here / "config.yaml").write_text(YAML)
    train("sft", flags("yaml", config="config.yaml"))
    columns = {"dataset_name": "qa.jsonl", "dataset_columns": "question=prompt,reply=completion"}
    train("sft", flags("flags", plugins="power:alpha=1,ema:decay=0.5", **columns))
    run_script(SCRIPTS / "sft.py", flags("script", dataset_name="plain"), ["power:alpha=1,ema:decay=0.5"])
    assert [name for name, _ in active("yaml")] == ["power", "ema"]
    assert active("yaml") == active("flags") == active("script")
    assert active("yaml")[1][1]["decay"] == 0.5
    assert_equal_bits(weights("flags"), weights("yaml"))
    assert_equal_bits(weights("script"), weights("yaml"))


def test_a_plugin_of_the_command_line_has_its_effect(process, here):
    run_plain("sft", flags("dft", dataset_name="plain", loss_type="dft"))
    run_plain("sft", flags("nll", dataset_name="plain"))
    train("sft", flags("power", dataset_name="plain", plugins="power:alpha=1"))
    # The same loss in another order of operations; three steps of Adam at 1e-2 on fp32 weights.
    assert_close(weights("power"), weights("dft"), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_close(weights("power"), weights("nll"), rtol=1e-4, atol=1e-5)


def test_trl_s_grpo_script_runs_unmodified_with_a_plugin(process, here):
    run_plain("grpo", flags("theirs", dataset_name="prompts", **GRPO))
    train("grpo", flags("ours", dataset_name="prompts", plugins="ema:decay=0.5", **GRPO))
    run_script(SCRIPTS / "grpo.py", flags("script", dataset_name="prompts", **GRPO), ["ema:decay=0.5"])
    assert [name for name, _ in active("script")] == ["ema"]
    assert_equal_bits(weights("script"), weights("ours"))
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_equal_bits(weights("script"), weights("theirs"))


@pytest.mark.parametrize("kind", OTHERS)
def test_the_other_scripts_of_trl_run_unmodified_with_plugins(process, here, kind):
    """With an average and surgery against an SFT stream; a reward model has no head to run SFT data on."""
    options = OTHERS[kind]
    streams = {} if kind == "reward" else {"streams": "general=plain/train.jsonl"}
    plugins = ["ema:decay=0.5", "adaptive-lr" if kind == "reward" else "gradient-surgery:stream_batch_size=2"]
    plain = {**options, "dataset_name": str(here / options["dataset_name"])}
    run_plain(kind, flags("theirs", **as_mixture(here, plain)))
    train(kind, flags("without", **options))
    assert_equal_bits(weights("without"), weights("theirs"))
    train(kind, flags("ours", plugins=",".join(plugins), **streams, **options))
    run_script(SCRIPTS / f"{kind}.py", flags("script", **streams, **as_mixture(here, plain)), plugins)
    assert [name for name, _ in active("script")] == ["ema", plugins[1].partition(":")[0]]
    assert_equal_bits(weights("script"), weights("ours"))
    assert_equal_bits(weights(f"script/{RAW_FOLDER}"), weights(f"ours/{RAW_FOLDER}"))
    for folder in ("script", f"script/{RAW_FOLDER}"):
        with pytest.raises(AssertionError, match="tensors differ"):
            assert_equal_bits(weights(folder), weights("theirs"))


def as_mixture(here, options):
    """The same data for TRL's own command line, which takes a file in a YAML alone."""
    options = dict(options)
    yaml = here / "mixture.yaml"
    yaml.write_text(f"datasets: [{{path: json, data_files: {options.pop('dataset_name')}}}]\n")
    return {"config": yaml, **options}


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "-m"],
}


@pytest.mark.slow  # two or three processes, each of which loads TRL
@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("accelerate", 1)])
def test_a_launcher_runs_an_unmodified_script_with_plugins(here, launcher, ranks):
    arguments = [*LAUNCHERS[launcher], "trl_ext", "run", "--plugins", "power:alpha=1", str(SCRIPTS / "sft.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments, *flags("out", dataset_name="plain")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert active("out") == [("power", {"alpha": 1.0})]
    assert f"'epoch': '{3 * 4 * ranks / 32:g}'" in done.stdout  # 3 steps of 4 samples per rank, of 32
    assert (here / "out" / "model.safetensors").is_file()


YAML_OF_A_RUN = """
model_name_or_path: model
dataset_name: plain
output_dir: out
use_cpu: true
bf16: false
report_to: none
dtype: float32
disable_tqdm: true
gradient_checkpointing: false
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 3
save_steps: 1
plugins: ["ema:decay=0.5"]
"""


def test_validate_runs_one_window_and_leaves_nothing(process, here, capsys):
    (here / "config.yaml").write_text(YAML_OF_A_RUN)
    before = sorted(here.rglob("*"))
    assert run(["validate", "--config", "config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "1. ema (" in shown
    assert "valid: sft run of model, one window of 8 samples ran; nothing was written" in shown
    assert "'loss'" not in shown
    assert sorted(here.rglob("*")) == before


def test_validate_finds_the_trainer_and_what_fails_in_the_window(process, here, capsys):
    lines = YAML_OF_A_RUN.replace("plain", "prompts").replace("gradient_accumulation_steps: 2\n", "")
    (here / "grpo.yaml").write_text(lines + "num_generations: 2\nmax_completion_length: 5\n")
    (here / "short_of_rewards.py").write_text("def digits(completions, **columns):\n    return ['no number']\n")
    with pytest.raises(ValueError, match="'digits' returned 1 rewards, but 4 were expected"):
        run(["validate", "--config", "grpo.yaml", "--reward_funcs", "short_of_rewards.digits"])
    assert "trl_ext grpo run" in capsys.readouterr().out


@pytest.mark.parametrize("kind", OTHERS)
def test_validate_knows_every_trainer(process, here, capsys, kind):
    options = {**OTHERS[kind], "plugins": "ema:decay=0.5"}
    before = sorted(here.rglob("*"))
    assert run(["validate", kind, *flags("out", **options)]) == 0
    assert f"valid: {kind} run of model, one window of 4 samples ran" in capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


def test_an_interrupt_ends_training_with_the_way_to_resume(process, here, capsys, monkeypatch):
    (here / "config.yaml").write_text(YAML_OF_A_RUN)

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as at_the_keyboard:
        at_the_keyboard.setattr("transformers.trainer_callback.DefaultFlowCallback.on_step_begin", interrupted)
        assert run(["sft", "--config", "config.yaml"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "trl-ext: interrupted; to go on from out/checkpoint-2: "
        "trl-ext sft --config config.yaml --resume_from_checkpoint true"
    )
    assert run(["sft", "--config", "config.yaml", "--resume_from_checkpoint", "true"]) == 0
    assert (here / "out" / "checkpoint-3").is_dir()


@pytest.mark.slow  # two processes beside this one, each of which loads TRL
@pytest.mark.parametrize("launch", ["--num_processes 2", "--accelerate_config ranks.yaml"])
def test_as_many_ranks_of_a_cpu_train_as_a_flag_or_a_file_asks_for(here, launch):
    (here / "config.yaml").write_text(YAML_OF_A_RUN)
    (here / "ranks.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext", "sft", "--config", "config.yaml", *launch.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"'epoch': '{3 * 4 * 2 * 2 / 32:g}'" in done.stdout  # 3 steps of 2 times 4 samples per rank, of 32
    assert active("out")[0][0] == "ema"


@pytest.mark.slow  # two processes beside the one that launches, each of which loads TRL
@pytest.mark.skipif(sys.platform != "linux", reason="no other system ends processes with their parents")
def test_ranks_end_with_whoever_launched_them(here):
    """Killed with -9, it cannot tell them; and they would go on with the devices for themselves."""
    (here / "config.yaml").write_text(YAML_OF_A_RUN.replace("max_steps: 3", "max_steps: 100000"))
    command = [sys.executable, "-m", "trl_ext", "sft", "--config", "config.yaml", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((here / "out").glob("checkpoint-*")):
        assert launcher.poll() is None
        time.sleep(0.1)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    _, left = psutil.wait_procs(ranks, timeout=60)
    for rank in left:
        rank.kill()
    assert not left
