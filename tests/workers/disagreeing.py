"""On two ranks: the ranks do other things, and all hear of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import Idle, Plugin
from torch.distributed.fsdp import fully_shard
from workers.failures import OnRankOne, sharded_model

from trl_ext import hookimpl
from trl_ext.records import AuxiliaryLoss
from trl_ext.testing.runs import MAKE, additions, tiny_model


@dataclass(eq=False)
class DetachedLoss(OnRankOne):
    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs.detach() if self.strike() else -tokens.log_probs


@dataclass(eq=False)
class OtherNames(Plugin):
    """A term of 1 on rank 0, and one of 100 under another name on rank 1."""

    @hookimpl
    def auxiliary_losses(self, micro_step):
        name, value = ("one", 1.0) if dist.get_rank() == 0 else ("hundred", 100.0)
        return {name: AuxiliaryLoss(0 * micro_step.log_probs.sum() + value, "batch")}


@dataclass(eq=False)
class NoTermThere(Plugin):
    @hookimpl
    def auxiliary_losses(self, micro_step):
        if dist.get_rank() == 1:
            return {}
        return {"one": AuxiliaryLoss(0 * micro_step.log_probs.sum() + 1.0, "batch")}


@dataclass(eq=False)
class OtherNumbers(Plugin):
    @hookimpl
    def metrics(self):
        return {"rank": dist.get_rank(), "same": 3.0}


@dataclass(eq=False)
class OtherTensors(Plugin):
    """A state that has one tensor more on rank 1."""

    @hookimpl
    def weights_updated(self):
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"average": torch.ones(3)} | ({"more": torch.ones(2)} if dist.get_rank() == 1 else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(eq=False)
class OtherValue(OtherTensors):
    """What is beside the tensors of the state counts too."""

    def state_dict(self) -> dict[str, Any]:
        return {"average": torch.ones(3), "count": dist.get_rank()}


@dataclass(eq=False)
class Same(OtherTensors):
    def state_dict(self) -> dict[str, Any]:
        return {"average": torch.ones(3), "count": 1}


@dataclass(eq=False)
class OnlyUnsharded(Plugin):
    @hookimpl
    def check(self, run):
        if run.sharding != "ddp":
            raise ValueError(f"sharding={run.sharding}")


@dataclass(eq=False)
class Enters(OnRankOne):
    """Weights that one rank cannot put in place."""

    @contextmanager
    def swapped(self, at: int) -> Iterator[None]:
        self.raise_there(at)
        yield


@dataclass(eq=False)
class EntersDeployed(Enters):
    @hookimpl
    def deployed_weights(self):
        return self.swapped(at=1)


@dataclass(eq=False)
class LeavesDeployed(OnRankOne):
    @hookimpl
    @contextmanager
    def deployed_weights(self) -> Iterator[None]:
        yield
        self.raise_there(at=1)


@dataclass(eq=False)
class EntersSampling(Enters):
    @hookimpl
    def sampling_weights(self):
        return self.swapped(at=2)


@dataclass(eq=False)
class OtherWeights(Plugin):
    """One evaluation more on rank 1."""

    @hookimpl
    def deployed_weights(self):
        names = ("", "more") if dist.get_rank() == 1 else ("",)
        return {name: contextlib.ExitStack() for name in names}


@dataclass(eq=False)
class Checks(OnRankOne):
    @hookimpl
    def check(self):
        self.raise_there(at=1)


Scenario = tuple[str, Callable[[], Plugin], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {
    "a loss without a gradient": ("sft", DetachedLoss, {}),
    "other terms": ("sft", OtherNames, {}),
    "no term": ("sft", NoTermThere, {}),
    "other metrics": ("sft", OtherNumbers, {}),
    "other tensors": ("sft", OtherTensors, {"rank_check_steps": 2}),
    "another value, FSDP2": ("sft", OtherValue, {"rank_check_steps": 2, "model": sharded_model}),
    "the same, FSDP2": ("sft", Same, {"rank_check_steps": 1, "model": sharded_model}),
    "entering deployed weights": ("sft", EntersDeployed, {"eval_strategy": "steps", "eval_steps": 2}),
    "leaving deployed weights": ("sft", LeavesDeployed, {"eval_strategy": "steps", "eval_steps": 2}),
    "entering sampling weights": ("grpo", EntersSampling, {}),
    "other deployed weights": ("sft", OtherWeights, {"eval_strategy": "steps", "eval_steps": 2}),
    "check": ("sft", Checks, {}),
    "sharded by hand": ("sft", OnlyUnsharded, {"model": lambda folder: fully_shard(tiny_model())}),
}


@contextmanager
def warnings_of_the_core(found: list[str]) -> Any:
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger("trl_ext").addHandler(keep)
    try:
        yield
    finally:
        logging.getLogger("trl_ext").removeHandler(keep)


def run(folder: Path, scenario: Scenario) -> dict[str, Any]:
    kind, make, config = scenario
    config = {"max_steps": 4, "ddp_timeout": 60, **config}
    config |= {"model": config["model"](folder)} if "model" in config else {}
    held_out = {"eval_dataset": additions(4)} if "eval_steps" in config else {}
    warnings: list[str] = []
    error = trainer = None
    with warnings_of_the_core(warnings):
        try:
            trainer = MAKE[kind](folder / "run", plugins=[Idle(), make()], trainer=held_out, **config)
            trainer.train()
        except Exception as caught:
            error = {"type": [base.__name__ for base in type(caught).__mro__], "message": str(caught)}
    dist.barrier()  # proves that no rank is still inside of a collective of the run
    return {
        "error": error,
        "warnings": warnings,
        "step": trainer and trainer.state.global_step,
        "logs": trainer and trainer.state.log_history,
    }


def main(folder: Path) -> dict[str, Any]:
    found = {name: run(folder / name, scenario) for name, scenario in SCENARIOS.items()}
    return found
