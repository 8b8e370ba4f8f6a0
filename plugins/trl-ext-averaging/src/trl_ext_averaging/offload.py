"""Weights on their way from the GPU to averages in host memory, beside the training and never late."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class HostStage:
    """A pinned copy of the weights in their own dtype, filled on a side stream and used by one worker thread.

    The training's stream waits for nothing but, before an optimiser changes the weights again, the end of the copy. The
    training's thread waits only where the worker has not finished with the previous copy.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self._buffers = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in weights]
        self._stream = torch.cuda.Stream(weights[0].device)
        self._copied = torch.cuda.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_ext_averaging")
        self._pending: Future[None] | None = None
        self._hook = register_optimizer_step_pre_hook(lambda *_: self._protect())

    def submit(self, weights: list[Tensor], use: Callable[[list[Tensor]], None]) -> None:
        """Copy the weights as they are now, and call `use` on the copy in the worker thread."""
        self.wait()
        self._stream.wait_stream(torch.cuda.current_stream(weights[0].device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for buffer, tensor in zip(self._buffers, weights, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            self._copied.record(self._stream)
        self._pending = self._worker.submit(self._run, use)

    def wait(self) -> None:
        """Wait for the worker, and raise what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Finish, and leave the optimisers and the thread."""
        self.wait()
        self._hook.remove()
        self._worker.shutdown()

    def _protect(self) -> None:
        """Make the current stream wait for the last copy; the host does not wait."""
        torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def _run(self, use: Callable[[list[Tensor]], None]) -> None:
        self._copied.synchronize()
        use(self._buffers)
