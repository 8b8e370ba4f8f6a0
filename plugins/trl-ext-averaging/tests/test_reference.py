"""GRPO: the average as the reference policy of the KL term."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import Recorder
from trajectories import Recorded, context_of, play, trajectory
from trl_ext_averaging import Ema

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer


def distinct_characters(completions, **kwargs):
    """A reward that varies within groups."""
    return [float(len(set(text))) for text in completions]


def grpo(output_dir, plugin, model, recorder=None, **config):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "beta": 0.1,
        "learning_rate": 1e-1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **config,
    }
    return GRPOTrainer(
        model,
        distinct_characters,
        args=GRPOConfig(str(output_dir), plugins=[plugin], **settings),
        train_dataset=Addition().dataset(16, kind="prompt_only"),
        processing_class=tiny_tokenizer(),
        plugins=[recorder] if recorder else None,
    )


def trained_adapter():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny_llama(hidden=16), lora)


def ema_of(path, d):
    average = path[0]
    for theta in path[1:]:
        average = d * average + (1 - d) * theta
    return average


def model_on_disk(folder):
    """TRL loads the reference of a full fine-tuning from the place that the policy came from."""
    return save_model(tiny_llama(hidden=16), tiny_tokenizer(), folder / "policy")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_reference_follows_the_average(tmp_path, kind):
    recorder = Recorder()
    policy = model_on_disk(tmp_path) if kind == "full" else trained_adapter()
    run = grpo(tmp_path, "ema:decay=0.6,reference=ema,deploy=raw", policy, recorder)
    run.train()
    for name in recorder.trajectory[0]:
        path = recorder.path(name)
        found = (run.ref_model if kind == "full" else run.model).get_parameter(name.replace(".default.", ".ref."))
        torch.testing.assert_close(found.double(), ema_of(path, 0.6), rtol=1e-5, atol=1e-6)  # fp32 against fp64
    assert not torch.equal(path[0], path[-1])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reference_that_follows_at_once_makes_the_kl_term_vanish(tmp_path, kind):
    def kl(decay: float) -> float:
        policy = model_on_disk(tmp_path) if kind == "full" else trained_adapter()
        run = grpo(tmp_path, f"ema:decay={decay},reference=ema", policy)
        run.train()
        return sum(entry["kl"] for entry in run.state.log_history if "kl" in entry)

    assert kl(0.0) == pytest.approx(0, abs=1e-6)  # the reference is the policy
    assert kl(0.99) > 1e-3


def test_the_reference_model_follows_the_average_and_resumes_with_it():
    path, d = trajectory(6), 0.7
    model, reference = Recorded(), Recorded()

    def started(at: int) -> Ema:
        model.fill(path[at])
        reference.fill(path[0])
        plugin = Ema(decay=[0.9, d], reference=f"ema_{d}")
        plugin.setup(replace(context_of(model), reference=reference))
        return plugin

    plugin = started(at=0)
    play(plugin, model, path, range(1, 5))
    torch.testing.assert_close(reference.flat(), ema_of(path[:5], d), rtol=0, atol=1e-12)  # fp64
    resumed = started(at=4)
    resumed.load_state_dict(plugin.state_dict())
    torch.testing.assert_close(reference.flat(), ema_of(path[:5], d), rtol=0, atol=1e-12)
    play(resumed, model, path, range(5, 7))
    torch.testing.assert_close(reference.flat(), ema_of(path, d), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"beta": 0.0}, "beta above 0"), ({"sync_ref_model": True}, "sync_ref_model=True")],
)
def test_runs_without_a_reference_of_their_own_are_refused(tmp_path, config, message):
    with pytest.raises(ConfigurationError, match=message):
        grpo(tmp_path, "ema:reference=ema", tiny_llama(hidden=16), **config)


def test_a_fresh_adapter_is_refused(tmp_path):
    context = context_of(trained_adapter())
    with pytest.raises(ConfigurationError, match="start from a saved adapter"):
        Ema(reference="ema").setup(context)
