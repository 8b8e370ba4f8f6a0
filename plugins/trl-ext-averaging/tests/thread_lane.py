"""A lane on a CPU: a thread that begins late, so that whoever does not wait for it changes what it reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
from torch import Tensor
from trl_ext_averaging import shadows


class ThreadLane:
    """Runs updates on the weights themselves, as the side stream of a GPU does.

    Args:
        delay: seconds before an update reads anything.
        slots: updates under way at once.
    """

    def __init__(self, delay: float = 0.02, slots: int = 1) -> None:
        self.slots, self.delay = slots, delay
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.futures: list[Future[None]] = []
        self.closed = False

    def start(self, weights: list[Tensor], use: Callable[[list[Tensor]], None]) -> Callable[[], None]:
        def run() -> None:
            time.sleep(self.delay)
            use(weights)

        self.futures.append(self.worker.submit(run))
        return self.futures[-1].result

    def weights_read(self) -> None:
        wait(self.futures)

    def close(self) -> None:
        self.closed = True
        self.worker.shutdown()

    @property
    def busy(self) -> bool:
        """Whether an update is under way now."""
        return any(not future.done() for future in self.futures)


def use_thread_lanes(monkeypatch: pytest.MonkeyPatch, **options: float) -> list[ThreadLane]:
    """Give every average that is set up from here on a lane of its own; they are noted in the list."""
    lanes: list[ThreadLane] = []

    def lane_for(*args: object, **kwargs: object) -> ThreadLane:
        lanes.append(ThreadLane(**options))
        return lanes[-1]

    monkeypatch.setattr(shadows, "lane_for", lane_for)
    return lanes
