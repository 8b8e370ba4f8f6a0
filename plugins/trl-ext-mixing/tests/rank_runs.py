"""A run on two ranks: `main` gives what this rank saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from branches import SCHEDULE
from datasets import Dataset
from mixing_runs import Recorder, Rolled, constant_reward, demonstrations, grpo, mixed_reward
from oracles import completions
from transformers import AutoModelForCausalLM
from trl_ext_mixing import HPT, ParallelAveraging, ReLIFT

from trl_ext.errors import PluginError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

METHODS = ("hpt", "relift", "parallel-averaging:demonstrations=completion", "parallel-averaging:stream_row=row")


def failures(folder: Path) -> dict[str, Any]:
    """Rank 1 alone meets a row that has no demonstration: what each rank raises, by method."""
    raised = {}
    for method in METHODS:
        rows = demonstrations(8).to_list()
        for i, row in enumerate(rows):
            row["row"] = i if row["prompt"] != rows[3]["prompt"] else 99
            row["completion"] = row["completion"] if row["row"] != 99 else ""
        trainer = grpo(
            folder / "run",
            [method],
            stream=demonstrations(8) if "stream_row" in method else False,
            data=Dataset.from_list(rows),
            reward=constant_reward,
            ddp_backend="gloo",
            max_steps=4,
        )
        try:
            trainer.train()
        except PluginError as error:
            raised[method] = str(error), trainer.state.global_step
    return raised


def resume(folder: Path) -> dict[str, Any]:
    """An uninterrupted run, and one from its checkpoint, with accumulation."""
    settings: dict[str, Any] = {
        "optim": "adamw_torch",
        "max_grad_norm": 0.2,
        "gradient_accumulation_steps": 2,
        **SCHEDULE,
    }
    saved = {}
    for name in ("whole", "rest"):
        seen = Recorder()
        more = {"save_strategy": "steps", "save_steps": 2} if name == "whole" else {}
        trainer = grpo(
            folder / "run",
            [ParallelAveraging(batch_size=3, coefficient=0.3, coefficient_end=0.7)],
            recorder=seen,
            ddp_backend="gloo",
            **settings,
            **more,
        )
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if name == "rest" else None)
        saved[name] = {"rl": seen.rl, "sft": seen.sft, "weights": seen.weights}
    return saved


def main(folder: Path, kind: str) -> dict[str, Any]:
    """`kind`: ddp, fsdp2 or rows (parallel averaging), hpt, sharded hpt, relift, failures, or resume."""
    path = str(folder / "model")
    if kind in ("failures", "resume"):
        return {"failures": failures, "resume": resume}[kind](folder)
    if dist.get_rank() == 0:
        save_model(tiny_llama(hidden=16), tiny_tokenizer(), path)
    dist.barrier()
    options: dict[str, Any] = {}
    if kind in ("fsdp2", "rows", "sharded hpt"):
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=2)
    if "hpt" in kind or kind == "relift":
        options["dtype"] = torch.float64
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    seen, rolled = Recorder(), Rolled()
    if kind in ("ddp", "fsdp2"):
        plugins: list[Any] = [seen, ParallelAveraging(batch_size=3)]
        settings: dict[str, Any] = {"max_grad_norm": 0.2, "optim": "adamw_torch", **SCHEDULE}
    elif kind == "rows":
        plugins = [seen, ParallelAveraging(stream_row="row")]
        rows = demonstrations(12).remove_columns("completion").add_column("row", list(range(12)))
        settings = {"stream": demonstrations(12), "data": rows, "max_steps": 1}
    else:
        # Twelve completions in groups of four over two ranks: the second group is on both.
        plugins = [rolled, HPT() if "hpt" in kind else ReLIFT(buffer_size=2, batch_size=1), seen]
        settings = {
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 6,
            "stream": False,
            "data": demonstrations(24),
            "reward": mixed_reward,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
    trainer = grpo(folder / "run", plugins, model=model, ddp_backend="gloo", rank_check_steps=1, **settings)
    trainer.train()
    return {
        "rl": seen.rl,
        "sft": seen.sft,
        "weights": seen.weights,
        "logs": [e for e in trainer.state.log_history if "loss" in e],
        "inputs": [list(rollouts.inputs) for rollouts, _, _ in rolled.batches],
        "rewards": [rewards.total for _, rewards, _ in rolled.batches],
        "completions": [completions(rollouts, advantages) for rollouts, _, advantages in rolled.batches],
    }
