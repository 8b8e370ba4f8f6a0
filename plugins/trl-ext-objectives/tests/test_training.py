"""Every objective in real runs: two optimiser steps of `SFTTrainer` against the same steps on full logits, by hand.

The hand-made steps take the micro-batches that the trainer saw, build whole logits with the plain model, give the
objective a record made from them (its formula has its own tests), and divide as the contract says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from trl_ext_objectives.asft import ASFT
from trl_ext_objectives.composite import build_objective
from trl_ext_objectives.eaft import EAFT

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.records import MicroStep, TokenRecord
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_moe, tiny_tokenizer

MakeRecord = Callable[..., TokenRecord]
datasets.disable_progress_bars()
LEARNING_RATE = 0.5  # of plain SGD: two steps move the parameters by some 1e-2

OBJECTIVES = {
    "nll": "nll",
    "power": "power:alpha=linear:0.5:2",
    "threshold": "threshold:q=0.004,normalization=valid",
    "threshold-kept": "threshold:q=0.004,loss=1-p,normalization=kept",
    "log1mp": "log1mp",
    "focal": "focal",
    "huber": "huber:delta=0.997",
    "dft": "dft",
    "eaft": "eaft:exponent=2",
    "eaft-whole": "eaft:support=300,gate=whole",
    "deft": "deft",
    "talr": "talr",
    "entropy": "entropy:beta=0.3",
    "idft": "idft",
    "chord-phi": "chord-phi",
    "gem": "gem",
    "gem-linear": "gem:h=linear",
    "psft": "psft",
    "iw-sft": "iw-sft:temperature=20",
    "rho1": "rho1:reference=model:{other}",
    "asft": "asft:reference=model:{other},beta=0.5",
    "asft-start": "asft:beta=0.5",
    "mixture": "mixture:first=deft,second=iw-sft,weight=cosine:0.2:0.8",
    "auto": "auto",
}
# Of each kind of need one: nothing, another fused output, a differentiable entropy, a sample's extent, a denominator,
# hidden states and a reference, hidden states alone, a change of the model's forward.
KINDS = ("power", "deft", "entropy", "iw-sft", "threshold-kept", "asft-start", "eaft", "gem")


@dataclass
class Case:
    """A way to train."""

    model: Callable[[], nn.Module] = lambda: tiny_llama(hidden=16, layers=1)
    kind: str = "prompt_completion"
    lora: bool = False
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "accumulation": Case(config={"gradient_accumulation_steps": 3}),
    "lora": Case(lora=True),
    "packing": Case(config={"packing": True, "max_length": 32, "per_device_train_batch_size": 2}),
    "padding-free": Case(config={"padding_free": True, "max_length": None}),
    "all-tokens": Case(config={"completion_only_loss": False}),
    "bf16": Case(config={"bf16": True}),
    "moe": Case(lambda: tiny_moe(hidden=16, layers=1), config={"gradient_accumulation_steps": 2}),
    "checkpointing": Case(lambda: tiny_llama(hidden=16, layers=2), config={"activation_checkpointing": True}),
}


def _cells() -> Iterator[Any]:
    for case in CASES:
        for name in OBJECTIVES:
            quick = case == "accumulation" or name in KINDS
            yield pytest.param(name, case, id=f"{name}-{case}", marks=() if quick else pytest.mark.slow)


@dataclass(eq=False)
class Spy:
    """Keeps the micro-batches that the trainer sees."""

    requires_api = "1"
    batches: list[dict[str, Any]] = field(default_factory=list)

    @hookimpl
    def auxiliary_losses(self, micro_step: MicroStep) -> dict[str, Any]:
        self.batches.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in micro_step.inputs.items()})
        return {}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same vocabulary."""
    model = tiny_llama(hidden=16, layers=1, seed=5)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # sure enough of itself to differ from the trained one
    return save_model(model, tiny_tokenizer(), tmp_path_factory.mktemp("other"))


def make_trainer(folder: Path, case: Case, plugins: list[Any], **config: Any) -> SFTTrainer:
    torch.manual_seed(0)
    args = {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        **case.config,
        **config,
    }
    return SFTTrainer(
        model=case.model(),
        args=SFTConfig(str(folder), **args),
        train_dataset=Addition(digits=3).dataset(24, case.kind),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        if case.lora
        else None,
        plugins=plugins,
    )


