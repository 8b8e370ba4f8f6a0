"""On two ranks: what goes wrong on rank 1 only stops both, or both skip it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import Idle, Plugin
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext import hookimpl
from trl_ext.checkpoints import newest_complete
from trl_ext.records import AuxiliaryLoss
from trl_ext.testing import save_model
from trl_ext.testing.runs import MAKE, additions, parameters, tiny_model, tokenizer


@dataclass(eq=False)
class OnRankOne(Plugin):
    """Base: acts at a hook's second call, on the second rank alone."""

    calls: int = 0
    followers: tuple[Plugin, ...] = ()
    """Plugins named after this one."""

    def strike(self, at: int = 2) -> bool:
        self.calls += 1
        return self.calls == at and dist.get_rank() == 1

    def raise_there(self, at: int = 2) -> None:
        if self.strike(at):
            raise RuntimeError("only here")


@dataclass(eq=False)
class Setup(OnRankOne):
    @hookimpl
    def setup(self):
        self.raise_there(at=1)


@dataclass(eq=False)
class WrapOptimizer(OnRankOne):
    @hookimpl
    def wrap_optimizer(self, optimizer):
        self.raise_there(at=1)
        return optimizer


@dataclass(eq=False)
class SampleWeights(OnRankOne):
    @hookimpl
    def sample_weights(self, window):
        self.raise_there()
        return torch.ones(window.num_samples)


@dataclass(eq=False)
class SampleWeightsAfterGradient(OnRankOne):
    @hookimpl
    def sample_weights(self, window):
        window.gradient(0, None)
        self.raise_there()
        return torch.ones(window.num_samples)


@dataclass(eq=False)
class SampleWeightsBeforeGradient(OnRankOne):
    """The other rank is inside of the gradient's collective by then."""

    @hookimpl
    def sample_weights(self, window):
        self.raise_there()
        window.gradient(0, None)
        return torch.ones(window.num_samples)


@dataclass(eq=False)
class SampleWeightsBetweenGradients(OnRankOne):
    @hookimpl
    def sample_weights(self, window):
        window.gradient(0, None)
        self.raise_there()
        window.gradient(0, None)
        return torch.ones(window.num_samples)


@dataclass(eq=False)
class PerTokenLoss(OnRankOne):
    @hookimpl
    def per_token_loss(self, tokens):
        self.raise_there()
        return -tokens.log_probs


@dataclass(eq=False)
class WrongShape(OnRankOne):
    @hookimpl
    def per_token_loss(self, tokens):
        return tokens.log_probs.sum() if self.strike() else -tokens.log_probs


@dataclass(eq=False)
class AuxiliaryLosses(OnRankOne):
    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.raise_there()
        return {"zero": AuxiliaryLoss(0 * micro_step.log_probs.sum(), "token")}


@dataclass(eq=False)
class GradientsReady(OnRankOne):
    @hookimpl
    def gradients_ready(self, gradients):
        self.raise_there()
        gradients.norm()


@dataclass(eq=False)
class GradientsReadyBeforeNorm(OnRankOne):
    """Under FSDP2 a norm is a collective, in which the other rank waits."""

    @hookimpl
    def gradients_ready(self, gradients):
        self.raise_there()
        gradients.norm()
        gradients.norm()


@dataclass(eq=False)
class WeightsUpdated(OnRankOne):
    @hookimpl
    def weights_updated(self):
        self.raise_there()


@dataclass(eq=False)
class DeployedWeights(OnRankOne):
    @hookimpl
    def deployed_weights(self):
        raise RuntimeError("only here") if dist.get_rank() == 1 else RuntimeError("and here")


@dataclass(eq=False)
class PromptOrder(OnRankOne):
    @hookimpl
    def prompt_order(self, order):
        self.raise_there(at=1)
        return order


@dataclass(eq=False)
class PromptOrderDiffers(OnRankOne):
    @hookimpl
    def prompt_order(self, order):
        return order[::-1] if self.strike(at=1) else order


@dataclass(eq=False)
class SamplingWeights(OnRankOne):
    @hookimpl
    def sampling_weights(self):
        self.raise_there()


@dataclass(eq=False)
class Advantages(OnRankOne):
    @hookimpl
    def advantages(self, advantages):
        self.raise_there()
        return advantages


