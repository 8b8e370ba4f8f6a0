"""Where reference log-probabilities come from, that they stay what they were, and what a resumed run makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from trl_ext_objectives.iw_sft import IwSFT
from trl_ext_objectives.live_reference import StartModel
from trl_ext_objectives.psft import PSFT
from trl_ext_probing.commands import capability

from trl_ext import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.records import RunDescription, StreamRequest, TokenRecord
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

datasets.disable_progress_bars()
ARGS: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")


def train(
    folder: Path, instances: list[Any], model: Any = None, resume: str | None = None, **options: Any
) -> SFTTrainer:
    torch.manual_seed(0)
    lora = options.pop("lora", False)
    trainer = SFTTrainer(
        model=tiny_llama(hidden=16, layers=1) if model is None else model,
        args=SFTConfig(str(folder), **{**ARGS, **options}),
        train_dataset=Addition(digits=2).dataset(32),
        processing_class=tiny_tokenizer(),
        peft_config=LORA if lora else None,
        plugins=instances,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Noting(IwSFT):
    """Keeps what the reference and the model said of each batch."""

    seen: list[tuple[Tensor, TokenRecord]]

    def reference_log_probs(self, tokens: TokenRecord) -> Tensor:
        found = super().reference_log_probs(tokens)
        self.seen = [*getattr(self, "seen", []), (found, tokens)]
        return found


def expected_log_probs(model: nn.Module, tokens: TokenRecord) -> Tensor:
    """Of the labels, from whole logits."""
    inputs = {k: tokens.inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        log_softmax = model(**inputs).logits[:, :-1].log_softmax(-1)
    labels = tokens.inputs["labels"][:, 1:].clamp(min=0)
    return log_softmax.gather(-1, labels[..., None])[..., 0].masked_fill(~tokens.mask, 0)


@pytest.mark.parametrize(
    ("reference", "lora"),
    [*((reference, lora) for reference in ("start", "model", "cache") for lora in (False, True)), ("base", True)],
)
def test_reference_is_the_start_model_throughout(reference: str, lora: bool, tmp_path: Path) -> None:
    """The four sources of the same model agree with its whole logits at every step, dropout in training or not."""
    start = tiny_llama(hidden=16, layers=1)
    path = save_model(start, tiny_tokenizer(), tmp_path / "start")
    spec = {"model": f"model:{path}", "cache": f"cache:{tmp_path / 'cache'}"}.get(reference, reference)
    if reference == "cache":
        with (tmp_path / "data.jsonl").open("w") as file:
            for row in Addition(digits=2).dataset(32):
                file.write(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n")
        data = str(tmp_path / "data.jsonl")
        capability(model=[path], dataset=data, output=tmp_path / "probe", log_probs=tmp_path / "cache", device="cpu")
    noting = Noting(spec)
    train(tmp_path / "run", [noting], lora=lora)
    assert len(noting.seen) == 4
    for found, tokens in noting.seen:
        assert not found.requires_grad
        torch.testing.assert_close(found, expected_log_probs(start, tokens), rtol=1e-5, atol=1e-6)
    # And the model has moved away from it, so that the agreement means something.
    last, tokens = noting.seen[-1]
    assert (last - tokens.log_probs.detach()).abs().max() > 1e-3


def test_live_reference_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    """An extra forward under swapped weights must not touch gradients, dropout's random state or module modes."""

    class Onlooker(IwSFT):
        @hookimpl
        def per_token_loss(self, tokens: TokenRecord) -> Tensor:
            before = [m.training for m in self._reference.model.modules()]
            self.reference_log_probs(tokens)
            assert before == [m.training for m in self._reference.model.modules()]
            return -tokens.log_probs

    plain = train(tmp_path / "plain", [], lora=True)
    for reference in ("start", "base"):
        ours = train(tmp_path / reference, [Onlooker(reference)], lora=True)
        for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_swap_survives_an_error_inside() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    reference = StartModel()
    reference._parameters, reference._names = [parameter], ["p"]
    reference.refresh()
    parameter.data += 1
    with pytest.raises(RuntimeError, match="inside"), reference.active():  # noqa: PT012
        assert parameter.tolist() == [0, 0]
        raise RuntimeError("inside")
    assert parameter.tolist() == [1, 1]


