"""Updates of an average beside the next forward and backward passes: in what order, and where they run on a GPU.

An update reads the weights while the training goes on. So whatever writes to them waits until they have been read: an
optimiser, by a hook of torch's, and the hook of any plugin, before which the core asks
(`trl_ext.own_passes.read_beside`). Who reads the copies waits for the updates themselves.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trl_ext.own_passes import read_beside

Use = Callable[[list[Tensor]], None]
"""What an update does with the weights, or with a copy of them."""


class Lane(Protocol):
    """Where updates run, one after the other."""

    slots: int
    """How many may be under way at once."""

    def start(self, weights: list[Tensor], use: Use) -> Callable[[], None]:
        """Begin to use the weights as they are now; what is returned waits for the end, and raises what `use` did."""

    def weights_read(self) -> None:
        """Let what the training does next wait until the weights have been read; raises nothing."""

    def close(self) -> None:
        """Leave threads and memory, when nothing is under way any more."""


class Beside:
    """The order of updates, weights and training, whatever the lane."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._under_way: deque[Callable[[], None]] = deque()
        hook = register_optimizer_step_pre_hook(lambda *_: lane.weights_read())
        self._leave_optimizers = weakref.finalize(self, hook.remove)
        read_beside(self)

    def submit(self, weights: list[Tensor], use: Use) -> None:
        """Use the weights as they are now, beside what comes next; waits where the lane is full."""
        while len(self._under_way) >= self._lane.slots:
            self._under_way.popleft()()
        self._under_way.append(self._lane.start(weights, use))

    def weights_read(self) -> None:
        """Let what the training does next wait until the weights have been read."""
        self._lane.weights_read()

    def wait(self) -> None:
        """Wait for the updates, and raise what one of them raised."""
        while self._under_way:
            self._under_way.popleft()()

    def close(self) -> None:
        """Finish, and leave the optimisers and the lane."""
        try:
            self.wait()
        finally:
            self._leave_optimizers()
            self._lane.close()


def lane_for(weights: Sequence[Tensor], copies: Sequence[Tensor], *, on_host: bool) -> Lane | None:
    """The lane for updates of these copies; None where there is none to gain by, and an update runs at once.

    So it does where the weights are spread over several devices (`device_map`): a stream orders the work of one alone.
    """
    devices = {tensor.device for tensor in weights}
    if len(devices) != 1 or devices.pop().type != "cuda":
        return None
    return PinnedLane(weights) if on_host else StreamLane(copies)


class StreamLane:
    """A side stream, on which updates read the weights themselves. The host waits for nothing.

    What an update allocates belongs to that stream. The memory of weights and copies is marked as in use on it, so that
    whoever is given it after them waits.
    """

    slots = 1

    def __init__(self, copies: Sequence[Tensor]) -> None:
        self._device = copies[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._done = torch.cuda.Event()
        for copy in copies:
            copy.record_stream(self._stream)

    def start(self, weights: list[Tensor], use: Use) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor in weights:
                tensor.record_stream(self._stream)
            try:
                use(weights)
            finally:
                self._done.record(self._stream)
        return self.weights_read

    def weights_read(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def close(self) -> None:
        pass


class PinnedLane:
    """Two pinned copies of the weights in their own dtype, filled in turn on a side stream and used by one thread.

    While an update uses one, the weights of the next step go into the other; the training's thread waits only where the
    updates are two steps behind.
    """

    slots = 2

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._device = weights[0].device
        self._stream = torch.cuda.Stream(self._device)
        # A new thread is on device 0, where waiting for an event would open a context of half a GiB for each rank.
        self._worker = ThreadPoolExecutor(1, "trl_ext_averaging", torch.cuda.set_device, (self._device,))
        self._pinned = cycle(
            [
                (
                    [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in weights],
                    torch.cuda.Event(blocking=True),  # the thread sleeps while it waits, and leaves its core to others
                )
                for _ in range(self.slots)
            ]
        )
        self._copied = torch.cuda.Event()

    def start(self, weights: list[Tensor], use: Use) -> Callable[[], None]:
        buffers, self._copied = next(self._pinned)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for buffer, tensor in zip(buffers, weights, strict=True):
                tensor.record_stream(self._stream)
                buffer.copy_(tensor, non_blocking=True)
            self._copied.record(self._stream)
        return self._worker.submit(self._run, buffers, self._copied, use).result

    def weights_read(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def close(self) -> None:
        self._worker.shutdown()

    @staticmethod
    def _run(buffers: list[Tensor], copied: torch.cuda.Event, use: Use) -> None:
        copied.synchronize()
        use(buffers)