def randomize_adapters(model: nn.Module) -> None:
    """LoRA starts with a zero product, where half of its gradients are zero too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def full_logits(model: nn.Module, batch: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) that predict the labels, and the MoE loss; under the trainer's autocast."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    routed = batch.get("output_router_logits") and hasattr(model.config, "output_router_logits")
    moe = {"output_router_logits": True} if routed else {}
    with torch.autocast("cpu", torch.bfloat16) if case.config.get("bf16") else nullcontext():
        outputs = model(**inputs, **moe, use_cache=False)
    return outputs.logits[:, :-1].float(), outputs.aux_loss if moe else torch.zeros(())


def by_hand(
    spec: str, model: nn.Module, windows: list[list[dict[str, Any]]], case: Case, reference: nn.Module, make: MakeRecord
) -> list[float]:
    """Train a model on the windows with whole logits, and give the loss of each step."""
    objective, losses = build_objective(spec, "test"), []
    for step, window in enumerate(windows):
        count = sum((b["labels"][:, 1:] != -100).sum() for b in window)
        total = torch.zeros(())
        for batch in window:
            labels = batch["labels"][:, 1:]
            mask, safe = labels != -100, labels.clamp(min=0)
            logits, aux = full_logits(model, batch, case)
            with torch.no_grad():
                ref_logits, _ = full_logits(reference, batch, case)
                ref = ref_logits.log_softmax(-1)
            tokens = make(
                logits / objective.head_temperature,
                safe,
                mask,
                denominator=count.float(),
                accumulation_steps=len(window),
                progress=step / len(windows),
                reference_log_probs=ref.gather(-1, safe[..., None])[..., 0].masked_fill(~mask, 0),
                inputs={k: v for k, v in batch.items() if isinstance(v, Tensor)},
            )
            if isinstance(objective, ASFT):
                kl = (ref.exp() * (ref - logits.log_softmax(-1))).sum(-1)
                loss = -tokens.log_probs.exp().detach() * tokens.log_probs + objective.beta * kl
            else:
                loss = objective.per_token_loss(tokens)
            total = total + torch.where(mask, loss, 0.0).sum() / count
            total = total + model.config.get_text_config().to_dict().get("router_aux_loss_coef", 0) * aux / len(window)
        model.zero_grad()
        total.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= LEARNING_RATE * parameter.grad
        losses.append(total.item())
    return losses


@pytest.mark.parametrize(("name", "case"), list(_cells()))
def test_two_steps_equal_those_by_hand(name: str, case: str, tmp_path: Path, other: str, record: MakeRecord) -> None:
    how, spec, spy = CASES[case], OBJECTIVES[name].format(other=other), Spy()
    trainer = make_trainer(tmp_path, how, [build_objective(spec, "test"), spy])
    randomize_adapters(trainer.model)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    trained = copy.deepcopy(trainer.model.state_dict())

    # From here on the trainer's model is only a model: its own forward, with full logits.
    model = trainer.model
    model.load_state_dict(start)
    frozen = tiny_llama(hidden=16, layers=1, seed=5) if "{other}" in OBJECTIVES[name] else copy.deepcopy(model)
    if "{other}" in OBJECTIVES[name]:
        frozen.lm_head.weight.data.mul_(20)
    for module in (*model.modules(), *frozen.modules()):
        vars(module).pop("forward", None)  # TRL's head, which in a copy would still be that of the original
    model.train()
    steps = how.config.get("gradient_accumulation_steps", 1)
    windows = [spy.batches[i : i + steps] for i in range(0, len(spy.batches), steps)]
    losses = by_hand(spec, model, windows, how, frozen.eval(), record)

    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    bf16 = how.config.get("bf16", False)  # three digits; the fused head rounds its products elsewhere than the model
    assert logged == pytest.approx(losses, rel=2e-2 if bf16 else 2e-5, abs=1e-6)
    expected = model.state_dict()
    moved = torch.cat([(trained[k] - start[k]).flatten() for k in start])
    wrong = torch.cat([(trained[k] - expected[k]).flatten() for k in start])
    assert moved.norm() > 1e-6
    # fp32: sums over tokens in another order, then a second step from slightly different parameters. The weight of idft
    # is exp(g log p), which multiplies the rounding of g by |log p|, 5.6 here.
    rounding = 5e-2 if bf16 else 1e-4
    assert wrong.norm() / moved.norm() < rounding * (5.6 if name == "idft" else 1)


@dataclass(eq=False)
class NotingEAFT(EAFT):
    """Keeps the loss and the record of each batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[Tensor, TokenRecord]] = []

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        self.seen.append((super().per_token_loss(tokens), tokens))
        return self.seen[-1][0]


@pytest.mark.parametrize("case", ["lora", "padding-free"])
def test_paper_gate_is_that_of_the_models_whole_logits(case: str, tmp_path: Path) -> None:
    """On a model with opinions, where the gate of 20 tokens is far from 1 and from that of the whole vocabulary."""

    def model() -> nn.Module:
        opinionated = tiny_llama(hidden=16, layers=1, seed=5)
        opinionated.lm_head.weight.data.mul_(30)
        return opinionated

    objective = NotingEAFT()
    trainer = make_trainer(tmp_path, replace(CASES[case], model=model), [objective], learning_rate=0.0)
    trainer.train()
    assert len(objective.seen) == 2
    for loss, tokens in objective.seen:
        with torch.no_grad():
            log_softmax = full_logits(trainer.model, dict(tokens.inputs), CASES[case])[0].double().log_softmax(-1)
        top = log_softmax.exp().topk(20).values
        top = top / top.sum(-1, keepdim=True)
        gate = -(top * top.log()).sum(-1) / math.log(20)
        whole = -(log_softmax.exp() * log_softmax).sum(-1) / math.log(20)
        assert ((gate - whole.clamp(max=1))[tokens.mask].abs() > 0.05).float().mean() > 0.3
        expected = torch.where(tokens.mask, -gate * tokens.log_probs.double(), 0.0)
        # fp32 logits of up to 10 are known to some 1e-6, and the entropy to as much; the loss is a gate times up to 20.
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
