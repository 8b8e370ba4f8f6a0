"""Cases on two real ranks: they train as one, with shards too, and fail as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.failing import failures
from trl_ext.testing.conformance.subject import Subject, require_close_parameters, require_same_bits
from trl_ext.testing.models import save_model
from trl_ext.testing.ranks import on_ranks
from trl_ext.testing.runs import tiny_model, tokenizer

RANKS = 2
PATIENCE = 20.0
"""Seconds that a rank waits for the other one in a collective."""
Parameters = dict[str, Tensor]


@case(setting=True)
def two_ranks(subject: Subject, folder: Path) -> None:
    """Two ranks with half of the batch each hold the same weights, and train as one rank with the whole batch.

    What a hook computes from its rank's rows alone makes the ranks differ, or the step depend on their number: reduce
    it over the ranks, or give numerators and leave the denominators to the core.
    """
    both = on_ranks(_train, subject, folder / "two", patience=PATIENCE)
    require_same_bits(both[1], both[0], "the weights of rank 1, against those of rank 0")
    require_close_parameters(both[0], subject.run(folder / "one"), "two ranks, and one with the whole batch")


@case(trainers=("sft",), setting=True)
def rank_without_labels(subject: Subject, folder: Path) -> None:
    """Where the rows of one rank hold no label at all, two ranks still train as one rank with the whole batch.

    With long prompts this happens in real data. A mean over no tokens is NaN, and a rank that returns early misses
    the others' collectives: give a numerator of zero that has a gradient, as `0 * log_probs.sum()`.
    """
    settings = {"train": _some_without_labels(), "train_sampling_strategy": "sequential", "max_length": 16}
    both = on_ranks(_train, subject, folder / "two", settings, patience=PATIENCE)
    require_same_bits(both[1], both[0], "the weights of rank 1, against those of rank 0")
    require_close_parameters(
        both[0], subject.run(folder / "one", **settings), "two ranks, and one with the whole batch"
    )


@case()
def failure_on_one_rank(subject: Subject, folder: Path) -> str:
    """An exception in a hook on one rank ends both ranks at the same step with the same message.

    On rank 1 alone, each hook in turn is given arguments that raise when they are touched, as a fault of its own
    would. A rank that goes on alone would wait in the next collective until its timeout. A hook that calls
    `torch.distributed` by itself has to exchange the error first; see docs/hooks.md.
    """
    names = failures(subject)
    for name in names:
        outcomes = on_ranks(_fail, subject, folder / name, name, patience=PATIENCE)
        for rank, (kinds, message, step) in enumerate(outcomes):
            assert "PluginError" in kinds or "CheckpointError" in kinds, (
                f"where {name} fails on rank 1, rank {rank} ends with {kinds[0]}: {message}"
            )
            assert name in message, f"where {name} fails on rank 1, rank {rank} does not say so: {message}"
            assert (message, step) == outcomes[0][1:], (
                f"where {name} fails on rank 1, the ranks end at steps {outcomes[0][2]} and {step}: "
                f"{outcomes[0][1]}; {message}"
            )
    return f"in {', '.join(names)}"


@case(setting=True)
def fsdp2(subject: Subject, folder: Path) -> None:
    """With the model in shards on two ranks (FSDP2), the training is that of two whole copies (DDP).

    Parameters are DTensors then. A norm or a product over a rank's shard is not that over the parameter: use the
    gradient view, which reduces, or `weights.local()`.
    """
    shared = folder / "model"
    save_model(tiny_model(), tokenizer(), shared)
    copies = on_ranks(_run_change, subject, folder / "ddp", patience=PATIENCE)
    shards = on_ranks(_train, subject, folder / "fsdp2", {"model": str(shared)}, patience=PATIENCE)
    require_close_parameters(shards[0], copies[0], "in shards, and in two copies")


def _train(subject: Subject, folder: Path, settings: dict[str, Any] | None = None) -> Parameters:
    """Train on this rank; a model that is named by its folder is loaded in shards."""
    settings = dict(settings or {})
    if "model" in settings:
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        settings["model"] = AutoModelForCausalLM.from_pretrained(settings["model"], distributed_config=config)
    return subject.run(folder / "run", per_device_train_batch_size=subject.rows // RANKS, **settings).parameters


def _run_change(subject: Subject, folder: Path) -> Any:
    """The run on this rank, without what cannot be sent."""
    run = subject.run(folder / "run", per_device_train_batch_size=subject.rows // RANKS)
    run.trainer = run.plugin = None
    return run


def _fail(subject: Subject, folder: Path, name: str) -> tuple[list[str], str, int]:
    """How this rank ends where rank 1 fails: the classes of the error, its message, and the steps done."""
    trainer, train = failures(subject)[name](subject, folder, dist.get_rank() == 1)
    try:
        train()
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error), trainer.state.global_step
    return ["nothing"], "no error", trainer.state.global_step


def _some_without_labels() -> Dataset:
    """Rows of which every fourth pair has a prompt so long that nothing of the completion is left."""
    long = "x" * 40
    rows = [
        {"prompt": long if i % 4 >= 2 else f"{i % 7}+{i % 5}=", "completion": f"{i % 7 + i % 5}"} for i in range(24)
    ]
    return Dataset.from_list(rows)
