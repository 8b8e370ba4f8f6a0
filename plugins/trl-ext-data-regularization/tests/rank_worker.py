"""The cases of `test_ranks.py` on this rank: `main` gives what it found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from short_runs import GENERAL, DataRegularization, model, parameters, train
from test_refusals import NanTarget
from test_rollout_filter import TASK, Before, Witness, noisy_reward, only_norms
from test_rollout_filter import run as run_grpo
from test_sft import sharpened
from trl_ext_data_regularization.rollout_filter import RolloutFilter

from trl_ext import hookimpl

# Per case: the plugin's options. The stream's batch is per rank, so one rank draws twice as many.
CASES: dict[str, dict[str, Any]] = {
    "ghost": {"frac": 0.5},
    "accumulated": {"frac": 0.5},
    "sketch": {"rule": "cone", "engine": "sketch", "sketch_size": 512},
    "global sketch": {"rule": "hull", "scope": "global", "engine": "sketch", "sketch_size": 512},
    "derivative": {"scope": "global", "engine": "derivative", "frac": 0.5, "position_steps": 1},
    "ball": {"rule": "ball", "engine": "sketch", "sketch_size": 512},
    "reverse": {"general": "stream", "rule": "full"},
    "micro": {"unit": "micro", "frac": 0.5},
    "micro direct": {"unit": "micro", "rule": "cone", "engine": "direct"},
}
EXACT = {"plain": None, "everything": {"frac": 1.0}, "everything micro": {"frac": 1.0, "unit": "micro"}}
GRPO = {"grpo plain": None, "grpo": {"frac": 0.0}}
TARGET_LOSSES = ("train-loss", "token-pg", "reward")


def run(case: str, world: int) -> Any:
    rows = 4 // world
    if case.startswith("micro"):  # the micro-batches stay what they are, and one rank has all of them
        rows, accumulation = 2, 4 // world
    else:
        accumulation = 2 if case in ("accumulated", *EXACT) else 1
    if case in GRPO:
        plugins = [] if GRPO[case] is None else [RolloutFilter(**GRPO[case])]
        return run_grpo(plugins, model(layers=1), per_device_train_batch_size=rows * 2)
    options = {**CASES, **EXACT}[case]
    plugin = None if options is None else DataRegularization(stream_batch_size=4 // world, **options)
    return _train(plugin, sharpened(model(layers=1)), rows, gradient_accumulation_steps=accumulation)


def _train(plugin: Any, net: Any, rows: int, **options: Any) -> Any:
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "per_device_train_batch_size": rows}
    return train(plugin, net, **{**sgd, **options})


class Short(RolloutFilter):
    """As if the loss saw only one token of each completion on the second rank, so that ranks differ in tokens."""

    @hookimpl
    def advantages(self, rollouts: Any, rewards: Any, advantages: Any) -> Any:
        return super().advantages(short(rollouts), rewards, advantages)


def short(rollouts: Any) -> Any:
    seen = rollouts.mask.clone()
    seen[:, 1 if dist.get_rank() == 1 else seen.shape[1] :] = 0
    return replace(rollouts, mask=seen)


def filtered(target_loss: str) -> dict[str, Any]:
    """This rank's completions of one step, and their advantages before and after the filter."""
    before, after = Before(), Witness()
    plugins = [before, Short(target_loss=target_loss, engine="direct"), after]
    options = {"max_steps": 1, "temperature": 0.9, "loss_type": "dapo", "per_device_train_batch_size": 8}
    run_grpo(plugins, only_norms(model(layers=1)), **options)
    (rollouts, rewards, raw), (_, _, advantages) = before.seen[0], after.seen[0]
    return {"rollouts": short(rollouts), "rewards": rewards, "raw": raw, "advantages": advantages}


