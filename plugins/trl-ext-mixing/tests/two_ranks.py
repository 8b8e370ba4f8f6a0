"""Run under torchrun: a run on two ranks; each rank saves what it saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from branches import SCHEDULE
from mixing_runs import Recorder, Rolled, demonstrations, grpo, mixed_reward
from oracles import completions
from transformers import AutoModelForCausalLM
from trl_ext_mixing import HPT, ParallelAveraging, ReLIFT

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer


def main(folder: Path, kind: str) -> None:
    """`kind`: ddp or fsdp2 (parallel averaging), hpt, or relift."""
    path = str(folder / "model")
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_model(tiny_llama(hidden=16), tiny_tokenizer(), path)
    dist.barrier()
    options: dict[str, Any] = {}
    if kind == "fsdp2":
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    seen, rolled = Recorder(), Rolled()
    if kind in ("ddp", "fsdp2"):
        plugins: list[Any] = [seen, ParallelAveraging(batch_size=3)]
        settings: dict[str, Any] = {"max_grad_norm": 0.2, "optim": "adamw_torch", **SCHEDULE}
    else:
        # Twelve completions in groups of four over two ranks: the second group is on both.
        plugins = [rolled, HPT() if kind == "hpt" else ReLIFT(buffer_size=2, batch_size=1), seen]
        model = model.double()
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
    saved = {
        "rl": seen.rl,
        "sft": seen.sft,
        "weights": seen.weights,
        "logs": [e for e in trainer.state.log_history if "loss" in e],
        "inputs": [list(rollouts.inputs) for rollouts, _, _ in rolled.batches],
        "rewards": [rewards.total for _, rewards, _ in rolled.batches],
        "completions": [completions(rollouts, advantages) for rollouts, _, advantages in rolled.batches],
    }
    torch.save(saved, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
