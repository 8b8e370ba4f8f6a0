"""Cases on two real ranks: they train as one, with shards too, and fail as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from transformers.distributed import DistributedConfig

from trl_ext.testing.conformance.case import Skipped, case
from trl_ext.testing.conformance.failing import failures
from trl_ext.testing.conformance.missing_labels import completions_without_labels, rows_without_labels
from trl_ext.testing.conformance.subject import RANKS, Run, Subject, require_close, require_same_bits
from trl_ext.testing.models import save_model
from trl_ext.testing.ranks import on_ranks, why_not
from trl_ext.testing.runs import start_model, tokenizer

PATIENCE = 20.0
"""Seconds that a rank waits for the other one in a collective."""


@case()
def two_ranks(subject: Subject, folder: Path) -> None:
    """Two ranks with half of the batch each hold the same weights, and train as one rank with the whole batch.

    What a hook computes from its rank's rows alone makes the ranks differ, or the step depend on their number: reduce
    it over the ranks, or give numerators and leave the denominators to the core.
    """
    both = _copies(subject, folder)
    require_same_bits(both[1].parameters, both[0].parameters, "the weights of rank 1, against those of rank 0")
    require_close(both[0], _alone(subject, folder), "two ranks, and one with the whole batch")


@case()
def rank_without_labels(subject: Subject, folder: Path) -> None:
    """Where the rows of one rank hold no label at all, two ranks still train as one rank with the whole batch.

    TRL drops rows without labels where it cuts to `max_length`, and keeps those that are tokenized beforehand. In GRPO
    a rank has none where all of its completions are cut off and `mask_truncated_completions` leaves them out; its rows
    of the streams have none then either. A mean over no tokens is NaN, and a rank that returns early misses the others'
    collectives: give a numerator of zero that has a gradient, as `0 * log_probs.sum()`.
    """
    settings = rows_without_labels(subject) if subject.trainer == "sft" else completions_without_labels(subject)
    both = _on_ranks(_run, subject, folder / "two", settings)
    require_same_bits(both[1].parameters, both[0].parameters, "the weights of rank 1, against those of rank 0")
    require_close(both[0], _alone(subject, folder, settings), "two ranks, and one with the whole batch")


@case()
def failure_on_one_rank(subject: Subject, folder: Path) -> str:
    """An exception in a hook on one rank ends both ranks at the same step with the same message.

    On rank 1 alone, each hook in turn is given data that raise when they are touched, as a fault of its own would;
    what all ranks know alike, such as settings and rewards, stays. A rank that goes on alone would wait in the next
    collective until its timeout. A hook that calls `torch.distributed` by itself has to exchange the error first; see
    docs/hooks.md.
    """
    names = failures(subject)
    for name in names:
        outcomes = _on_ranks(_fail, subject, folder / name, name)
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
    save_model(start_model(subject.trainer), tokenizer(), folder / "model")
    settings = {"model": str(folder / "model")}
    shards = _on_ranks(_run, subject, folder / "fsdp2", settings)
    require_close(shards[0], _copies(subject, folder)[0], "in shards, and in two copies")


def _on_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function gives on each rank.

    Raises:
        Skipped: this machine cannot run several.
    """
    if reason := why_not():
        raise Skipped(reason)
    return on_ranks(function, *arguments, ranks=RANKS, patience=PATIENCE)


def _copies(subject: Subject, folder: Path) -> list[Run]:
    """The usual run on two ranks (DDP)."""
    return subject.once("ddp", lambda: _on_ranks(_run, subject, folder / "ddp"))


def _alone(subject: Subject, folder: Path, settings: Mapping[str, Any] = MappingProxyType({})) -> Run:
    """The run on one rank; with a micro-batch for each of the ranks, where it matters what is in a micro-batch."""
    if "accumulation" in subject.unsupported:
        halves: dict[str, Any] = {
            "per_device_train_batch_size": subject.rows // RANKS,
            "gradient_accumulation_steps": RANKS,
        }
        return subject.run(folder / "halves", **halves, **settings)
    return subject.run(folder / "one", **settings) if settings else subject.usual(folder)


def _run(subject: Subject, folder: Path, settings: Mapping[str, Any] = MappingProxyType({})) -> Run:
    """The run on this rank, without what cannot be sent. A model that is named by its folder is loaded in shards."""
    settings = dict(settings)
    if "model" in settings:
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        kind = type(start_model(subject.trainer))
        settings["model"] = kind.from_pretrained(settings["model"], distributed_config=config)
    run = subject.run(folder / "run", per_device_train_batch_size=subject.rows // RANKS, **settings)
    return replace(run, trainer=None, plugin=None, state={})


def _fail(subject: Subject, folder: Path, name: str) -> tuple[list[str], str, int]:
    """How this rank ends where rank 1 fails: the classes of the error, its message, and the steps done."""
    trainer, train = failures(subject)[name](subject, folder, dist.get_rank() == 1)
    try:
        train()
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error), trainer.state.global_step
    return ["nothing"], "no error", trainer.state.global_step
