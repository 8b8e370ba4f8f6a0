"""Without plugins a run is plain TRL's, bit for bit: parameters, logged numbers and checkpoint files."""

from __future__ import annotations

import pytest
import torch
import trl
from helpers import assert_equal_bits, file_digests
from transformers import TrainingArguments

import trl_ext
from trl_ext.cli.patching import NAMES
from trl_ext.hookspecs import REWARDED
from trl_ext.testing import save_model
from trl_ext.testing.runs import (
    COMMON,
    MAKE,
    additions,
    logged,
    lora,
    make_sft,
    moved,
    parameters,
    rows,
    start_model,
    tiny_model,
    tokenizer,
    varied_reward,
    without_timing,
)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", MAKE)
def test_many_steps_equal_plain_trl(tmp_path, kind, peft, accumulation):
    runs, steps = {}, 30 if kind in ("sft", "grpo") else 6
    for name in ("plain", "ours"):
        config = {
            "max_steps": steps,
            "gradient_accumulation_steps": accumulation,
            "save_strategy": "steps",
            "save_steps": steps // 2,
        }
        if kind != "grpo":
            config |= {"eval_strategy": "steps", "eval_steps": steps // 3}
        trainer = MAKE[kind](
            # One name for the folders: the model card has it.
            tmp_path / name / "run",
            plain=name == "plain",
            model=start_model(kind, attention_dropout=0.1),
            saved=tmp_path / "model",  # adapters name their base model
            trainer={"peft_config": lora(kind) if peft else None, "eval_dataset": rows(kind, 8, seed=5)},
            **config,
        )
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 1e-2
        runs[name] = trainer
    assert_equal_bits(parameters(runs["ours"]), parameters(runs["plain"]))
    assert logged(runs["ours"]) == logged(runs["plain"])
    ours, plain = (file_digests(tmp_path / name / "run") for name in ("ours", "plain"))
    assert {
        f"checkpoint-{step}/{file}" for step in (steps // 2, steps) for file in ("optimizer.pt", "trainer_state.json")
    } <= set(ours)
    assert ours == plain


@pytest.mark.parametrize("kind", MAKE)
def test_no_arguments_mean_trl_defaults(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which transformers refuses without a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainers = []
    for library in (trl, trl_ext):
        model = start_model(kind)
        save_model(model, tokenizer(), "somewhere/tiny")  # DPO and others load the reference from there
        extra = {"reward_funcs": varied_reward} if kind in REWARDED else {}
        extra |= {"teacher_model": tiny_model(seed=1)} if kind == "distillation" else {}
        cls = next(getattr(library, f"{name}Trainer") for name in NAMES if name.lower() == kind)
        trainers.append(cls(model=model, train_dataset=rows(kind, 8), processing_class=tokenizer(), **extra))
    theirs, ours = (trainer.args.to_dict() for trainer in trainers)
    own_fields = set(ours) - set(theirs)
    assert own_fields == {
        "plugins",
        "streams",
        "dataset_columns",
        "nonfinite",
        "rank_check_steps",
        "reset_plugin_state",
        "resume_changes",
        "verify_checkpoint",
        "strict_versions",
        "profile",
    }
    assert {k: v for k, v in ours.items() if k not in own_fields} == theirs
    assert type(trainers[1].args).__module__ == "trl_ext.config"


@pytest.mark.parametrize("config", [trl.SFTConfig, TrainingArguments], ids=["trl.SFTConfig", "TrainingArguments"])
def test_foreign_configs_train_as_in_trl(tmp_path, config):
    settings = {k: v for k, v in COMMON.items() if k not in ("bf16", "activation_checkpointing")} | {"max_steps": 3}
    if config is trl.SFTConfig:
        settings |= {"bf16": False, "activation_checkpointing": False, "completion_only_loss": False}
    finals = []
    for library in (trl, trl_ext):
        torch.manual_seed(0)
        trainer = library.SFTTrainer(
            tiny_model(), config(str(tmp_path), **settings), train_dataset=additions(), processing_class=tokenizer()
        )
        trainer.train()
        finals.append((parameters(trainer), logged(trainer)))
    assert_equal_bits(finals[1][0], finals[0][0])
    assert finals[1][1] == finals[0][1]


def test_evaluation_and_prediction_equal_plain_trl(tmp_path):
    results = []
    for plain in (True, False):
        trainer = make_sft(
            tmp_path / str(plain), plain=plain, trainer={"eval_dataset": {"a": additions(8), "b": additions(4)}}
        )
        results.append((without_timing(trainer.evaluate()), trainer.predict(trainer.eval_dataset["a"]).predictions))
    assert results[0][0] == results[1][0]
    assert {"eval_a_loss", "eval_b_loss"} <= set(results[0][0])
    assert (results[0][1] == results[1][1]).all()


def test_resuming_without_plugins_equals_plain_trl(tmp_path):
    finals = []
    for name in ("plain", "ours"):
        config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        make_sft(tmp_path / name / "run", plain=name == "plain", **config).train()
        trainer = make_sft(tmp_path / name / "run", plain=name == "plain", **config)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "run" / "checkpoint-3"))
        finals.append((parameters(trainer), logged(trainer)))
    assert_equal_bits(finals[1][0], finals[0][0])
    assert finals[1][1] == finals[0][1]


def test_unknown_constructor_arguments_are_refused_as_in_trl(tmp_path):
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'datasett'"):
        make_sft(tmp_path, trainer={"datasett": None})
