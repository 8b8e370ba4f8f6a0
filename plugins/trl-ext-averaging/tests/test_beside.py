"""Updates beside the next step: the same numbers as at once, whoever writes to the weights or reads the copies next.

On a CPU the GPU's side stream is one that reads as late as it may (`late_lane.py`).
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from late_lane import LateLane, use_late_lanes
from tiny_runs import trainer
from torch import Tensor, nn
from trajectories import Recorded, context_of, trajectory, view_of
from trl_ext_averaging import Bema, Ema, Lawa, Swa, WiseFt, shadows
from trl_ext_averaging.beside import Beside

from trl_ext import SFTConfig, hookimpl
from trl_ext.errors import PluginError
from trl_ext.gradients import GradientView
from trl_ext.own_passes import wait_for_readers
from trl_ext.records import RunDescription

METHODS: list[tuple[Any, dict[str, Any]]] = [
    (Ema, {"decay": 0.7}),
    (Ema, {"decay": [0.7, 0.9], "warmup": True, "every": 2, "start": 1}),
    (Bema, {"every": 2}),
    (Swa, {}),
    (Lawa, {"k": 2, "every": 1, "device": "model"}),
    (WiseFt, {"alpha": 0.3, "device": "model"}),
]
ALL = pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: getattr(value, "__name__", None))


def train(plugin: Any, dtype: torch.dtype = torch.float32, device: str = "cpu", steps: int = 6) -> Tensor:
    """Adam on one layer, large on a GPU, so that an update is still running when the next step could overtake it."""
    torch.manual_seed(0)
    width = 4096 if device == "cuda" else 16
    model = nn.Linear(width, width, bias=False).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    plugin.setup(context_of(model))
    for step in range(1, steps + 1):
        model.weight.grad = torch.full_like(model.weight, (-1.0) ** step * step)
        optimizer.step()
        plugin.weights_updated(view_of(model), step, False)
    raw = model.weight.detach().clone()
    with plugin.deployed_weights(view_of(model)):
        averaged = model.weight.detach().clone()
    assert torch.equal(model.weight, raw)
    return averaged


# -- on a CPU: the order ---------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("slots", [1, 2])
def test_updates_beside_the_training_change_no_bit(
    method: Any, options: dict[str, Any], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(method(**options))
    lanes = use_late_lanes(monkeypatch, slots=slots)
    assert torch.equal(train(method(**options)), expected)
    assert bool(lanes) == method.follows


@pytest.fixture
def lane() -> LateLane:
    return LateLane()


def submitted(lane: LateLane, weights: Tensor) -> tuple[Beside, list[Tensor]]:
    """An update that keeps what it reads, when it is waited for."""
    seen: list[Tensor] = []
    beside = Beside(lane)
    beside.submit([weights], lambda theta: seen.append(theta[0].clone()))
    assert not seen
    return beside, seen


def stepped() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter of zeros, and an optimiser that takes one from each."""
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def test_an_optimiser_waits_until_the_weights_have_been_read(lane: LateLane) -> None:
    parameter, optimizer = stepped()
    _, seen = submitted(lane, parameter.data)
    optimizer.step()
    assert parameter.tolist() == [-1, -1, -1]
    assert seen[0].tolist() == [0, 0, 0]


def test_a_hook_of_any_plugin_waits_until_the_weights_have_been_read(lane: LateLane) -> None:
    weights = torch.zeros(3)
    beside, seen = submitted(lane, weights)
    wait_for_readers()
    weights.fill_(7)
    beside.wait()
    assert seen[0].tolist() == [0, 0, 0]


def test_an_error_is_raised_where_the_plugin_waits_and_not_in_the_optimiser(lane: LateLane) -> None:
    def fail(theta: list[Tensor]) -> None:
        raise ZeroDivisionError

    parameter, optimizer = stepped()
    beside = Beside(lane)
    beside.submit([parameter.data], fail)
    optimizer.step()
    with pytest.raises(ZeroDivisionError):
        beside.wait()
    beside.wait()  # it has been said


def test_no_more_updates_are_under_way_than_the_lane_has_slots_for() -> None:
    lane = LateLane(slots=2)
    beside = Beside(lane)
    for _ in range(3):
        beside.submit([], lambda theta: None)
    assert [update.done for update in lane.updates] == [True, False, False]
    beside.wait()
    assert all(update.done for update in lane.updates)


def test_what_is_closed_or_dropped_leaves_the_optimisers(lane: LateLane) -> None:
    _, optimizer = stepped()
    kept, dropped = Beside(lane), Beside(lane)
    optimizer.step()
    assert lane.asked == 2
    kept.close()
    assert lane.closed
    optimizer.step()
    assert lane.asked == 3
    del dropped
    gc.collect()
    optimizer.step()
    assert lane.asked == 3
    wait_for_readers()
    assert lane.asked == 4  # `kept` is still here to be asked, and has nothing under way


# -- on a CPU: whole runs --------------------------------------------------------------------------------------------


class Shrinking:
    """Writes to the weights in the middle of a step."""

    requires_api: ClassVar[str] = "1"

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Any) -> None:
        for parameter in gradients.parameters:
            parameter.detach().mul_(0.9)


