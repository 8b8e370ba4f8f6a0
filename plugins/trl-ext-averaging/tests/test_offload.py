"""Averages in host memory on a GPU: the same numbers, no memory on the device, and safe against the next step."""

from __future__ import annotations

import pytest
import torch
from trajectories import context_of, view_of
from trl_ext_averaging import Bema, Ema, Lawa, WiseFt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(plugin, dtype: torch.dtype, steps: int = 6) -> torch.Tensor:
    """Adam on a large layer, so that the copy of a step is still running when the next one could overwrite it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4096, 4096, bias=False).to("cuda", dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options"),
    [(Ema, {"decay": 0.7}), (Bema, {"every": 2}), (Lawa, {"k": 2, "every": 1}), (WiseFt, {"alpha": 0.3})],
)
def test_host_and_device_copies_agree(method, options, dtype):
    device, host = (train(method(**{**options, "device": place}), dtype) for place in ("model", "cpu"))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # fused multiply-add on one side, one bf16 unit
    torch.testing.assert_close(device, host, rtol=tolerance, atol=tolerance)


def test_host_copies_take_no_memory_on_the_device_and_device_copies_one_in_fp32():
    def resident(place: str | None) -> int:
        model = torch.nn.Linear(4096, 4096, bias=False).to("cuda", torch.bfloat16)
        before = torch.cuda.memory_allocated()
        if place is not None:
            plugin = Ema(device=place)
            plugin.setup(context_of(model))
            plugin.weights_updated(view_of(model), 1, False)
            plugin.state_dict()
            return torch.cuda.memory_allocated() - before
        return 0

    assert resident("cpu") == 0
    assert resident("model") == 4 * 4096**2


def test_an_error_in_the_worker_is_raised_at_the_next_step():
    class Broken(Ema):
        def update(self, copies, theta, updates, step):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Broken(device="cpu"), torch.float32)