@dataclass(eq=False)
class GathersAdvantages(Plugin):
    """A collective of its own, in a chain after a plugin that may have failed."""

    @hookimpl
    def advantages(self, advantages):
        dist.all_reduce(advantages.abs().mean())
        return advantages


@dataclass(eq=False)
class GathersGradients(Plugin):
    @hookimpl
    def gradients_ready(self, gradients):
        dist.all_reduce(gradients.tensors[0].norm())


@dataclass(eq=False)
class GradientsReadyBeforeGather(OnRankOne):
    followers: tuple[Plugin, ...] = field(default_factory=lambda: (GathersGradients(),))

    @hookimpl
    def gradients_ready(self):
        self.raise_there()


@dataclass(eq=False)
class AdvantagesBeforeGather(Advantages):
    followers: tuple[Plugin, ...] = field(default_factory=lambda: (GathersAdvantages(),))


@dataclass(eq=False)
class PerTokenLossBeforeGather(PerTokenLoss):
    """Another hook of the same step has a collective of its own."""

    followers: tuple[Plugin, ...] = field(default_factory=lambda: (GathersGradients(),))


@dataclass(eq=False)
class AuxiliaryLossesBeforeGather(AuxiliaryLosses):
    followers: tuple[Plugin, ...] = field(default_factory=lambda: (GathersGradients(),))


@dataclass(eq=False)
class PolicyLoss(OnRankOne):
    @hookimpl
    def policy_loss(self, tokens):
        self.raise_there()
        return -tokens.log_probs * tokens.advantages


@dataclass(eq=False)
class Metrics(OnRankOne):
    """A rank that goes on alone would wait for the other at the next log."""

    @hookimpl
    def metrics(self):
        dist.all_reduce(torch.ones(1))
        self.raise_there()
        return {"calls": self.calls}


@dataclass(eq=False)
class LoadState(OnRankOne):
    """A checkpoint that one rank cannot read."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("only here")

    @hookimpl
    def metrics(self):
        return {}


@dataclass(eq=False)
class SaveState(OnRankOne):
    """A state that one rank cannot give."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise RuntimeError("only here")
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("there is no complete checkpoint")

    @hookimpl
    def metrics(self):
        return {}


@dataclass(eq=False)
class FullDisk(OnRankOne):
    """What rank 1 keeps cannot be written: a folder is in the way."""

    output_dir: str = ""

    @hookimpl
    def setup(self, context):
        self.output_dir = context.output_dir

    @hookimpl
    def weights_updated(self, step):
        if step == 2 and dist.get_rank() == 1:
            Path(self.output_dir, "checkpoint-2", "trl_ext", "rank-00001.json").mkdir(parents=True)


@dataclass(eq=False)
class NanLoss(OnRankOne):
    skipped: list[bool] = field(default_factory=list)

    @hookimpl
    def auxiliary_losses(self, micro_step):
        factor = float("nan") if self.strike() else 0.0
        return {"zero": AuxiliaryLoss(factor * micro_step.log_probs.sum(), "token")}

    @hookimpl
    def weights_updated(self, skipped):
        self.skipped.append(skipped)


@dataclass(eq=False)
class NanGradient(OnRankOne):
    """After the reduction: the other rank's gradient stays finite."""

    skipped: list[bool] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients):
        if self.strike():
            gradients.tensors[0].view(-1)[0] = float("inf")

    @hookimpl
    def weights_updated(self, skipped):
        self.skipped.append(skipped)


@dataclass(eq=False)
class Diverges(OnRankOne):
    """Changes one number of one parameter on one rank, by the smallest amount there is."""

    @hookimpl
    def weights_updated(self, weights):
        if self.strike():
            tensor = dict(zip(weights.names, weights.local(), strict=True))["model.norm.weight"]
            tensor[3] = torch.nextafter(tensor[3], torch.tensor(9.0))


@dataclass(eq=False)
class DivergesInState(OnRankOne):
    average: torch.Tensor = field(default_factory=lambda: torch.zeros(3))

    @hookimpl
    def weights_updated(self):
        if self.strike():
            self.average[1] = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


