"""The cases of `test_fsdp2.py` on this rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from rank_worker import FailsInBackward, FailsInScoring
from short_runs import GENERAL, TARGET, TOKENIZER, DataRegularization, arguments, model, parameters, train
from test_rollout_filter import Before, Witness, only_norms
from test_rollout_filter import run as run_grpo
from test_sft import sharpened
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from trl_ext_data_regularization.engines import Projections, Sketch, Target
from trl_ext_data_regularization.gradient_surgery import GradientSurgery
from trl_ext_data_regularization.layers import Layer
from trl_ext_data_regularization.rollout_filter import RolloutFilter

import trl_ext
from trl_ext import hookimpl
from trl_ext.gradients import local_tensor
from trl_ext.testing import save_model, tiny_qwen2


class Watched(DataRegularization):
    """Keeps the scores and the weights of every step."""

    @hookimpl
    def setup(self, context: Any) -> None:
        self.scores: list[Tensor] = []
        self.weights: list[Tensor] = []
        super().setup(context)

    def _begin_step(self, samples: Any, gradients: Any) -> Any:
        step = super()._begin_step(samples, gradients)
        choose = step.choose

        def watched(scores: Any) -> None:
            self.scores.append(scores.s)
            choose(scores)

        step.choose = watched
        return step

    @hookimpl
    def gradients_ready(self, gradients: Any, streams: Any) -> None:
        self.weights.append(self._choice.weights.clone())
        super().gradients_ready(gradients, streams)


# Both sharded and not: plugin, its options, the run's.
DERIVATIVE = {"scope": "global", "engine": "derivative", "frac": 0.5}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
SURGERY = {"general": "train"}
SGD = {"optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 2}
TWICE = {"gradient_accumulation_steps": 2}
NARROW = {"engine": "sketch", "sketch_size": 8}  # narrower than the layers, so that parts are projected
SUMS = [list(f"{i % 7}+{i % 5}={i % 7 + i % 5}".encode()) for i in range(24)]
HALF_WITHOUT_LABELS = {
    "data": Dataset.from_dict(
        {"input_ids": SUMS, "labels": [row if i % 4 < 2 else [-100] * len(row) for i, row in enumerate(SUMS)]}
    ),
    "train_sampling_strategy": "sequential",
    "max_length": None,
}
"""Rows of which the second rank has those without labels."""
COUNTING = "ghost, accumulated"
Case = tuple[type, Mapping[str, Any], Mapping[str, Any]]
LAYERWISE: dict[str, Case] = {
    "ghost": (Watched, {"position_steps": 1}, {}),
    COUNTING: (Watched, {"with_target": True, "table": True}, TWICE),
    "ghost, preconditioned": (Watched, {"precondition": True}, ADAM),
    "ghost, recomputed": (Watched, {"rule": "filter"}, {"activation_checkpointing": True}),
    "ghost, a rank without labels": (Watched, {}, HALF_WITHOUT_LABELS),
    "ghost, tied": (Watched, {}, {}),
    "ghost by micro-batch": (Watched, {"unit": "micro"}, TWICE),
    "general stream": (Watched, {"general": "stream", "frac": 0.5}, TWICE),
    "sketch": (Watched, {"rule": "cone", **NARROW}, {}),
    "sketch, tied": (Watched, {"rule": "hull", "scope": "global", **NARROW}, {}),
    "ball by micro-batch": (Watched, {"rule": "ball", "unit": "micro", "engine": "direct"}, TWICE),
    "direct": (Watched, {"engine": "direct"}, {}),
}
OVER_ALL: dict[str, Case] = {
    "derivative": (Watched, {**DERIVATIVE, "position_steps": 1}, {}),
    "derivative, accumulated": (Watched, DERIVATIVE, TWICE),
    "derivative, with target": (Watched, {**DERIVATIVE, "rule": "filter", "frac": 1.0, "with_target": True}, {}),
    "derivative, target": (Watched, {**DERIVATIVE, "rule": "target", "frac": None}, {}),
    "derivative, preconditioned": (Watched, {**DERIVATIVE, "precondition": True}, ADAM),
    "half-space": (GradientSurgery, SURGERY, {}),
    "pcgrad by layer": (GradientSurgery, {**SURGERY, "method": "pcgrad", "scope": "layer"}, {}),
    "pcgrad, preconditioned": (GradientSurgery, {**SURGERY, "method": "pcgrad", "precondition": True}, ADAM),
}
CASES = LAYERWISE | OVER_ALL


def network(case: str) -> Any:
    if not case.endswith("tied"):
        return sharpened(model(layers=2))
    # FSDP2 on a vocabulary that the ranks cannot share evenly lets a tied head go stale, without plugins too.
    return sharpened(tiny_qwen2(len(TOKENIZER) + len(TOKENIZER) % 2, hidden=16, layers=2))


def in_shards(net: Any, folder: Path) -> Any:
    """The same model, loaded in shards."""
    if dist.get_rank() == 0:
        save_model(net, TOKENIZER, folder / "model")
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(str(folder / "model"), distributed_config=config)


def trained(plugin: Any, net: Any, **options: Any) -> Any:
    return train(plugin, net, **{**SGD, "max_steps": 3, **options})


def run(case: str, folder: Path, sharded: bool) -> dict[str, Any]:
    """FSDP2 or DDP, on the same data: parameters, logs, choices and what they were made of, and what is saved."""
    cls, options, settings = CASES[case]
    net = network(case)
    plugin = cls(stream_batch_size=2, **options)
    trainer = trained(plugin, in_shards(net, folder) if sharded else net, **settings)
    return {
        "parameters": parameters(trainer),
        "logs": trainer.state.log_history,
        "sharded": trainer.ext_weights.sharded,
        "scores": getattr(plugin, "scores", []),
        "weights": getattr(plugin, "weights", []),
        "state": plugin.state_dict() if hasattr(plugin, "state_dict") else {},
        "streams": {role: stream.state_dict() for role, stream in trainer.ext_streams.items()},
    }


def main(folder: Path, case: str) -> dict[bool, dict[str, Any]]:
    return {sharded: run(case, folder, sharded) for sharded in (True, False)}


def rollouts(folder: Path) -> dict[bool, dict[str, Any]]:
    """Two steps of GRPO with a filter, sharded and not: parameters, and advantages before and after it."""
    found = {}
    for sharded in (True, False):
        net, before, after = model(layers=1), Before(), Witness()
        net = only_norms(in_shards(net, folder) if sharded else net)
        options = {"temperature": 0.9, "per_device_train_batch_size": 8}
        trainer = run_grpo([before, RolloutFilter(), after], net, **options)
        found[sharded] = {
            "parameters": parameters(trainer),
            "sharded": trainer.ext_weights.sharded,
            "raw": torch.stack([raw for _, _, raw in before.seen]),
            "advantages": torch.stack([filtered for _, _, filtered in after.seen]),
        }
    return found


# -- a run in two parts ----------------------------------------------------------------------------------------------


def continued(folder: Path) -> dict[str, Any]:
    """Parameters and state after four steps, and after two and two more from what the first two had left."""
    common = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", **TWICE}
    options: dict[str, Any] = {"rule": "filter", "table": True, "stream_batch_size": 2}
    start = in_shards(network(""), folder)
    found, plugin = {}, DataRegularization(**options)
    trainer = trained(plugin, start, max_steps=4, data=GENERAL.select(range(32)), **common)
    found["at once"] = parameters(trainer), plugin.state_dict()
    plugin = DataRegularization(**options)
    trainer = trained(plugin, in_shards(network(""), folder), max_steps=2, data=GENERAL.select(range(16)), **common)
    state, position = plugin.state_dict(), trainer.ext_streams["target"].state_dict()
    trainer.save_model(str(folder / "half"))
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    half = AutoModelForCausalLM.from_pretrained(str(folder / "half"), distributed_config=config)
    plugin = Resumed(**options)
    plugin.resumed = state
    args = arguments(trl_ext.SFTConfig, **SGD, max_steps=2, **common)
    data = {"train_dataset": GENERAL.select(range(16, 32)), "streams": {"target": TARGET}}
    trainer = trl_ext.SFTTrainer(half, args=args, processing_class=TOKENIZER, plugins=[plugin], **data)
    trainer.ext_streams["target"].load_state_dict(position)
    trainer.train()
    found["in two"] = parameters(trainer), plugin.state_dict()
    return found


class Resumed(DataRegularization):
    """Takes over what a checkpoint holds of the plugin."""

    resumed: Any = None

    @hookimpl
    def setup(self, context: Any) -> None:
        super().setup(context)
        self.load_state_dict(self.resumed)


# -- faults ----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[type, dict[str, Any]]] = {
    "sample_weights": (FailsInScoring, {}),
    "gradients_ready": (FailsInBackward, {"unit": "micro"}),
}


def fault(folder: Path, name: str) -> str:
    """What a rank saw of a failure on rank 1."""
    cls, options = FAULTS[name]
    net = in_shards(network(""), folder)
    try:
        trained(cls(stream_batch_size=2, **options), net)
        error = "none"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    dist.barrier()  # proves that no rank is still inside of a collective of the run
    return error


# -- parts of a target -----------------------------------------------------------------------------------------------

SHAPES = ((7, 5), (2, 9), (7,), (1,))  # none of which three ranks share evenly; a rank has nothing of the last ones


def parts() -> None:
    """What is asked of a target in shards is what is asked of the whole."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)

    torch.manual_seed(0)
    gradients: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
    sharded = fully_shard(Module())
    for parameter, gradient in zip(sharded.parameters(), gradients, strict=True):
        own = torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = own  # type: ignore[assignment]
    shards = [local_tensor(p.grad) for p in sharded.parameters()]
    gradients, shards = [*gradients, None], [*shards, None]
    parameters = [*sharded.parameters(), next(sharded.parameters())]
    assert [len(t) for t in shards[:-1]] != [len(t) for t in gradients[:-1]]
    whole, cut = Target(gradients), Target(shards, parameters)
    for i, gradient in enumerate(gradients):
        found = cut.whole(i)
        assert (found is None and gradient is None) or torch.equal(found, gradient)
    cpu = torch.device("cpu")
    norms = [target.squared_norms(cpu) for target in (whole, cut)]
    torch.testing.assert_close(norms[1], norms[0], rtol=2e-6, atol=0)  # of fp32 norms: 16 times its rounding
    layers = [Layer(str(i), i, None, 1) for i in range(len(gradients))]
    for size in (3, 16):
        sketches = [Sketch(layers, target, 2, cpu, Projections(size, 0))._target for target in (whole, cut)]
        assert sketches[0].keys() == sketches[1].keys() == set(range(len(SHAPES)))
        for i, sketch in sketches[0].items():
            torch.testing.assert_close(sketches[1][i], sketch)