def reverse() -> dict[str, Any]:
    """One step in which each rank chooses from its own batch of the general stream."""
    plugin = DataRegularization(general="stream", frac=0.5, stream_batch_size=4)
    options = {"data": GENERAL.select(range(4)), "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer = _train(plugin, sharpened(model(layers=1)), 2, **options)
    stream = trainer.ext_streams["general"]
    stream.position = 0
    general = [stream.dataset[i] for i in stream.next_indices()]
    return {"parameters": parameters(trainer), "general": general, "target": list(trainer.train_dataset)}


# -- faults ----------------------------------------------------------------------------------------------------------


class FailsInScoring(DataRegularization):
    """On the second rank alone, at the second step, before the ranks exchange scores."""

    def _begin_step(self, samples: Any, target: Any) -> Any:
        if dist.get_rank() == 1 and self._steps_done == 1:
            raise ArithmeticError("only here")
        return super()._begin_step(samples, target)


class FailsInBackward(DataRegularization):
    """On the second rank alone, at the second step, in the middle of the training backward pass."""

    def _begin_step(self, samples: Any, target: Any) -> Any:
        step = super()._begin_step(samples, target)
        if dist.get_rank() == 1 and self._steps_done == 1:

            def solve(problem: Any, rows: Any) -> Any:
                raise ArithmeticError("only here")

            step._solve = solve
        return step


def failing_reward(prompts: Any, completions: Any, **columns: Any) -> Any:
    if dist.get_rank() == 1:
        raise ArithmeticError("only here")
    return noisy_reward(prompts, completions, **columns)


def _filter(folder: Path) -> RolloutFilter:
    held_out = folder / f"held-out-{dist.get_rank()}.jsonl"
    TASK.dataset(4, kind="prompt_only", split="held_out").select_columns(["prompt", "answer"]).to_json(held_out)
    return RolloutFilter(
        target="prompts", prompts=str(held_out), reward="rank_worker:failing_reward", prompts_per_step=2, generations=2
    )


def fault(name: str, folder: Path) -> dict[str, Any]:
    """What a rank saw of a failure on rank 1."""
    try:
        if name == "advantages":
            trainer = run_grpo([_filter(folder)], model(layers=1), max_steps=3)
        else:
            backward = name.startswith("gradients_ready")
            cls = FailsInBackward if backward else FailsInScoring
            options: dict[str, Any] = {"unit": "micro"} if backward else {"engine": "sketch"}
            if name.endswith("rule=target"):
                options["rule"] = "target"
            trainer = _train(cls(stream_batch_size=2, **options), sharpened(model(layers=1)), 2, max_steps=3)
        error = f"none; {trainer.state.global_step} steps"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    dist.barrier()  # proves that no rank is still inside of a collective of the run
    return {"error": error}


def nan_target(options: dict[str, Any]) -> str:
    """What a rank saw of a target whose gradient is NaN."""
    plugin = DataRegularization(stream_batch_size=2, **options)
    try:
        _train(plugin, sharpened(model(layers=1)), 2, beside=[NanTarget()], nonfinite="raise")
        error = "none"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    dist.barrier()
    return error


NAN_TARGETS: dict[str, dict[str, Any]] = {"over both ranks": {}, "by micro-batch": {"unit": "micro"}}
FAULTS = ("sample_weights", "gradients_ready", "gradients_ready, rule=target", "advantages")


# -- resume ----------------------------------------------------------------------------------------------------------


def resumed(folder: Path) -> list[dict[str, str]]:
    """The files with counts after a run without a break, and after one that was resumed at its middle."""
    settings = {"output_dir": str(folder / "resumed"), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    found = []
    for checkpoint in (None, str(folder / "resumed" / "checkpoint-2")):
        plugin = DataRegularization(table=True, rule="filter")
        train(plugin, sharpened(model(layers=1)), resume=checkpoint, **settings)
        dist.barrier()
        files = folder / "resumed" / "data_regularization"
        found.append({path.name: path.read_text() for path in sorted(files.iterdir())})
        dist.barrier()
    return found


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*CASES, *EXACT, *GRPO):
        trainer = run(name, 2)
        assert trainer.accelerator.num_processes == 2
        found[name] = parameters(trainer)
        for parameter in found[name].values():
            other = parameter.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, parameter), f"{name}: ranks differ"
    for target_loss in TARGET_LOSSES:
        found[f"filter by {target_loss}"] = filtered(target_loss)
    found["reverse by rank"] = reverse()
    for name in FAULTS:
        found[f"fault in {name}"] = fault(name, folder)
    for name, options in NAN_TARGETS.items():
        found[f"nan target {name}"] = nan_target(options)
    found["resumed"] = resumed(folder)
    return found
