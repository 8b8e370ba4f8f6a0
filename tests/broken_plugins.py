"""Plugins that are broken on purpose: for each case of the conformance kit one that it has to find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from sound_plugins import Average, Focal, focal_loss

from trl_ext import hookimpl
from trl_ext.records import AuxiliaryLoss, Column, StreamRequest
from trl_ext.testing.conformance import Subject


@dataclass(eq=False)
class UnwritableOption(Focal):
    """A set cannot be written in YAML or on the command line."""

    kept: set[int] = field(default_factory=set)


@dataclass(eq=False)
class NoData:
    """Asks for a stream that it can do without, and is tried without one."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", optional=True)]

    @hookimpl
    def gradients_ready(self, gradients):
        gradients.mul_(0.5)


@dataclass(eq=False)
class EditsACopy:
    @hookimpl
    def gradients_ready(self, gradients):
        gradients.clone().mul_(0.5)


@dataclass(eq=False)
class EditsBehindTheCounter:
    """NumPy shares the memory of a tensor, and PyTorch does not see it write."""

    @hookimpl
    def auxiliary_losses(self, micro_step):
        micro_step.entropy.detach().numpy()[:] = 0
        return {}


@dataclass(eq=False)
class LeavesTheAverage(Average):
    """The averaged weights stay in place after an evaluation."""

    @hookimpl
    @contextmanager
    def deployed_weights(self, weights) -> Iterator[None]:
        for w, mean in zip(weights.local(), self.mean, strict=True):
            w.copy_(mean)
        yield


@dataclass(eq=False)
class WrongFormula:
    """Detaches the factor, which the formula differentiates."""

    @hookimpl
    def per_token_loss(self, tokens):
        return -((1 - tokens.probs.detach()) ** 2) * tokens.log_probs


@dataclass(eq=False)
class ByMicroBatch:
    """Weighs each token by the size of the micro-batch that it is in."""

    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs * 10 / tokens.mask.sum()


@dataclass(eq=False)
class Counts:
    """Scales the gradient by how often it was called, and sets nothing up anew."""

    calls: int = field(default=0, init=False)

    @hookimpl
    def gradients_ready(self, gradients):
        self.calls += 1
        gradients.mul_(1 / self.calls)


@dataclass(eq=False)
class Forgets(Counts):
    """Starts anew with every training, a resumed one too, for want of a state."""

    @hookimpl
    def setup(self):
        self.calls = 0


@dataclass(eq=False)
class IntegerKeys(Focal):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": {1: 2}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(eq=False)
class DecaysAll:
    """Decays all parameters of the model, frozen ones too."""

    @hookimpl
    def setup(self, context):
        self.parameters = list(context.model.parameters())

    @hookimpl
    def weights_updated(self):
        for parameter in self.parameters:
            parameter.data.mul_(0.99)


