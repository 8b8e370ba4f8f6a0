"""Two ranks with a micro-batch each equal one rank that accumulates both, for every objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer
from trl_ext.testing.ranks import on_ranks

OBJECTIVES = (
    *("nll", "power:alpha=linear:0.5:2", "log1mp", "focal", "huber:delta=0.997", "dft", "eaft:exponent=2", "deft"),
    *("talr", "entropy:beta=0.3", "idft", "chord-phi", "gem", "psft:refresh_every=2", "iw-sft:temperature=20"),
    *("rho1:reference=model:{other}", "asft:beta=0.5", "mixture:first=deft,second=iw-sft", "auto"),
    *("threshold:q=0.004,normalization=valid", "threshold:q=0.004,normalization=kept"),
)


def train(folder: Path, objectives: list[str], ranks: int) -> dict[str, dict[str, Any]]:
    """What a training with each objective changes and logs. Alone, two micro-batches a step are accumulated; on two
    ranks each takes one of them.
    """
    results = {}
    for objective in objectives:
        torch.manual_seed(0)
        args = SFTConfig(
            str(folder),
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
    return results


@pytest.mark.slow
def test_two_ranks_equal_one_with_both_micro_batches(tmp_path: Path) -> None:
    other = tiny_llama(hidden=16, layers=1, seed=5)
    with torch.no_grad():
        other.lm_head.weight.mul_(20)
    path = save_model(other, tiny_tokenizer(), tmp_path / "other")
    objectives = [objective.format(other=path) for objective in OBJECTIVES]
    alone = train(tmp_path / "alone", objectives, 1)
    both = on_ranks(train, tmp_path / "both", objectives, 2)[0]
    for objective in objectives:
        one, two = alone[objective], both[objective]
        assert two["losses"] == pytest.approx(one["losses"], rel=2e-5), objective
        # fp32 gradients summed in another order, over three steps.
        assert (two["moved"] - one["moved"]).norm() / one["moved"].norm() < 1e-4, objective
        assert one["moved"].norm() > 1e-6, objective