Scenario = tuple[str, Callable[[], OnRankOne], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {
    "setup": ("sft", Setup, {}),
    "wrap_optimizer": ("sft", WrapOptimizer, {}),
    "sample_weights": ("sft", SampleWeights, {}),
    "sample_weights, after a gradient": ("sft", SampleWeightsAfterGradient, {}),
    "sample_weights, before a gradient": ("sft", SampleWeightsBeforeGradient, {}),
    "sample_weights, between gradients": ("sft", SampleWeightsBetweenGradients, {}),
    "per_token_loss": ("sft", PerTokenLoss, {}),
    "wrong shape": ("sft", WrongShape, {}),
    "auxiliary_losses": ("sft", AuxiliaryLosses, {}),
    "gradients_ready": ("sft", GradientsReady, {}),
    "gradients_ready, FSDP2": ("sft", GradientsReadyBeforeNorm, {"model": "sharded"}),
    "weights_updated": ("sft", WeightsUpdated, {}),
    "metrics": ("sft", Metrics, {}),
    "deployed_weights": ("sft", DeployedWeights, {"eval_strategy": "steps", "eval_steps": 2}),
    "state_dict": ("sft", SaveState, {"save_strategy": "steps", "save_steps": 2}),
    "a file": ("sft", FullDisk, {"save_strategy": "steps", "save_steps": 2}),
    "per_token_loss, before a gather": ("sft", PerTokenLossBeforeGather, {}),
    "auxiliary_losses, before a gather": ("sft", AuxiliaryLossesBeforeGather, {}),
    "auxiliary_losses, GRPO, before a gather": ("grpo", AuxiliaryLossesBeforeGather, {}),
    "prompt_order": ("grpo", PromptOrder, {}),
    "prompt_order differs": ("grpo", PromptOrderDiffers, {}),
    "sampling_weights": ("grpo", SamplingWeights, {}),
    "advantages": ("grpo", Advantages, {}),
    "advantages, before a gather": ("grpo", AdvantagesBeforeGather, {}),
    "gradients_ready, before a gather": ("sft", GradientsReadyBeforeGather, {}),
    "policy_loss": ("grpo", PolicyLoss, {}),
    "auxiliary_losses, GRPO": ("grpo", AuxiliaryLosses, {}),
    "gradients_ready, GRPO": ("grpo", GradientsReady, {}),
    "nan loss": ("sft", NanLoss, {}),
    "nan loss, skip": ("sft", NanLoss, {"nonfinite": "skip"}),
    "infinite gradient": ("sft", NanGradient, {}),
    "infinite gradient, skip": ("sft", NanGradient, {"nonfinite": "skip"}),
    "parameter differs": ("sft", Diverges, {"rank_check_steps": 1}),
    "parameter differs, checked every third step": ("sft", Diverges, {"rank_check_steps": 3}),
    "state differs": ("sft", DivergesInState, {"rank_check_steps": 1}),
}


def sharded_model(folder: Path) -> Any:
    save_model(tiny_model(), tokenizer(), folder / "model")
    dist.barrier()  # the first rank saves
    return AutoModelForCausalLM.from_pretrained(
        str(folder / "model"), distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )


def run(folder: Path, scenario: Scenario, resume: bool = False) -> dict[str, Any]:
    kind, make, config = scenario
    plugin = make()
    config = {**config, "model": sharded_model(folder)} if config.get("model") == "sharded" else config
    config = {"max_steps": 4, "ddp_timeout": 60, **config}
    held_out = {"eval_dataset": additions(4)} if "eval_steps" in config else {}
    trainer = MAKE[kind](folder / "run", plugins=[Idle(), plugin, *plugin.followers], trainer=held_out, **config)
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as caught:
        error = {
            "type": [base.__name__ for base in type(caught).__mro__],
            "message": str(caught),
            "cause": repr(caught.__cause__),
        }
    found = {
        "error": error,
        "step": trainer.state.global_step,
        "parameters": parameters(trainer),
        "skipped": getattr(plugin, "skipped", None),
        "logs": trainer.state.log_history,
        "complete": newest_complete(folder / "run")[0] if (folder / "run").exists() else None,
    }
    dist.barrier()  # proves that no rank is still inside of a collective of the run
    return found


def main(folder: Path) -> dict[str, Any]:
    found = {name: run(folder / name, scenario) for name, scenario in SCENARIOS.items()}
    saving = ("sft", LoadState, {"save_strategy": "steps", "save_steps": 2})
    run(folder / "load", saving)
    found["load_state_dict"] = run(folder / "load", saving, resume=True)
    return found