@dataclass(eq=False)
class AssumesFp32:
    """Adds outputs of a layer, in bf16 under autocast, to a sum in fp32."""

    @hookimpl
    def setup(self, context):
        self.sum = torch.zeros(16)
        context.model.get_submodule("model.layers.0.mlp").register_forward_hook(self.add)

    def add(self, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.sum.index_add_(0, torch.arange(16), output[0, 0].detach())


@dataclass(eq=False)
class MeansInFp32(Average):
    """`lerp_` refuses tensors of two types."""

    @hookimpl
    def weights_updated(self, weights):
        torch._foreach_lerp_(self.mean, weights.local(), 0.5)


@dataclass(eq=False)
class CountsForwards:
    """Scales the gradient by the number of forwards of a layer that it has seen."""

    @hookimpl
    def setup(self, context):
        self.forwards = 0
        layer = context.model.get_submodule("model.layers.0.mlp")
        layer.register_forward_pre_hook(lambda *_: setattr(self, "forwards", self.forwards + 1))

    @hookimpl
    def gradients_ready(self, gradients):
        gradients.mul_(1 / self.forwards)


@dataclass(eq=False)
class ByRow:
    """Takes rows for samples, and gives each the same weight."""

    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs * 3 / tokens.mask.sum(1, keepdim=True).clamp(min=1)


@dataclass(eq=False)
class WantsAttentionMask:
    """A packed batch has none."""

    @hookimpl
    def per_token_loss(self, tokens):
        kept = tokens.inputs["attention_mask"][:, 1:].sum()
        return -tokens.log_probs * kept / kept


@dataclass(eq=False)
class ByRank:
    """Scales the reduced gradient by a number that each rank computes from its own rows."""

    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.scale = float(micro_step.log_probs.mean().exp().detach())
        return {}

    @hookimpl
    def gradients_ready(self, gradients):
        gradients.mul_(self.scale)


@dataclass(eq=False)
class NoLabelsNoNumber:
    """0 / 0 where a rank has no label."""

    @hookimpl
    def auxiliary_losses(self, micro_step):
        mean = micro_step.log_probs.sum() / micro_step.mask.sum()
        return {"mean": AuxiliaryLoss(-0.1 * mean, "batch")}


@dataclass(eq=False)
class NoCompletionNoNumber:
    """GRPO: 0 / 0 where all completions of a rank are masked."""

    @hookimpl
    def advantages(self, rollouts, advantages):
        return advantages * rollouts.mask.sum() / rollouts.mask.sum()


@dataclass(eq=False)
class NoStreamNoNumber:
    """GRPO: 0 / 0 where a rank has no label in a stream."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]

    @hookimpl
    def per_token_loss(self, tokens):
        labels = int(tokens.mask.sum())
        return -labels / labels * tokens.log_probs

    @hookimpl
    def gradients_ready(self, gradients, streams):
        gradients.axpy_(1.0, streams["general"].gradients)


@dataclass(eq=False)
class Weighs:
    """0 / 0 where a rank has no label, in an objective that reads columns of every kind."""

    columns = (
        Column("trust"),
        Column("grade", per="message", dtype="int"),
        Column("source", dtype="text", values=("web", "book")),
        Column("shade", per="token"),
    )

    @hookimpl
    def per_token_loss(self, tokens):
        weight = tokens.per_token("trust") + tokens.per_token("grade") + tokens.per_token("source")
        weight = weight + tokens.per_token("shade")
        return -self.scale(tokens) * weight * tokens.log_probs

    def scale(self, tokens):
        labels = int(tokens.mask.sum())
        return labels / labels


class WeighsWell(Weighs):
    """The same without the fault."""

    def scale(self, tokens):
        return 1.0


@dataclass(eq=False)
class Alone:
    """Takes part in a collective of its own only where nothing has failed before."""

    @hookimpl
    def gradients_ready(self, gradients):
        norm = gradients.norm()
        if dist.is_initialized():
            dist.all_reduce(norm)


@dataclass(eq=False)
class LocalNorm:
    """The norm of a shard, where that of the parameter is meant."""

    @hookimpl
    def gradients_ready(self, gradients):
        gradients.mul_(1 / torch.stack([tensor.norm() for tensor in gradients.tensors]).norm())


@dataclass(eq=False)
class EveryStep:
    """One forward more a step."""

    @hookimpl
    def sample_weights(self, window):
        for i in range(len(window.micro_batches)):
            window.forward(i)


BROKEN: dict[str, tuple[Subject, str]] = {
    "options_in_config": (Subject(UnwritableOption(), "sft"), "option 'kept'"),
    "hooks_fire": (Subject(NoData(), "sft"), "never called in a sft run"),
    "changes_something": (Subject(EditsACopy(), "sft"), "are those of a run without the plugin, to the last bit"),
    "records_unmodified": (Subject(EditsBehindTheCounter(), "sft"), "micro_step.entropy by auxiliary_losses"),
    "evaluation_changes_nothing": (Subject(LeavesTheAverage(), "sft"), "the weights after an evaluation"),
    "formula": (Subject(WrongFormula(), "sft", formula=focal_loss), "the gradient differs from the formula's"),
    "accumulation": (Subject(ByMicroBatch(), "sft"), "2 micro-batches of 2 rows, and one of 4: the trained weights"),
    "two_trainings": (Subject(Counts(), "sft"), "the weights after a second training of one instance"),
    "resume": (Subject(Forgets(), "sft"), "resumed after step 1 of 4, the weights"),
    "state_survives_json": (Subject(IntegerKeys(), "sft"), "state_dict()['seen'] is {1: 2}, and JSON gives {'1': 2}"),
    "peft": (Subject(DecaysAll(), "sft"), "weights of the base model have changed"),
    "bf16_autocast": (Subject(AssumesFp32(), "sft"), "must have the same scalar type"),
    "bf16_weights": (Subject(MeansInFp32(), "sft"), "failed in hook 'weights_updated'"),
    "activation_checkpointing": (Subject(CountsForwards(), "sft"), "with and without activation_checkpointing"),
    "padding_free": (Subject(ByRow(), "sft"), "with and without padding_free"),
    "packing": (Subject(WantsAttentionMask(), "sft"), "KeyError: 'attention_mask'"),
    "two_ranks": (Subject(ByRank(), "sft"), "of rank 1, against those of rank 0"),
    "rank_without_labels": (Subject(NoLabelsNoNumber(), "sft"), "NaN or infinite loss or gradient"),
    "failure_on_one_rank": (Subject(Alone(), "sft"), "where gradients_ready fails on rank 1, rank 0"),
    "fsdp2": (Subject(LocalNorm(), "sft"), "in shards, and in two copies"),
}
"""By the case that has to find it: the plugin, and what the case says of it."""
