"""What a user can do wrong, and the one line that it ends with: exit code 2 and the nearest right thing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from trl_ext.cli import run
from trl_ext.testing import save_model
from trl_ext.testing.runs import additions, tiny_model, tokenizer

DATA = {"dataset_name": "data.jsonl"}
RUN = {
    "model_name_or_path": "model",
    "output_dir": "out",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 1,
    "disable_tqdm": True,
}
GRPO = {"dataset_name": "prompts.jsonl", "reward_funcs": "rewards.digits", "num_generations": 2}
YAML = {
    "plugin.yaml": "plugin: [power]\n",
    "far.yaml": "zzz: 1\n",
    "broken.yaml": "max_steps: 1\nplugins: [power\n",
    "tab.yaml": "streams:\n\tgeneral: data.jsonl\n",
    "list.yaml": "- power\n",
    "twice.yaml": "learning_rate: 1.0e-3\nmax_steps: 2\nlearning_rate: 1.0e-5\n",
    "empty.yaml": "",
    "env.yaml": "env: [A]\n",
    "kind.yaml": "max_steps: [1]\n",
    "truth.yaml": "max_steps: yes\n",
    "text.yaml": "max_steps: ten\n",
    "columns.yaml": "streams: {target: {path: data.jsonl, columns: {promt: prompt}}}\nplugins: [data-regularization]\n",
    "key.yaml": "streams: {target: {path: data.jsonl, splt: train}}\nplugins: [data-regularization]\n",
    "absent.yaml": "streams: {target: dat.jsonl}\nplugins: [data-regularization]\n",
    "mixture.yaml": "datasets: [{path: json, data_files: dat.jsonl}]\n",
}


def sft(**changed) -> list[str]:
    return ["sft", *flags(RUN | DATA | changed)]


def grpo(**changed) -> list[str]:
    return ["grpo", *flags(RUN | GRPO | changed)]


def other(kind: str, **changed) -> list[str]:
    return [kind, *flags(RUN | changed)]


def flags(settings: dict) -> list[str]:
    return [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]


MISTAKES = {
    # settings
    "flag": (sft(lerning_rate=1), "there is no flag --lerning_rate. Did you mean 'learning_rate'"),
    "flag without a like": (sft(zzz=1), "there is no flag --zzz; --help lists all"),
    "flag without value": ([*sft(), "--seed"], "--seed: expected one argument"),
    "flag of another type": (sft(seed="ten"), "--seed: invalid int value: 'ten'"),
    "stray word": (["sft", "power", *sft()[1:]], "'power' belongs to no flag; settings are given as --name value"),
    "key": (sft(config="plugin.yaml"), "plugin.yaml: there is no setting 'plugin'. Did you mean 'plugins'"),
    "key without a like": (sft(config="far.yaml"), "far.yaml: there is no setting 'zzz'; --help lists all"),
    "key, file in one word": ([*sft(), "--config=far.yaml"], "far.yaml: there is no setting 'zzz'; --help lists all"),
    "no YAML": (sft(config="plugins.yaml"), "--config: there is no file 'plugins.yaml'. Did you mean 'plugin.yaml'"),
    "config without file": ([*sft(), "--config"], "--config names no file"),
    "broken YAML": (sft(config="broken.yaml"), "broken.yaml, line 3 is not YAML"),
    "tab in YAML": (sft(config="tab.yaml"), "tab.yaml, line 2 is not YAML: found character '\\t'"),
    "setting twice in YAML": (
        sft(config="twice.yaml"),
        "twice.yaml, line 3 is not YAML: 'learning_rate' is",
    ),
    "list in YAML": (sft(config="list.yaml"), "list.yaml holds a list; expected settings"),
    "empty YAML": (sft(config="empty.yaml"), "empty.yaml is empty; expected settings"),
    "environment in YAML": (sft(config="env.yaml"), "env.yaml: env: ['A'] is not a mapping"),
    "list for a number": (sft(config="kind.yaml", max_steps=None), "max_steps: [1] is a list; expected int"),
    "truth for a number": (sft(config="truth.yaml", max_steps=None), "max_steps: True is a bool; expected int"),
    "text for a number": (sft(config="text.yaml", max_steps=None), "text.yaml: max_steps: invalid int value: 'ten'"),
    "bf16 on a CPU": (sft(use_cpu=None, bf16=None), "on a CPU, set use_cpu: true and bf16: false"),
    "two precisions": (sft(fp16=True, bf16=True), "At most one of fp16 and bf16 can be True"),
    "choice": (
        sft(eval_strategy="step"),
        "--eval_strategy: invalid choice: 'step' (choose from 'no', 'steps', 'epoch')",
    ),
    "nonfinite": (sft(nonfinite="stop"), "--nonfinite: invalid choice: 'stop' (choose from"),
    "best model": (sft(load_best_model_at_end=True), "load_best_model_at_end requires"),
    # data
    "no data": (sft(dataset_name=None), "dataset_name: is not set; give a hub id"),
    "data file": (
        sft(dataset_name="dat.jsonl"),
        "dataset_name: there is no file 'dat.jsonl'. Did you mean 'data.jsonl'",
    ),
    "data file elsewhere": (sft(dataset_name="x/train.jsonl"), "Paths count from the current directory"),
    "data folder": (sft(dataset_name="fodler"), "dataset_name: 'fodler' (Did you mean 'folder'?) cannot be loaded"),
    "data on the hub": (sft(dataset_name="absent/absent"), "dataset_name: 'absent/absent' cannot be loaded"),
    "data in a mixture": (sft(config="mixture.yaml", dataset_name=None), "datasets: there is no file 'dat.jsonl'. Did"),
    "broken data": (sft(dataset_name="broken.jsonl"), "the data 'broken.jsonl' cannot be loaded: JSON parse error"),
    "empty data": (sft(dataset_name="empty.jsonl"), "the data 'empty.jsonl' is empty"),
    "no test split": (
        sft(eval_strategy="steps"),
        "dataset_test_split: the data has no split 'test'. Set dataset_test_s",
    ),
    "train split": (
        sft(dataset_train_split="trian"),
        "dataset_train_split: the data has no split 'trian'. Did you mean",
    ),
    "empty evaluation": (
        sft(dataset_name="folder", eval_strategy="steps"),
        "dataset_name: 'folder': its split 'test' is empty",
    ),
    "columns": (sft(dataset_name="qa.jsonl"), "wants `prompt` and `completion`, or `messages`, or `text`. Rename them"),
    "renaming advised": (sft(dataset_name="qa.jsonl"), "dataset_columns: question=prompt,answer=completion"),
    "column": (sft(dataset_columns="promt=prompt"), "dataset_columns: no column 'promt' in the data set. Did you mean"),
    "renaming": (
        sft(dataset_columns="promt"),
        "dataset_columns: 'promt' in 'promt' is not of the form 'question=promp",
    ),
    "prompts": (
        grpo(dataset_name="qa.jsonl"),
        "GRPO wants `prompt`. Rename them, for instance dataset_columns: questio",
    ),
    "pairs": (
        other("dpo", dataset_name="data.jsonl"),
        "DPO wants `chosen` and `rejected`. Rename them, for instance dataset_columns: preferred=chosen,dispreferred=",
    ),
    "labels": (other("kto", dataset_name="data.jsonl"), "KTO wants `completion` and `label`, or `chosen` and `reje"),
    "pairs of a reward model": (other("reward", dataset_name="data.jsonl"), "reward wants `chosen` and `rejected`"),
    "no teacher": (other("distillation", dataset_name="prompts.jsonl"), "teacher_model_name_or_path: is not set; give"),
    "teacher folder": (
        other("distillation", dataset_name="prompts.jsonl", teacher_model_name_or_path="modle"),
        "teacher_model_name_or_path: 'modle' is no folder here, and cannot be had from the hub. Did you mean 'model'",
    ),
    "no rewards": (other("rloo", dataset_name="prompts.jsonl"), "reward_funcs: is not set; give package.module.func"),
    "plugin for another trainer": (
        other("reward", dataset_name="data.jsonl", plugins="gradient-surgery"),
        "is for the trainers sft, grpo, dpo, kto, rloo, distillation, and this is reward",
    ),
    "stream's column": (sft(config="columns.yaml"), "streams: target: columns: no column 'promt' in the data set. Did"),
    "stream's key": (sft(config="key.yaml"), "streams: 'target' has an unknown key 'splt'. Did you mean 'split'"),
    "stream's file": (
        sft(config="absent.yaml"),
        "streams: target: there is no file 'dat.jsonl'. Did you mean 'data.js",
    ),
    "no label left": (sft(max_length=1), "no sample of the training set has a label token left (max_length=1)"),
    # model
    "no model": (sft(model_name_or_path=None), "model_name_or_path: is not set; give a hub id or a folder"),
    "model folder": (sft(model_name_or_path="modle"), "'modle' is no folder here, and cannot be had from the hub. Did"),
    "model on the hub": (
        sft(model_name_or_path="absent/absent"),
        "model_name_or_path: 'absent/absent' is no folder here",
    ),
    "run as model": (sft(model_name_or_path="run"), "'run' holds no model (no config.json). Did you mean 'run/checkpo"),
    "file as model": (sft(model_name_or_path="data.jsonl"), "'data.jsonl' is a file; name the folder"),
    "adapter as model": (sft(model_name_or_path="adapter"), "It is an adapter: name its base model, or merge"),
    "broken model": (sft(model_name_or_path="broken"), "model_name_or_path: 'broken' cannot be read"),
    "no tokenizer": (sft(model_name_or_path="untold"), "model_name_or_path: 'untold' cannot be loaded"),
    # the run
    "nothing to resume": (
        sft(resume_from_checkpoint=True),
        "resume_from_checkpoint: there is no checkpoint in output_d",
    ),
    "checkpoint": (
        sft(resume_from_checkpoint="run/checkpoint-3"),
        "there is no folder 'run/checkpoint-3'. Did you mean",
    ),
    "file as folder": (sft(output_dir="data.jsonl"), "output_dir: 'data.jsonl' is a file; name a folder"),
    "tracker": (sft(report_to="mlflow"), "report_to: MLflow is not installed: pip install mlflow"),
    "4 bits": (sft(load_in_4bit=True), "bitsandbytes"),
    "vllm": (grpo(use_vllm=True), "pip install trl[vllm]"),
    "generations": (grpo(num_generations=3), "num_generations"),
    "no reward": (grpo(reward_funcs=None), "reward_funcs: is not set; give package.module.function or one of"),
    "reward of TRL's": (
        grpo(reward_funcs="acuracy_reward"),
        "there is no reward 'acuracy_reward'. Did you mean 'accura",
    ),
    "reward's module": (grpo(reward_funcs="reward.digits"), "there is no module 'reward'. Did you mean 'rewards'"),
    "reward's function": (grpo(reward_funcs="rewards.digit"), "module 'rewards' has no 'digit'. Did you mean 'digits'"),
    # plugins
    "plugin": (sft(plugins="powr"), "plugins: [powr]: no plugin of this name is installed. Did you mean 'power'"),
    "plugin's option": (sft(plugins="power:alfa=1"), "Did you mean 'alpha'"),
    "two owners": (sft(plugins="power,dft"), "hook 'per_token_loss' can have one owner"),
    "other trainer": (grpo(plugins="gem"), "is for the trainers sft, and this is grpo"),
    "torchjd": (
        sft(plugins="gradient-surgery:method=upgrad"),
        "torchjd is not installed: pip install 'torchjd[quadprog-",
    ),
    # starting processes
    "configuration": (
        sft(accelerate_config="fsdp3"),
        "is no file and none of TRL's configurations. Did you mean 'fsdp",
    ),
    "configuration in one word": (
        [*sft(), "--accelerate_config=fsdp3"],
        "--accelerate_config: 'fsdp3' is no file and none of TRL's configurations. Did you mean 'fsdp",
    ),
    "number of processes": (sft(num_processes="two"), "--num_processes: invalid int value: 'two'"),
    "one process": ([*sft(num_processes=2), "--cpu"], "--cpu starts one process whatever num_processes says"),
    # other commands
    "command": (["trian"], "there is no command 'trian'"),
    "near command": (["aveage"], "there is no command 'aveage'. Did you mean 'average'"),
    "near probe": (["probe", "pask"], "there is no command 'pask'. Did you mean 'passk'"),
    "near subcommand": (["plugins", "lst"], "Did you mean 'list'"),
    "option": (["demo", "--quik"], "No such option: --quik (Possible options: --quick). See trl-ext demo --help"),
    "argument": (["plugins", "info"], "Missing argument 'plugin'. See trl-ext plugins info --help"),
    "unknown plugin": (["plugins", "info", "powr"], "no plugin of this name is installed. Did you mean 'power'"),
    "script": (["run", "tran.py"], "there is no file 'tran.py'. Did you mean 'train.py'"),
    "script's plugins": (["run", "--plugins", "alpha=1", "train.py"], "plugins: 'alpha=1' starts with an option"),
    "inputs of an average": (["average", "absent", "model", "-o", "averaged"], "absent"),
    "probe's options": (["probe", "passk"], "Missing option '--reward'. See trl-ext probe passk --help"),
    "nothing to validate": (["validate", "--max_steps", "1"], "validate: give --config FILE, or a kind (sft, grpo, "),
    "validate, file in one word": (["validate", "--config=empty.yaml"], "empty.yaml is empty; expected settings"),
    "kind to validate": (["validate", "stf", "--config", "empty.yaml"], "validate: 'stf' is not one of sft, grpo"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, data and files of settings, right ones and wrong ones."""
    here = tmp_path_factory.mktemp("mistakes")
    save_model(tiny_model(), tokenizer(), here / "model")
    rows = additions(8).to_list()
    for name, keys in {
        "data.jsonl": ("prompt", "completion"),
        "qa.jsonl": ("question", "answer"),
        "prompts.jsonl": ("prompt",),
    }.items():
        lines = [json.dumps(dict(zip(keys, row.values(), strict=False))) for row in rows]
        (here / name).write_text("\n".join(lines) + "\n")
    for name, text in {**YAML, "broken.jsonl": '{"prompt": "a"\n', "empty.jsonl": "", "train.py": "pass\n"}.items():
        (here / name).write_text(text)
    (here / "rewards.py").write_text("def digits(completions, **columns):\n    return [0.0] * len(completions)\n")
    (here / "folder").mkdir()
    for split, part in {"train": rows, "test": []}.items():
        lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in part)]
        (here / "folder" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    shutil.copytree(here / "model", here / "run" / "checkpoint-20")
    shutil.copytree(here / "model", here / "broken")
    (here / "broken" / "config.json").write_text("{")
    (here / "untold").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(here / "model" / name, here / "untold")
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    return here


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line(process, folder, monkeypatch, capsys, mistake):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    arguments, expected = MISTAKES[mistake]
    code = run(arguments)
    # What loads a model shows its progress; nothing else may come before the line.
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(said) == 1, said
    assert said[0].startswith("trl-ext: ")
    assert expected in said[0]
    assert code == 2
