"""DPO and KTO: the reference stays what TRL makes it, auxiliary losses are means, and what means nothing is refused."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Nll, Plugin, assert_close, assert_equal_bits
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.plugins import activate
from trl_ext.records import AuxiliaryLoss, StreamRequest
from trl_ext.testing.runs import MAKE, additions, lora, parameters, rows, start_model, tiny_model, without_timing

SHIFT = 0.1


@dataclass(eq=False)
class Shifted(Plugin):
    """Deploys the trained weights plus a constant, which no reference can pass for."""

    names: tuple[str, ...] = ()

    @hookimpl
    def setup(self, context):
        self.names = context.names

    @hookimpl
    @contextmanager
    def deployed_weights(self, weights):
        raw = [w.clone() for w in weights.local()]
        torch._foreach_add_(weights.local(), SHIFT)
        try:
            yield
        finally:
            torch._foreach_copy_(weights.local(), raw)


def adapted() -> Any:
    """A model whose adapter has learnt something before: TRL keeps a copy of it as the adapter "ref"."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


REFERENCES: dict[str, dict[str, Any]] = {
    "a model of its own": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "the adapter off": {"peft_config": True},
    "the adapter off, precomputed": {"peft_config": True, "precompute_ref_log_probs": True},
    "a copy of the adapter": {"model": adapted},
}


def build(kind: str, folder: Path, case: str, **options: Any) -> Any:
    config = {**REFERENCES[case]}
    peft, model = config.pop("peft_config", False), config.pop("model", tiny_model)
    trainer = {"eval_dataset": rows(kind, 8, seed=5), "peft_config": lora() if peft else None}
    return MAKE[kind](folder / "run", model=model(), trainer=trainer, max_steps=2, **config, **options)


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_stays_trl_s_under_deployed_weights(tmp_path: Path, kind: str, case: str) -> None:
    """The oracle is TRL's own trainer, which is handed the weights that are deployed, and evaluates them."""
    plugin = Shifted()
    ours = build(kind, tmp_path, case, plugins=[plugin])
    reference = None if ours.ref_model is None else {n: p.clone() for n, p in ours.ref_model.named_parameters()}
    ours.train()
    assert not [name for name in plugin.names if ".ref." in name]
    oracle = build(kind, tmp_path, case, plain=True)
    with torch.no_grad():
        for name, parameter in oracle.model.named_parameters():
            parameter.copy_(parameters(ours)[name])
    raw = without_timing(oracle.evaluate())
    with torch.no_grad():
        for name, parameter in oracle.model.named_parameters():
            if name in plugin.names:
                parameter.add_(SHIFT)
    apart = ("eval_num_tokens", "epoch")  # of the training, which the oracle has not had
    found = without_timing(ours.evaluate(), apart)
    assert found == without_timing(oracle.evaluate(), apart)
    assert found["eval_loss"] != raw["eval_loss"]
    if reference is not None:
        assert_equal_bits(dict(ours.ref_model.named_parameters()), reference)


# -- auxiliary losses ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Means(Plugin):
    """The negative log-likelihood as each kind of mean."""

    @hookimpl
    def auxiliary_losses(self, micro_step):
        nll = torch.where(micro_step.mask, -micro_step.log_probs, 0)
        per_row = nll.sum(1) / micro_step.mask.sum(1)
        return {
            "token": AuxiliaryLoss(nll.sum(), "token"),
            "sequence": AuxiliaryLoss(per_row.sum(), "sequence"),
            "batch": AuxiliaryLoss(per_row.mean(), "batch"),
        }


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant", "max_steps": 1}
KTO = {"kto": {"loss_type": "apo_zero_unpaired"}}  # KTO's own estimates a KL term within each micro-batch


def means_by_logits(kind: str, trainer: Any, model: Any) -> list[Tensor]:
    """() each: the three means over all rows of the data set, from the model's whole logits."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    mask = batch["completion_mask"][:, 1:]
    per_row = (nll * mask).sum(1) / mask.sum(1)
    return [(nll * mask).sum() / mask.sum(), per_row.mean(), per_row.mean()]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_auxiliary_losses_are_means_over_the_window(tmp_path: Path, kind: str, accumulation: int) -> None:
    """One step on all eight rows: the terms logged, and the gradient beside that of plain TRL, from whole logits."""
    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    common = {"train": rows(kind, 8), **cut, **SGD, **KTO.get(kind, {})}
    plain = MAKE[kind](tmp_path / "plain" / "run", plain=True, **common)
    plain.train()
    ours = MAKE[kind](tmp_path / "ours" / "run", plugins=[Means()], **common)
    model = start_model(kind)
    means = means_by_logits(kind, ours, model)
    ours.train()
    for name, mean in zip(("token", "sequence", "batch"), means, strict=True):
        # fp32 sums of 8 or 16 rows in another order
        assert ours.state.log_history[0][f"Means/{name}"] == pytest.approx(float(mean), rel=1e-5)
    sum(means).backward()
    expected = {
        name: value - 0.1 * dict(model.named_parameters())[name].grad for name, value in parameters(plain).items()
    }
    assert_close(parameters(ours), expected, rtol=1e-5, atol=1e-6)  # 0.1 times the rounding of gradients of size 1
    with pytest.raises(AssertionError):
        assert_close(parameters(ours), parameters(plain), rtol=1e-5, atol=1e-6)


# -- what means nothing ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Wants(Plugin):
    optional: bool = False

    @hookimpl
    def streams(self):
        return [StreamRequest("general", optional=self.optional)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        pass


def test_streams_are_refused_where_there_is_no_language_model_head(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"plugin 'Wants' asks for the stream 'general', .*; remove the plugin"
    ):
        MAKE["reward"](tmp_path / "run", plugins=[Wants()], streams={"general": additions(8)})
    with pytest.raises(ConfigurationError, match=r"streams: general is given, .* reward has no .*; remove it"):
        MAKE["reward"](tmp_path / "run", plugins=[Wants(optional=True)], streams={"general": additions(8)})
    MAKE["reward"](tmp_path / "run", plugins=[Wants(optional=True)])


@pytest.mark.parametrize("kind", ["dpo", "kto", "rloo", "distillation"])
def test_an_objective_needs_a_stream_to_act_on(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'Nll' owns the loss per token of supervised data, and this .* none"):
        MAKE[kind](tmp_path / "run", plugins=[Nll()])


@pytest.mark.parametrize(
    ("plugin", "kind", "hook"),
    [
        ("pg", "dpo", "is for the trainers grpo, and this is dpo"),
        ("rollout-filter", "rloo", "is for the trainers grpo, and this is rloo"),
        (
            "gradient-surgery",
            "reward",
            "is for the trainers sft, grpo, dpo, kto, rloo, distillation, and this is reward",
        ),
    ],
)
def test_a_plugin_for_other_trainers_is_refused(plugin: str, kind: str, hook: str) -> None:
    with pytest.raises(ConfigurationError, match=hook):
        activate([plugin], trainer=kind)


@pytest.mark.parametrize("hook", ["advantages", "policy_loss", "sample_weights", "prompt_order", "sampling_weights"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
def test_a_plugin_whose_hooks_the_trainer_never_calls_is_refused(kind: str, hook: str) -> None:
    plugin = type("Acts", (Plugin,), {hook: hookimpl(lambda self: None)})()
    with pytest.raises(ConfigurationError, match=f"acts only through {hook}, which {kind} never calls"):
        activate([], [plugin], trainer=kind)
