"""A lane on a CPU that reads the weights as late as it may: whoever does not wait for it changes what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from trl_ext_averaging import shadows


class Late:
    """One update, made when somebody waits for it."""

    def __init__(self, use: Callable[[], None]) -> None:
        self._use = use
        self._error: Exception | None = None
        self.done = False

    def read(self) -> None:
        if not self.done:
            self.done = True
            try:
                self._use()
            except Exception as error:
                self._error = error

    def end(self) -> None:
        self.read()
        if self._error is not None:
            raise self._error


class LateLane:
    """Runs updates on the weights themselves, as the side stream of a GPU may do at any time until it is waited for."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.updates: list[Late] = []
        self.asked = 0
        self.closed = False

    def start(self, weights: list[Tensor], use: Callable[[list[Tensor]], None]) -> Callable[[], None]:
        self.updates.append(Late(lambda: use(weights)))
        return self.updates[-1].end

    def weights_read(self) -> None:
        self.asked += 1
        for update in self.updates:
            update.read()

    def close(self) -> None:
        self.closed = True


def use_late_lanes(monkeypatch: pytest.MonkeyPatch, slots: int = 1) -> list[LateLane]:
    """Give every average that is set up from here on a lane of its own; they are noted in the list."""
    lanes: list[LateLane] = []

    def lane_for(*args: object, **kwargs: object) -> LateLane:
        lanes.append(LateLane(slots))
        return lanes[-1]

    monkeypatch.setattr(shadows, "lane_for", lane_for)
    return lanes
