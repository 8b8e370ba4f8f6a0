"""Run under torchrun: a run of parallel averaging on two ranks, DDP or FSDP2; each rank saves what it saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from branches import SCHEDULE
from mixing_runs import Recorder, grpo
from transformers import AutoModelForCausalLM
from trl_ext_mixing import ParallelAveraging

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer


def main(folder: Path, sharding: str) -> None:
    path = str(folder / "model")
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_model(tiny_llama(hidden=16), tiny_tokenizer(), path)
    dist.barrier()
    model: Any
    if sharding == "fsdp2":
        from transformers.distributed import DistributedConfig

        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2))
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    seen = Recorder()
    trainer = grpo(
        folder / "run",
        [ParallelAveraging(batch_size=3)],
        recorder=seen,
        model=model,
        ddp_backend="gloo",
        rank_check_steps=1,
        max_grad_norm=0.2,
        optim="adamw_torch",
        **SCHEDULE,
    )
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    torch.save(
        {"rl": seen.rl, "sft": seen.sft, "weights": seen.weights, "logs": logs},
        folder / f"rank{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
