"""Numbers of steps for the log, as their means since it was last written."""

from __future__ import annotations

from torch import Tensor


class Means:
    """Sums what steps note. Tensors stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: float | Tensor) -> None:
        """Add the numbers of one step; a name that a step leaves out is a mean over the others."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means since the last reading."""
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return values
