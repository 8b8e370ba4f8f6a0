"""The methods of `trl-ext average`: from inputs and options to a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_averaging.offline import rules
from trl_ext_averaging.offline.checkpoint import Checkpoint, checkpoints_of, latest, open_checkpoint
from trl_ext_averaging.offline.online_state import open_online_average
from trl_ext_averaging.offline.plan import Plan
from trl_ext_averaging.offline.rules import Rule


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        inputs: folders, as given; a run's output folder stands for its checkpoints in `lawa` and `ema`.
        weights: `weighted`: one per input.
        alpha: `wise-ft`: share of the tuned weights; `slerp`: position between the two.
        decay, warmup: `ema`, as online.
        last, every: which checkpoints of a run: how many, counted from the latest, and steps between them.
        base: `slerp`: start of the task vectors; `ema`: the start.
        name: `online`: the average to take out of a checkpoint's state.
        shared: further fields of `Plan`.
    """

    method: str
    inputs: tuple[Path, ...]
    weights: tuple[float, ...] | None = None
    alpha: float = 0.5
    decay: float = 0.9
    warmup: bool = False
    last: int | None = None
    every: int | None = None
    base: Path | None = None
    name: str = "ema"
    shared: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Open the inputs and plan.

        Raises:
            CheckpointError: an input cannot be read.
            ConfigurationError: unknown method, or inputs and options that do not fit it.
        """
        if self.method not in METHODS:
            known = ", ".join([*METHODS, "soup", "mergekit:<name>"])
            raise ConfigurationError(f"--method {self.method!r} is not one of {known}")
        return METHODS[self.method](self)

    def at(self, value: float) -> Request:
        """The same at another point of the sweep."""
        option = SWEPT.get(self.method)
        if option is None:
            raise ConfigurationError(f"--sweep goes with {', '.join(SWEPT)}; {self.method} has nothing to sweep")
        if option == "last" and not (value >= 1 and value.is_integer()):
            raise ConfigurationError(f"--sweep {value:g}: lawa takes a whole number of checkpoints, 1 or more")
        changed: dict[str, Any] = {option: int(value) if option == "last" else value}
        return replace(self, **changed)


SWEPT = {"wise-ft": "alpha", "slerp": "alpha", "ema": "decay", "lawa": "last"}
OPTIONS: dict[str, tuple[str, ...]] = {
    "weights": ("weighted", "mergekit"),
    "alpha": ("wise-ft", "slerp"),
    "decay": ("ema",),
    "warmup": ("ema",),
    "last": ("lawa", "ema"),
    "every": ("lawa", "ema"),
    "base": ("slerp", "ema", "mergekit"),
    "name": ("online",),
    "parameters": ("mergekit",),
}
"""Option -> the methods that it means something to; options that are not here mean something to all."""


def mean_plan(request: Request, inputs: Sequence[Checkpoint]) -> Plan:
    """The mean of open checkpoints (also the greedy soup's)."""
    return Plan(inputs, rules.mean(len(inputs)), request.method, **request.shared)


def open_all(request: Request, least: int = 1, most: int | None = None) -> list[Checkpoint]:
    """The inputs as they are, in the number that the method takes."""
    n = len(request.inputs)
    if n < least or (most is not None and n > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigurationError(f"--method {request.method} takes {wanted} inputs, not {n}")
    return [open_checkpoint(path) for path in request.inputs]


def _of_run(request: Request) -> list[Checkpoint]:
    """Checkpoints in the order of training: a run's, or those given."""
    opened = checkpoints_of(request.inputs[0]) if len(request.inputs) == 1 else []
    kept = latest(opened or open_all(request), request.last, request.every)
    if request.last is not None and len(kept) < request.last:
        raise ConfigurationError(f"--last {request.last}: there are only {len(kept)} such checkpoints")
    return kept


def _mean(request: Request) -> Plan:
    return mean_plan(request, open_all(request, least=2))


def _weighted(request: Request) -> Plan:
    inputs = open_all(request)
    if request.weights is None or len(request.weights) != len(inputs):
        raise ConfigurationError(f"--method weighted needs --weights with {len(inputs)} numbers, one per input")
    if not abs(sum(request.weights) - 1) <= 1e-6:  # so that NaN is refused too
        raise ConfigurationError(f"--weights sum to {sum(request.weights):g}; they must sum to 1")
    return Plan(inputs, request.weights, "weighted", **request.shared)


def _lawa(request: Request) -> Plan:
    inputs = _of_run(request)
    options = {"last": len(inputs), **({"every": request.every} if request.every else {})}
    return Plan(inputs, rules.mean(len(inputs)), "lawa", options, **request.shared)


def _ema(request: Request) -> Plan:
    if not 0 <= request.decay < 1:
        raise ConfigurationError(f"--decay {request.decay} is not in [0, 1)")
    start = [] if request.base is None else [open_checkpoint(request.base)]
    inputs = start + _of_run(request)
    options = {"decay": request.decay, "warmup": request.warmup}
    return Plan(inputs, rules.ema(len(inputs), request.decay, request.warmup), "ema", options, **request.shared)


def _wise_ft(request: Request) -> Plan:
    _check_alpha(request)
    inputs = open_all(request, least=1, most=2)
    if len(inputs) == 1 and inputs[0].kind == "model":
        raise ConfigurationError("--method wise-ft takes the start and the tuned model; only an adapter may come alone")
    coefficients = rules.wise_ft(request.alpha)[-len(inputs) :]  # an adapter alone starts from nothing
    return Plan(inputs, coefficients, "wise-ft", {"alpha": request.alpha}, **request.shared)


def _slerp(request: Request) -> Plan:
    _check_alpha(request)
    inputs = open_all(request, least=2, most=2)
    base = [] if request.base is None else [open_checkpoint(request.base)]
    rule: Rule = rules.slerp(request.alpha, with_base=bool(base))
    return Plan([*base, *inputs], rule, "slerp", {"alpha": request.alpha}, **request.shared)


def _online(request: Request) -> Plan:
    if len(request.inputs) != 1:
        raise ConfigurationError(f"--method online takes 1 checkpoint of a training run, not {len(request.inputs)}")
    raw = open_checkpoint(request.inputs[0])
    average = open_online_average(raw, request.name)
    shared = request.shared if raw.kind == "model" else {**request.shared, "lora": "factors"}
    return Plan([average], [1.0], "online", {"name": request.name}, like=raw, **shared)


def _check_alpha(request: Request) -> None:
    if not 0 <= request.alpha <= 1:
        raise ConfigurationError(f"--alpha {request.alpha} is not in [0, 1]")


METHODS: dict[str, Callable[[Request], Plan]] = {
    "mean": _mean,
    "weighted": _weighted,
    "lawa": _lawa,
    "ema": _ema,
    "wise-ft": _wise_ft,
    "slerp": _slerp,
    "online": _online,
}