def test_psft_refreshes_every_k_steps(tmp_path: Path) -> None:
    class NotingPSFT(PSFT):
        olds: list[Tensor]

        @hookimpl
        def per_token_loss(self, tokens: TokenRecord) -> Tensor:
            self.olds = [*getattr(self, "olds", []), self._old._frozen[0].clone()]
            return super().per_token_loss(tokens)

    psft = NotingPSFT(high=0.01, refresh_every=2)
    trainer = train(tmp_path, [psft], max_steps=5)
    same = [torch.equal(a, b) for a, b in zip(psft.olds, psft.olds[1:], strict=False)]
    assert same == [True, False, True, False]
    shares = [entry["NotingPSFT/kept_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares[0] == shares[2] == shares[4] == 1  # right after a refresh no ratio is clipped
    assert shares[1] < 1
    assert shares[3] < 1


@pytest.mark.parametrize("objective", ["psft:refresh_every=2", "iw-sft", "mixture:first=psft,second=nll"])
def test_resumed_run_ends_with_the_same_bytes(objective: str, tmp_path: Path) -> None:
    """Saved at step 3, between two refreshes: the old model has to come back with the run."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "plugins": [objective]}
    whole = train(tmp_path / "run", [], **options)
    resumed = train(tmp_path / "run", [], resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("iw-sft:reference=base", "reference='base' turns PEFT adapters off, and this run has none"),
        ("iw-sft:reference=cache:absent.safetensors", "there is no file 'absent.safetensors'"),
        ("rho1:reference=cache:absent.safetensors", "there is no file 'absent.safetensors'"),
        ("threshold:quantile_of=absent.json", r"absent\.json.*trl-ext probe capability"),
        ("auto:probe=absent.json", r"absent\.json.*trl-ext probe capability"),
        ("mixture:first=iw-sft:reference=base,second=nll", "turns PEFT adapters off"),
    ],
)
def test_absent_reference_is_refused_before_the_model_loads(plugin: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SFTTrainer(
            model="no-such-model",
            args=SFTConfig(str(tmp_path), plugins=[plugin], **ARGS),
            train_dataset=Addition().dataset(4),
        )


def test_reference_of_another_vocabulary_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    path = save_model(tiny_llama(260, hidden=16, layers=1), tokenizer, tmp_path / "other")
    with pytest.raises(PluginError, match=r"vocabulary of 260 tokens, not the mapping of the trained model's 259"):
        train(tmp_path / "run", [IwSFT(f"model:{path}")])


def test_evaluating_before_training_says_what_to_do(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_llama(hidden=16, layers=1),
        args=SFTConfig(str(tmp_path), plugins=["iw-sft"], **ARGS),
        train_dataset=Addition().dataset(8),
        eval_dataset=Addition().dataset(8),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(PluginError, match=r"call train\(\) before evaluate\(\)"):
        trainer.evaluate()


def test_gem_evaluates_plain_nll_at_temperature_one(tmp_path: Path) -> None:
    model = tiny_llama(hidden=16, layers=1)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), plugins=["gem"], **ARGS),
        train_dataset=Addition().dataset(32),
        eval_dataset=Addition().dataset(4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    fused = vars(model).pop("forward")
    rows = [trainer.data_collator([row]) for row in trainer.eval_dataset]
    log_probs = []
    for row in rows:
        labels = row["labels"][:, 1:]
        logits = model(input_ids=row["input_ids"]).logits[:, :-1].log_softmax(-1)
        log_probs.append(logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100])
    assert metrics["eval_loss"] == pytest.approx(-torch.cat(log_probs).mean().item(), rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    model.forward = fused
    trainer.train()  # a second run must not temper twice
    assert len(model.model._forward_hooks) == 1


# -- SFT streams in GRPO ---------------------------------------------------------------------------------------------


class Demonstrations:
    """Asks for one SFT stream and keeps its gradient's numbers."""

    requires_api = "1"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.nlls: list[float] = []

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        return [StreamRequest("demonstrations", batch_size=4)]

    @hookimpl
    def gradients_ready(self, gradients: Any, streams: Any) -> None:
        self.losses.append(streams["demonstrations"].loss)
        self.nlls.append(streams["demonstrations"].nll)


def grpo(folder: Path, plugin: str, **options: Any) -> Demonstrations:
    torch.manual_seed(0)
    model = tiny_llama(hidden=16, layers=1)
    save_model(model, tiny_tokenizer(), folder / "model")
    demonstrations = Demonstrations()
    args = {**ARGS, "num_generations": 2, "max_completion_length": 4, "max_steps": 2, "plugins": [plugin], **options}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [float(sum(c.encode())) for c in completions],
        args=GRPOConfig(str(folder), **args),
        train_dataset=Addition().dataset(16, "prompt_only"),
        processing_class=tiny_tokenizer(),
        plugins=[demonstrations],
        streams={"demonstrations": Addition().dataset(16)},
    )
    trainer.train()
    return demonstrations


@pytest.mark.parametrize(
    "plugin", ["power:alpha=1", "deft", "eaft", "talr", "psft", "iw-sft:temperature=0.1", "chord-phi"]
)
def test_objective_shapes_the_sft_stream_of_grpo(plugin: str, tmp_path: Path) -> None:
    found = grpo(tmp_path, plugin)
    assert len(found.losses) == 2
    # At the first step the untrained model gives every token about 1/259, psft's ratio and iw-sft's weight are 1.
    first, nll = found.losses[0], found.nlls[0]
    p = 1 / 259
    expected = {
        "power": 1 - p,
        "deft": nll,
        "eaft": nll,
        "talr": nll / 2.718,
        "psft": -1.0,
        "iw-sft": nll,
        "chord-phi": p * (1 - p) * nll,
    }[plugin.split(":")[0]]
    assert first == pytest.approx(expected, rel=0.05)
    if plugin == "iw-sft:temperature=0.1":
        assert found.losses[1] != pytest.approx(found.nlls[1], rel=1e-4)


@pytest.mark.parametrize("plugin", ["gem", "auto", "asft"])
def test_objectives_that_cannot_work_in_grpo_are_refused(plugin: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"grpo|GRPO"):
        grpo(tmp_path, plugin)


@pytest.mark.parametrize("plugin", [PSFT(), *(IwSFT(reference=kind) for kind in ("start", "base", "model:PATH"))])
def test_deepspeed_takes_a_cache_alone(plugin: Any) -> None:
    run = RunDescription("sft", SFTConfig, "model", ("plugin",), (), (), peft=True, world_size=2, sharding="deepspeed")
    with pytest.raises(ValueError, match="has not been tried under DeepSpeed; use reference='cache:PATH'"):
        plugin.check(run)


def test_a_live_reference_is_taken_at_temperature_one_whatever_grpo_samples_at(tmp_path: Path) -> None:
    """iw-sft weighs by p / p of the reference, which is 1 at the first step."""
    found = grpo(tmp_path, "iw-sft", temperature=0.5)
    assert found.losses[0] == pytest.approx(found.nlls[0], rel=1e-5)  # fp32 rounding