def average(
    folder: Path, plugin: str = "ema:decay=0.6,compare=true", resume: bool = False, **config: Any
) -> list[Tensor]:
    """The average at the end of a run of six steps, with an evaluation after every second."""
    made = trainer(folder, [plugin], eval_strategy="steps", eval_steps=2, **config)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    (ema,) = (plugin.instance for plugin in made.ext_plugins if plugin.name == "ema")
    return [value.clone() for value in ema.state_dict().values() if isinstance(value, Tensor)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("plugin", "optim"),
    [("ema:decay=0.6,compare=true", "adamw_torch"), ("ema:decay=0.6,deploy=raw", "schedule_free_adamw")],
)
def test_a_run_ends_with_the_same_average(
    plugin: str, optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, also where the optimiser moves the raw weights to evaluate them."""
    expected = average(tmp_path / "plain", plugin, optim=optim)
    lanes = use_late_lanes(monkeypatch)
    assert same(average(tmp_path / "beside", plugin, optim=optim), expected)
    assert len(lanes[0].updates) == 6
    assert lanes[0].closed  # at the end of the training, after which the best model may be loaded


def test_a_run_resumes_with_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    expected = average(tmp_path / "plain", **saving)
    use_late_lanes(monkeypatch)
    assert same(average(tmp_path / "beside", **saving), expected)
    assert same(average(tmp_path / "beside", resume=True, **saving), expected)


def test_a_hook_that_writes_to_the_weights_is_not_averaged_before_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = average(tmp_path / "plain", recorder=Shrinking())
    use_late_lanes(monkeypatch)
    assert same(average(tmp_path / "beside", recorder=Shrinking()), expected)


def test_an_error_in_an_update_is_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Ema, *args: Any) -> None:
        raise ZeroDivisionError

    use_late_lanes(monkeypatch)
    monkeypatch.setattr(Ema, "update", broken)
    with pytest.raises(PluginError, match=r"plugin 'ema' .* failed in hook 'weights_updated' at step 2"):
        trainer(tmp_path, ["ema"]).train()


def test_a_reference_that_the_next_step_needs_is_never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, path = use_late_lanes(monkeypatch), trajectory(1)
    model, reference = Recorded(), Recorded()
    model.fill(path[0])
    plugin = Ema(decay=0.5, reference="ema")
    plugin.setup(replace(context_of(model), reference=reference))
    model.fill(path[1])
    plugin.weights_updated(view_of(model), 1, False)
    assert not lanes
    torch.testing.assert_close(reference.flat(), path.mean(0), rtol=0, atol=1e-12)  # fp64


def test_an_update_is_never_beside_a_backward_pass_that_writes_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of LOMO does, with no step of an optimiser to wait in."""
    lanes = use_late_lanes(monkeypatch)
    for optim, expected in (("lomo", 0), ("adalomo", 0), ("adamw_torch", 1)):
        args = SFTConfig("unused", optim=optim, bf16=False, use_cpu=True)
        plugin = Ema()
        plugin.check(RunDescription("sft", args, "model", ("ema",), (), (), peft=False, world_size=1, sharding="none"))
        plugin.setup(context_of(Recorded()))
        assert len(lanes) == expected


# -- on a GPU --------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@gpu
@needs_cuda
@ALL
@DTYPES
def test_a_side_stream_changes_no_bit(
    method: Any, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = train(method(**options), dtype, "cuda")
    monkeypatch.setattr(shadows, "lane_for", lambda *args, **kwargs: None)  # each update at once
    assert torch.equal(train(method(**options), dtype, "cuda"), beside)


@gpu
@needs_cuda
@ALL
@DTYPES
def test_host_and_device_copies_agree(method: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    device, host = (train(method(**{**options, "device": place}), dtype, "cuda") for place in ("model", "cpu"))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # fused multiply-add on one side, one bf16 unit
    torch.testing.assert_close(device, host, rtol=tolerance, atol=tolerance)


@gpu
@needs_cuda
def test_host_copies_take_no_memory_on_the_device_and_device_copies_one_in_fp32() -> None:
    def resident(place: str) -> int:
        model = nn.Linear(4096, 4096, bias=False).to("cuda", torch.bfloat16)
        before = torch.cuda.memory_allocated()
        plugin = Ema(device=place)  # type: ignore[arg-type]
        plugin.setup(context_of(model))
        plugin.weights_updated(view_of(model), 1, False)
        plugin.state_dict()
        return torch.cuda.memory_allocated() - before

    assert resident("cpu") == 0
    assert resident("model") == 4 * 4096**2


@gpu
@needs_cuda
def test_an_error_in_the_worker_is_raised_within_two_steps() -> None:
    class Broken(Ema):
        def update(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Broken(device="cpu"), torch.float32, "cuda", steps=3)


@gpu
@needs_cuda
def test_memory_that_an_update_still_writes_to_is_given_to_nobody() -> None:
    """An average that is dropped while its update runs, and tensors that are made in its place at once."""
    model = nn.Linear(8192, 8192, bias=False).to("cuda", torch.bfloat16)
    for _ in range(4):
        plugin = Ema(decay=[0.9, 0.99, 0.999])
        plugin.setup(context_of(model))
        plugin.weights_updated(view_of(model), 1, False)
        del plugin
        gc.collect()
        taken = [torch.zeros(8192, 8192, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()
        assert all((tensor == 0).all() for tensor in taken)
        del taken
