"""Runs that one rank and two ranks make alike: `batch` rows in total a micro-batch, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import Plugin
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.hookspecs import HOOKS
from trl_ext.records import AuxiliaryLoss, SampleWeights, StreamRequest
from trl_ext.testing.runs import MAKE, additions, logged, make_grpo, make_sft, parameters, tiny_model

# Plain SGD: what differs stays of the size of fp32's rounding.
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 1.0, "ddp_timeout": 60}
STREAMS = {"general": lambda: additions(11, seed=3), "target": lambda: additions(10, "language_modeling", seed=4)}


@dataclass(eq=False)
class Everything(Plugin):
    """Uses every hook of an optimiser step in ways whose result does not depend on how rows are spread over ranks."""

    share: int = 4
    """Stream rows a rank."""
    scalars: list[list[float]] = field(default_factory=list)
    streams_seen: list[list[float]] = field(default_factory=list)

    @hookimpl
    def streams(self):
        return [
            StreamRequest("general", batch_size=self.share),
            StreamRequest("target", batch_size=self.share, when="before"),
        ]

    @hookimpl
    def auxiliary_losses(self, micro_step):
        squares = torch.where(micro_step.mask, micro_step.log_probs, 0.0).square()
        rows = squares.sum(1) / micro_step.mask.sum(1).clamp(min=1)
        return {
            "by token": AuxiliaryLoss(0.01 * squares.sum(), "token"),
            "by sequence": AuxiliaryLoss(0.02 * rows.sum(), "sequence"),
            "by batch": AuxiliaryLoss(0.03 * rows.mean(), "batch"),
        }

    @hookimpl
    def gradients_ready(self, gradients, streams):
        general, target = streams["general"], streams["target"]
        self.scalars.append(
            [
                float(gradients.norm()),
                float(gradients.cosine(general.gradients)),
                float(gradients.dot(target.gradients)),
                float(target.gradients.squared_norm()),
            ]
        )
        self.streams_seen.append([general.nll, general.tokens, target.nll, target.loss, target.tokens])
        gradients.axpy_(0.3, general.gradients).mul_(0.9).axpy_(torch.tensor(-0.1), target.gradients)


@dataclass(eq=False)
class Weighted(Plugin):
    """Weights that depend on each sample alone, and what the window offers."""

    denominator: Any = "weighted"
    norms: list[float] = field(default_factory=list)

    @hookimpl
    def sample_weights(self, window):
        self.norms.append(float(window.gradient(0, None).norm()))
        first = [batch["input_ids"][:, 0] for batch in window.micro_batches]
        return SampleWeights(torch.cat(first) % 5 / 2.0, self.denominator)


@dataclass(eq=False)
class ByPlace(Plugin):
    """GRPO: advantages by the row's place among all ranks' rows, and a policy term with its own shape."""

    local: list[slice] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.local.append(rewards.local)
        self.totals.append(rewards.total)
        places = torch.arange(rewards.local.start, rewards.local.stop)
        return (torch.sin(places + 1.0) + 0.1 * rewards.total[rewards.local]).float()

    @hookimpl
    def policy_loss(self, tokens):
        return -(tokens.log_probs - tokens.old_log_probs).exp() * tokens.advantages


@dataclass(eq=False)
class Norms(Plugin):
    """Of the gradient, which it shortens."""

    norms: list[float] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients):
        self.norms.append(float(gradients.norm()))
        gradients.mul_(0.9)


def sft_power(folder: Path, world: int) -> Any:
    return make_sft(
        folder,
        names=["power:alpha=0.2"],
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        trainer={"eval_dataset": additions(8, seed=9)},
        per_device_eval_batch_size=8 // world,
        eval_strategy="steps",
        eval_steps=3,
        **SGD,
    )


def sft_everything(folder: Path, world: int, model: Any = None, more: tuple[Plugin, ...] = ()) -> Any:
    return make_sft(
        folder,
        model=model,
        names=["power:alpha=0.2"],
        plugins=[Weighted(), *more, Everything(4 // world)],
        streams={role: make() for role, make in STREAMS.items()},
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        **SGD,
    )


def sft_weights_over_tokens(folder: Path, world: int) -> Any:
    return make_sft(
        folder,
        plugins=[Weighted("tokens")],
        max_steps=3,
        per_device_train_batch_size=8 // world,
        padding_free=False,
        average_tokens_across_devices=True,
        **SGD,
    )


def sft_weights_counted_by_rank(folder: Path, world: int) -> Any:
    """Each rank divides by its own label tokens, which differ between ranks as the weights do."""
    return make_sft(
        folder,
        plugins=[Weighted()],
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        average_tokens_across_devices=False,
        **SGD,
    )


def sft_weights_from_the_data(folder: Path, world: int) -> Any:
    """Weights of the rows differ between ranks, and so does their sum."""
    rows = additions(48)
    return make_sft(
        folder,
        names=["weighted:denominator=weights"],
        train=rows.add_column("weight", [i % 5 - 1.0 for i in range(len(rows))]),
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        **SGD,
    )


def by_digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 5 for text in completions]


def greedy_grpo(folder: Path, world: int, **config: Any) -> Any:
    """Greedy decoding, so that completions do not depend on which rank draws them."""
    return make_grpo(
        folder,
        reward=by_digits,
        model=tiny_model(seed=1),
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        num_generations=4,
        generation_kwargs={"do_sample": False},
        loss_type="dapo",
        **SGD,
        **config,
    )


def grpo_everything(folder: Path, world: int) -> Any:
    return greedy_grpo(
        folder,
        world,
        plugins=[ByPlace(), Everything(4 // world)],
        streams={role: make() for role, make in STREAMS.items()},
        beta=0.05,
    )


OTHERS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"loss_type": "apo_zero_unpaired"},  # KTO's own estimates a KL term within each micro-batch
    "rloo": {"num_generations": 4, "beta": 0.05},
    "reward": {},
    "distillation": {},
}


def other(kind: str, folder: Path, world: int) -> Any:
    """Every other trainer with the hooks of an optimiser step that it calls, greedy where it samples."""
    config = OTHERS[kind]
    plugins: list[Plugin] = [Everything(4 // world)]
    if kind == "reward":
        plugins = [Norms()]
    elif kind == "rloo":
        plugins.insert(0, ByPlace())
        config = {**config, "reward": by_digits, "model": tiny_model(seed=1)}
    if kind in HOOKS["prompt_order"].trainers:
        config = {**config, "generation_kwargs": {"do_sample": False}}
    return MAKE[kind](
        folder,
        names=["ema:decay=0.5"],
        plugins=plugins,
        streams={} if kind == "reward" else {role: make() for role, make in STREAMS.items()},
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        **config,
        **SGD,
    )


SCENARIOS = {
    "power": sft_power,
    "everything": sft_everything,
    "weights over all tokens": sft_weights_over_tokens,
    "weights counted by rank": sft_weights_counted_by_rank,
    "weights from the data": sft_weights_from_the_data,
    "grpo": grpo_everything,
    **{kind: partial(other, kind) for kind in OTHERS},
}


def outcome(trainer: Any) -> dict[str, Any]:
    """What a finished run is compared by."""
    found: dict[str, Any] = {
        "parameters": parameters(trainer),
        "logs": logged(trainer),
    }
    for plugin in trainer.ext_plugins:
        for name in ("scalars", "streams_seen", "norms", "local", "totals"):
            if hasattr(plugin.instance, name):
                found[name] = getattr(plugin.instance, name)
    for role, stream in trainer.ext_streams.items():
        start = stream.position
        stream.position = 0
        found[f"order of {role}"] = [stream.next_indices() for _ in range(6)]
        stream.position = start
    return found


def algebra(a: GradientView, b: GradientView) -> dict[str, float]:
    """Every scalar and update of a view, as numbers."""
    mixed = a.clone().axpy_(0.5, b).mul_(2.0).axpy_(torch.tensor(-0.25), a)
    copy = a.clone().copy_(b)
    return {
        "dot": float(a.dot(b)),
        "dots": float(a.dots(b)[0]),
        "norm": float(a.norm()),
        "squared norm": float(b.squared_norm()),
        "cosine": float(a.cosine(b)),
        "gram": float(a.grams(b).sum(0)[0, 1]),
        "gram's last": float(a.grams(b)[1, 1, 1]),
        "mixed": float(mixed.norm()),
        "copied": float(copy.dot(a)),
        "clone": float(a.clone().norm()),
    }
