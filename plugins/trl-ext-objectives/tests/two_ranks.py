"""Run by torchrun, or alone: trains with each objective in turn and saves the weights and losses on rank 0.

    two_ranks.py OUTPUT OBJECTIVE...

Alone, two micro-batches a step are accumulated; on two ranks each takes one of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import datasets
import torch

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import Addition, tiny_llama, tiny_tokenizer

datasets.disable_progress_bars()


def main() -> None:
    output, *objectives = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    results = {}
    for objective in objectives:
        torch.manual_seed(0)
        args = SFTConfig(
            output,
            plugins=[objective],
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            activation_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            max_steps=3,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2 // ranks,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
        )
        trainer = SFTTrainer(
            model=tiny_llama(hidden=16, layers=1),
            args=args,
            train_dataset=Addition(digits=3).dataset(24),
            processing_class=tiny_tokenizer(),
        )
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(trainer.model.parameters(), start, strict=True)])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[objective] = {"moved": moved, "losses": losses}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, Path(output) / f"{ranks}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
