"""What is refused, and why: options that cannot work together, and runs that cannot work with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from trl_ext.records import RunDescription, SetupContext
from trl_ext_data_regularization.layers import Layer
from trl_ext_data_regularization.solvers import Rule

if TYPE_CHECKING:
    from trl_ext_data_regularization.plugin import DataRegularization

_COUNTED = ("topk", "second-order")


def refuse_unknown_choices(plugin: Any) -> None:
    """Refuse, from Python too, what is not among an option's literals.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    for name, kind in get_type_hints(type(plugin)).items():
        if get_origin(kind) is Literal and getattr(plugin, name) not in get_args(kind):
            raise ValueError(f"{name}={getattr(plugin, name)!r} is not one of {', '.join(map(str, get_args(kind)))}")


def validate(plugin: DataRegularization, rule: Rule, engine: str) -> None:
    """Check options against one another.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    refuse_unknown_choices(plugin)
    for option, idle, use in (
        (
            "frac",
            plugin.frac is None or rule.name in (*_COUNTED, "filter", "capped"),
            "rule=topk, second-order, capped or filter",
        ),
        ("radius", plugin.radius == 1 or rule.name == "ball", "rule=ball"),
        ("points", plugin.points == 2 or engine == "derivative", "engine=derivative"),
        ("sketch_size", plugin.sketch_size == 64 or engine == "sketch", "engine=sketch"),
    ):
        if not idle:
            raise ValueError(f"{option}={getattr(plugin, option)} has no effect here; leave it, or set {use}")
    if plugin.with_target and rule.name in ("target", "ball"):
        raise ValueError(f"rule={rule.name} has the target's gradient in its update already; leave with_target")
    low = 0 if rule.name == "filter" else 1e-9
    if not low <= rule.frac <= 1:
        raise ValueError(f"frac={plugin.frac}: allowed is {'[0, 1]' if low == 0 else '(0, 1]'} for rule={rule.name}")
    if plugin.radius < 0:
        raise ValueError(f"radius={plugin.radius}: a ball's radius is at least 0")
    for name in ("sketch_size", "stream_batch_size", "stream_max_length"):
        value = getattr(plugin, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if plugin.report_steps < 0:
        raise ValueError(f"report_steps={plugin.report_steps}: at least 0")
    if rule.needs_gram and engine in ("ghost", "derivative"):
        raise ValueError(
            f"rule={rule.name} needs <g_i, g_j>, which engine={engine} does not give; use direct or sketch"
        )
    if engine == "derivative" and plugin.scope != "global":
        raise ValueError("engine=derivative scores all layers together; set scope=global")
    if plugin.scope == "global" and plugin.passes == "one":
        raise ValueError("passes=one needs scope=layer: a global choice is known only after the backward pass")
    if plugin.general == "stream" and plugin.scope == "global":
        raise ValueError(
            "scope=global weighs the trainer's own samples; with general=stream use scope=layer, or make the general "
            "data the trainer's own"
        )
    if plugin.position_steps < 0:
        raise ValueError(f"position_steps={plugin.position_steps}: at least 0")
    if plugin.general == "stream" and plugin.position_steps:
        raise ValueError(
            "position_steps takes the gradient of the trainer's own general data; with general=stream leave it"
        )
    if plugin.report_steps and not plugin.table:
        raise ValueError(f"report_steps={plugin.report_steps} writes the table; set table=true, too")
    if plugin.general == "stream" and (plugin.passes == "two" or plugin.unit == "micro"):
        raise ValueError("general=stream chooses per layer in the stream's one pass; leave passes and unit as they are")
    if plugin.precondition and (rule.needs_gram or rule.name in ("full", "target")):
        raise ValueError(f"precondition=True applies to rule=topk and rule=filter, not to rule={rule.name}")


def refuse(plugin: DataRegularization, rule: Rule, engine: str, run: RunDescription) -> None:
    """Check options against the run.

    Raises:
        ValueError: naming the setting to change.
    """
    args = run.args
    if run.sharding not in ("none", "ddp") and not (run.sharding == "fsdp2" and engine == "derivative"):
        raise ValueError(
            f"under {run.sharding} no rank sees whole layers, which scope={plugin.scope},engine={engine} needs; use "
            "scope=global,engine=derivative (FSDP2), or DDP"
        )
    if run.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("samples are weighed over all ranks; set average_tokens_across_devices=True")
    across = run.world_size > 1 and plugin.unit == "step" and plugin.general == "train"
    if across and rule.needs_gram and engine == "direct":
        raise ValueError(
            f"rule={rule.name} over {run.world_size} ranks needs inner products between ranks, and engine=direct keeps "
            "gradients local; use engine=sketch, or unit=micro"
        )
    if engine == "derivative" and (args.bf16 or getattr(args, "bf16_full_eval", False)):
        raise ValueError(
            "engine=derivative takes differences of losses, which bf16 rounds away; set bf16=False or use ghost"
        )
    if plugin.general == "stream":
        if run.streams != ("general",):
            raise ValueError(f"general=stream works with the one stream 'general', not with {', '.join(run.streams)}")
        samples = plugin.stream_batch_size or 8
    else:
        samples = args.per_device_train_batch_size
        if plugin.unit == "step":
            samples *= args.gradient_accumulation_steps * run.world_size
    if samples == 1 and rule.name in _COUNTED and not getattr(args, "packing", False):
        raise ValueError(
            f"rule={rule.name} chooses among one sample, which is plain training; raise per_device_train_batch_size, "
            "gradient_accumulation_steps or stream_batch_size, or use a rule that may drop it (filter)"
        )


def one_pass(plugin: DataRegularization, layers: Sequence[Layer], context: SetupContext) -> bool:
    """Whether layers choose in the middle of the training backward pass: where that is exact, and wanted.

    Raises:
        ValueError: one pass is asked for, and cannot be.
    """
    alone = context.gradient_accumulation_steps == 1 and context.world_size == 1
    exact = plugin.scope == "layer" and (alone or plugin.unit == "micro" or plugin.general == "stream")
    shared = [layer.name for layer in layers if layer.uses > 1]
    if plugin.passes == "one" and not exact:
        raise ValueError(
            "passes=one needs gradient_accumulation_steps=1 on one rank, or unit=micro: a choice over the window "
            "cannot be made in its middle; set passes=auto"
        )
    if shared and (plugin.passes == "one" or plugin.general == "stream"):
        raise ValueError(
            f"{shared[0]} is used by two modules (a tied embedding), whose scores are complete only after both: "
            "too late for one pass. Freeze it, or set passes=two and general=train"
        )
    return exact and not shared and plugin.passes != "two"
