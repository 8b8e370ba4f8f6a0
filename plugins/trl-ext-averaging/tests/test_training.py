"""Averages in real runs: what is evaluated, saved, selected, resumed, and what full, LoRA, tied and frozen mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import Recorder, data, trainer
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback
from trl import BEMACallback

from trl_ext.testing import tiny_llama

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # fp32 weights of size 1 against an fp64 oracle, a dozen roundings


def ema_of(path: torch.Tensor, d: float) -> torch.Tensor:
    average = path[0]
    for theta in path[1:]:
        average = d * average + (1 - d) * theta
    return average


def saved(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def history(run, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


# What is evaluated and saved.


def test_the_final_model_is_the_average_and_checkpoints_are_raw(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, ["ema:decay=0.8"], recorder=recorder, save_strategy="steps", save_steps=6)
    run.train()
    run.save_model()
    final, checkpoint, raw = saved(tmp_path), saved(tmp_path / "checkpoint-6"), saved(tmp_path / "raw")
    for name in recorder.trajectory[0]:
        torch.testing.assert_close(final[name].double(), ema_of(recorder.path(name), 0.8), **ROUNDING)
        assert torch.equal(checkpoint[name].double(), recorder.trajectory[-1][name])
        assert torch.equal(raw[name].double(), recorder.trajectory[-1][name])
        assert torch.equal(run.model.get_parameter(name).double(), recorder.trajectory[-1][name])


def test_averaging_leaves_the_training_itself_alone(tmp_path):
    plain, averaged = Recorder(), Recorder()
    trainer(tmp_path / "plain", [], recorder=plain).train()
    trainer(tmp_path / "ema", ["ema"], recorder=averaged, eval_strategy="steps", eval_steps=2).train()
    for before, after in zip(plain.trajectory, averaged.trajectory, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, {"eval_loss": "ema"}),
        ({"deploy": "raw"}, {"eval_loss": "raw"}),
        ({"compare": True}, {"eval_loss": "ema", "eval_raw_loss": "raw"}),
        ({"compare": True, "deploy": "raw"}, {"eval_loss": "raw", "eval_ema_loss": "ema"}),
    ],
)
def test_metrics_are_those_of_the_weights_they_name(tmp_path, options, columns):
    recorder = Recorder()
    spec = {"name": "ema", "decay": 0.8, **options}
    run = trainer(tmp_path, [spec], recorder=recorder, eval_strategy="steps", eval_steps=6)
    run.train()
    bench = trainer(tmp_path / "bench", [])
    expected = {}
    for kind in ("raw", "ema"):
        for name in recorder.trajectory[0]:
            path = recorder.path(name)
            bench.model.get_parameter(name).data.copy_(path[-1] if kind == "raw" else ema_of(path, 0.8))
        expected[kind] = bench.evaluate()["eval_loss"]
    assert abs(expected["raw"] - expected["ema"]) > 1e-2
    logged = {key: history(run, key) for key in ("eval_loss", "eval_raw_loss", "eval_ema_loss")}
    assert {key for key, values in logged.items() if values} == set(columns)
    for column, kind in columns.items():
        assert logged[column] == pytest.approx([expected[kind]], rel=1e-5)  # fp32 forward of nearly equal weights


def test_with_several_data_sets_each_number_names_the_weights_too(tmp_path):
    sets = {"near": data(8), "far": data(8, seed=5)}
    run = trainer(tmp_path, ["ema:decay=0.8,compare=true"])
    run.train()
    run.evaluate(sets)
    evaluations = run.state.log_history[-4:]
    for entry, name in zip(evaluations, ("near", "far", "raw_near", "raw_far"), strict=True):
        assert f"eval_{name}_loss" in entry
        # TRL names its own numbers by no data set, so here by the weights alone.
        weights = "raw_" if name.startswith("raw") else ""
        assert f"eval_{weights}mean_token_accuracy" in entry
        assert weights or not any(key.startswith("eval_raw_") for key in entry)
        assert not weights or "eval_mean_token_accuracy" not in entry


def test_an_exception_in_evaluation_leaves_the_raw_weights(tmp_path):
    class Failing(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise ZeroDivisionError

    recorder = Recorder()
    run = trainer(tmp_path, ["ema:decay=0.8"], recorder=recorder)
    run.train()
    run.add_callback(Failing())
    with pytest.raises(ZeroDivisionError):
        run.evaluate()
    assert all(torch.equal(run.model.get_parameter(n).double(), w) for n, w in recorder.trajectory[-1].items())


# Which checkpoint is best.


def rising_after(run, good: int) -> None:
    """Make the raw weights useless after step `good`, as a diverging run would."""

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > good:
                with torch.no_grad():
                    run.model.lm_head.weight.mul_(-30.0)

    run.add_callback(Diverge())


@pytest.mark.parametrize("metric", ["eval_loss", "eval_raw_loss"])
def test_the_best_checkpoint_is_chosen_by_either_loss_and_brings_its_average(tmp_path, metric):
    recorder = Recorder()
    run = trainer(
        tmp_path,
        ["ema:decay=0.5,compare=true"],
        recorder=recorder,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    rising_after(run, good=4)
    run.train()
    losses = history(run, metric)
    best = 2 * (losses.index(min(losses)) + 1)
    assert best < 6
    assert Path(run.state.best_model_checkpoint).name == f"checkpoint-{best}"
    run.save_model()
    final = saved(tmp_path)
    for name in recorder.trajectory[0]:
        path = recorder.path(name)[: best + 1]
        torch.testing.assert_close(final[name].double(), ema_of(path, 0.5), **ROUNDING)
        assert torch.equal(run.model.get_parameter(name).double(), path[-1])


def test_early_stopping_follows_the_averaged_loss(tmp_path):
    def stopped_at(deploy: str) -> int:
        run = trainer(
            tmp_path / deploy,
            [f"ema:decay=0.9,deploy={deploy}"],
            callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            max_steps=8,
        )
        rising_after(run, good=2)
        run.train()
        losses = history(run, "eval_loss")
        worse = next((i for i in range(1, len(losses)) if losses[i] >= min(losses[:i])), len(losses) - 1)
        assert run.state.global_step == worse + 1
        return worse + 1

    # The raw loss rises at once; the average hides the first bad steps.
    assert stopped_at("raw") < stopped_at("ema")


def test_push_to_hub_uploads_the_average(tmp_path, monkeypatch):
    class Hub:
        """Stands for the network: keeps what would be uploaded."""

        def upload_folder(self, *, folder_path, **kwargs):
            self.weights = saved(Path(folder_path))

    hub, recorder = Hub(), Recorder()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    run = trainer(tmp_path, ["ema:decay=0.8"], recorder=recorder)
    run.hub_model_id = "nobody/nothing"
    run.train()
    run.push_to_hub()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(hub.weights[name].double(), ema_of(recorder.path(name), 0.8), **ROUNDING)
    assert "ema" in (tmp_path / "README.md").read_text()


# Resuming.


@pytest.mark.parametrize(
    "plugin",
    [
        "ema:decay=0.8,warmup=true",
        "bema:every=2",
        "swa:start=1",
        "lawa:k=2,every=2",
        "wise-ft:alpha=0.3",
    ],
)
def test_an_interrupted_run_ends_with_the_same_average(tmp_path, plugin):
    def run(folder):
        return trainer(tmp_path / folder, [plugin], save_strategy="steps", save_steps=1, save_total_limit=None)

    whole = run("whole")
    whole.train()
    whole.save_model()
    for cut in (1, 4):
        resumed = run(f"resumed-{cut}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
        resumed.save_model()
        expected, found = saved(tmp_path / "whole"), saved(tmp_path / f"resumed-{cut}")
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# Kinds of models.


def test_bema_equals_trls_callback(tmp_path):
    callback = BEMACallback(update_freq=2, update_after=2)
    run = trainer(tmp_path, ["bema:start=2,every=2"], callbacks=[callback])
    run.train()
    run.save_model()
    ours, theirs = saved(tmp_path), saved(tmp_path / "bema")
    for name in ours:  # the same operations in another order: 3 roundings each
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours["lm_head.weight"], run.model.lm_head.weight)


def bema_of(path: torch.Tensor, every: int) -> torch.Tensor:
    ema, last = path[0], len(path) - 1
    for t in range(every, last + 1, every):
        ema = (1 - (10 + t) ** -0.5) * ema + (10 + t) ** -0.5 * path[t]
    return ema + (10 + last) ** -0.2 * (path[last] - path[0])


def test_bema_works_under_lora_where_trls_callback_fails(tmp_path):
    recorder, lora = Recorder(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(TypeError):
        trainer(tmp_path / "trl", [], callbacks=[BEMACallback()], peft_config=lora).train()
    run = trainer(tmp_path, ["bema:every=2"], recorder=recorder, peft_config=lora)
    run.train()
    run.save_model()
    adapter = saved(tmp_path, "adapter_model.safetensors")
    assert len(adapter) == len(recorder.trajectory[0]) == 8
    for name in recorder.trajectory[0]:
        expected = bema_of(recorder.path(name), 2)
        torch.testing.assert_close(adapter[name.replace(".default", "")].double(), expected, **ROUNDING)


def test_bema_works_with_frozen_parameters_where_trls_callback_fails(tmp_path):
    def frozen_embedding():
        model = tiny_llama(hidden=16)
        model.model.embed_tokens.requires_grad_(False)
        return model

    with pytest.raises((RuntimeError, ValueError)):
        trainer(tmp_path / "trl", [], model=frozen_embedding(), callbacks=[BEMACallback(update_freq=2)]).train()
    recorder = Recorder()
    run = trainer(tmp_path, ["bema:every=2"], recorder=recorder, model=frozen_embedding())
    run.train()
    run.save_model()
    final = saved(tmp_path)
    assert torch.equal(final["model.embed_tokens.weight"], frozen_embedding().model.embed_tokens.weight)
    torch.testing.assert_close(
        final["lm_head.weight"].double(), bema_of(recorder.path("lm_head.weight"), 2), **ROUNDING
    )


def test_tied_weights_are_averaged_once_and_stay_tied(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, ["ema:decay=0.8"], recorder=recorder, model=tiny_llama(hidden=16, tie=True))
    run.train()
    with run.ext_swaps.deployed()[""]:
        assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = ema_of(recorder.path("model.embed_tokens.weight"), 0.8)
    torch.testing.assert_close(loaded.lm_head.weight.double(), expected, **ROUNDING)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_bf16_training_moves_the_average_at_decay_0999(tmp_path):
    model, recorder = tiny_llama(hidden=16).to(torch.bfloat16), Recorder()
    run = trainer(tmp_path, ["ema"], recorder=recorder, model=model, save_strategy="steps", save_steps=6)
    run.train()
    state = saved(tmp_path / "checkpoint-6/trl_ext/ema", "state.safetensors")
    path = recorder.path("lm_head.weight")
    moved, expected = state["ema/lm_head.weight"].double() - path[0], ema_of(path, 0.999) - path[0]
    assert expected.abs().max() > 0
    in_bf16 = path[0].to(torch.bfloat16)
    for theta in path[1:]:
        in_bf16.lerp_(theta.to(torch.bfloat16), 0.001)
    assert (in_bf16.double() == path[0]).double().mean() > 0.3  # the trap: much of it would not have moved at all
    assert (moved != 0).double().mean() > 0.99
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)  # fp32 at weights of 0.1: steps of 7e-9
