"""Pictures where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def if_matplotlib() -> Iterator[None]:
    """Leave the body where it imports matplotlib and there is none, and say so; other missing modules are errors."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: matplotlib is not installed (pip install 'trl-ext-reachability[plot]')")
