"""What a run has to have for these methods, checked before the model loads."""

from __future__ import annotations

from typing import Any

from trl_ext.records import RunDescription

CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")
"""Values of TRL's `loss_type` whose policy term is the clipped ratio times the advantage."""


def refuse_small_groups(args: Any, least: int, setting: str) -> None:
    """Raise where training has fewer completions a prompt than a method needs; evaluation may have fewer.

    Args:
        args: the trainer's config.
        least: completions that the method needs.
        setting: the option in words, for the message.

    Raises:
        ValueError: naming both numbers.
    """
    if args.num_generations < least:
        raise ValueError(
            f"{setting} needs {least} completions a prompt, and num_generations={args.num_generations}; lower k or "
            f"set num_generations={least}"
        )


def refuse_other_sums(args: Any) -> None:
    """Raise where TRL is asked for advantages that are no function of the weighted sum of rewards.

    Raises:
        ValueError: naming the setting.
    """
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"advantages are made anew of the weighted sum of rewards, and multi_objective_aggregation="
            f"{args.multi_objective_aggregation!r} asks TRL for others; set it to 'sum_then_normalize'"
        )


def refuse_other_terms(run: RunDescription) -> None:
    """Raise where TRL is asked for another policy term than the one that a method changes.

    Raises:
        ValueError: naming the setting.
    """
    args = run.args
    if args.loss_type not in CLIPPED:
        raise ValueError(
            f"loss_type={args.loss_type!r} has a policy term of its own, which would be replaced by the clipped "
            f"ratio; set it to one of {', '.join(CLIPPED)}"
        )
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r}: the method is about the ratios of tokens; "
            "set it to 'token'"
        )
