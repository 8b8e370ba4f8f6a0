"""What is refused, and why: options that cannot work together, and runs that cannot work with them.

Each refusal ends with what to do instead, and following that advice leads to a run that is not refused again.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_ext.records import RunDescription, SetupContext
from trl_ext_data_regularization.layers import Layer
from trl_ext_data_regularization.plan import Plan

_COUNTED = ("topk", "second-order")


def refuse_contradictions(plan: Plan) -> None:
    """Check options against one another.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    _refuse_idle_options(plan)
    rule, engine = plan.solver, plan.scored_by
    if plan.with_target and rule.uses_target:
        raise ValueError(f"rule={rule.name} has the target's gradient in its update already; leave with_target")
    if rule.frac == 0 and rule.name != "filter":
        raise ValueError(f"frac={plan.frac}: allowed is (0, 1] for rule={rule.name}")
    if rule.needs_gram and engine in ("ghost", "derivative"):
        raise ValueError(
            f"rule={rule.name} needs <g_i, g_j>, which engine={engine} does not give; use engine=direct or sketch"
        )
    if plan.precondition and (rule.needs_gram or rule.name in ("full", "target")):
        raise ValueError(f"precondition=True applies to rule=topk and rule=filter, not to rule={rule.name}")
    if plan.from_stream:
        _refuse_with_a_general_stream(plan)
    if engine == "derivative" and plan.layerwise:
        raise ValueError("engine=derivative scores all layers together; set scope=global")
    if not plan.layerwise and plan.passes == "one":
        raise ValueError("passes=one: a choice for all layers is known only after the backward pass; set passes=auto")
    if plan.report_steps and not plan.table:
        raise ValueError(f"report_steps={plan.report_steps} writes the table; set table=true, too")


def _refuse_idle_options(plan: Plan) -> None:
    """Refuse what was set and would do nothing."""
    rule, engine = plan.rule, plan.scored_by
    for option, idle, use in (
        (
            "frac",
            plan.frac is None or rule in (*_COUNTED, "filter", "capped"),
            "rule=topk, second-order, capped or filter",
        ),
        ("radius", plan.radius == 1 or rule == "ball", "rule=ball"),
        ("points", plan.points == 2 or engine == "derivative", "scope=global,engine=derivative"),
        ("sketch_size", plan.sketch_size == 64 or engine == "sketch", "engine=sketch"),
    ):
        if not idle:
            raise ValueError(f"{option}={getattr(plan, option)} has no effect here; leave it, or set {use}")


def _refuse_with_a_general_stream(plan: Plan) -> None:
    """Refuse what needs the trainer's own data to be the general ones."""
    if plan.scored_by == "derivative":
        raise ValueError(
            "engine=derivative scores the trainer's own samples; with general=stream use scope=layer,engine=ghost, or "
            "make the general data the trainer's own (general=train)"
        )
    if not plan.layerwise:
        raise ValueError(
            "scope=global weighs the trainer's own samples; with general=stream use scope=layer, or make the general "
            "data the trainer's own (general=train)"
        )
    if plan.position_steps:
        raise ValueError(
            "position_steps takes the gradient of the trainer's own general data; with general=stream leave it"
        )
    if plan.passes == "two" or plan.per_micro_batch:
        raise ValueError("general=stream chooses per layer in the stream's one pass; leave passes and unit as they are")


def refuse_run(plan: Plan, run: RunDescription) -> None:
    """Check options against the run.

    Raises:
        ValueError: naming the setting to change.
    """
    args, rule, engine = run.args, plan.solver, plan.scored_by
    if run.sharding not in ("none", "ddp", "fsdp2"):
        raise ValueError(f"under {run.sharding} no rank has the gradient of a layer; use FSDP2 or DDP")
    if run.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("samples are weighed over all ranks; set average_tokens_across_devices=True")
    across = run.world_size > 1 and not plan.per_micro_batch and not plan.from_stream
    if across and rule.needs_gram and engine == "direct":
        raise ValueError(
            f"rule={rule.name} over {run.world_size} ranks needs inner products between ranks, and engine=direct keeps "
            "gradients local; use engine=sketch, or unit=micro"
        )
    low = [*run.low_precision, *(["bf16_full_eval=False"] if args.bf16_full_eval else [])]
    if engine == "derivative" and low:
        raise ValueError(
            "engine=derivative takes differences of losses, which bf16 and fp16 round away; "
            f"set {' and '.join(low)}, or use engine=ghost"
        )
    if plan.from_stream and run.streams != ("general",):
        raise ValueError(f"general=stream works with the one stream 'general', not with {', '.join(run.streams)}")
    if rule.name in _COUNTED and not getattr(args, "packing", False) and _samples(plan, run) == 1:
        raise ValueError(
            f"rule={rule.name} chooses among one sample, which is plain training; raise "
            + (
                "stream_batch_size"
                if plan.from_stream
                else "per_device_train_batch_size"
                if plan.per_micro_batch
                else "per_device_train_batch_size or gradient_accumulation_steps"
            )
            + ", or use a rule that may drop it (rule=filter)"
        )


def _samples(plan: Plan, run: RunDescription) -> int:
    """How many samples one choice is made among."""
    if plan.from_stream:
        return plan.stream_batch_size or 8
    rows: int = run.args.per_device_train_batch_size
    return rows if plan.per_micro_batch else rows * run.args.gradient_accumulation_steps * run.world_size


def one_pass(plan: Plan, layers: Sequence[Layer], context: SetupContext) -> bool:
    """Whether layers choose in the middle of the training backward pass: where that is exact, and wanted.

    Raises:
        ValueError: one pass is asked for, and cannot be.
    """
    alone = context.gradient_accumulation_steps == 1 and context.world_size == 1
    exact = plan.layerwise and (alone or plan.per_micro_batch or plan.from_stream)
    shared = [layer.name for layer in layers if layer.uses > 1]
    if plan.passes == "one" and not exact:
        raise ValueError(
            "passes=one needs gradient_accumulation_steps=1 on one rank, or unit=micro: a choice over the window "
            "cannot be made in its middle; set passes=auto"
        )
    if shared and (plan.passes == "one" or plan.from_stream):
        raise ValueError(
            f"{shared[0]} is used by two modules (a tied embedding), whose scores are complete only after both: "
            "too late for one pass. Freeze it, or set passes=two and general=train"
        )
    return exact and not shared and plan.passes != "two"
