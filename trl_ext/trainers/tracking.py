"""Pictures and tables of plugins, written by the trackers that the trainer itself logs its numbers to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from trl_ext.records import Trackers

logger = logging.getLogger(__name__)


class _Writer(Protocol):
    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...


def trackers_of(callbacks: Sequence[TrainerCallback], writes: bool, step: Callable[[], int]) -> Trackers:
    """What takes the pictures and tables of a run.

    Args:
        callbacks: The trainer's, the trackers' among them; the list itself, since they open when training begins.
        writes: Whether this rank is the one that writes.
        step: Gives the number of optimiser steps done.
    """
    told = False

    def writers(name: str) -> Iterator[_Writer]:
        nonlocal told
        found = [writer for callback in callbacks if (writer := _writer(callback)) is not None] if writes else []
        if writes and not found and not told:
            told = True
            logger.warning(
                "%r is not shown: report_to names no tracker that takes pictures and tables and has begun to log; "
                "wandb and tensorboard do",
                name,
            )
        yield from found

    def picture(name: str, pixels: NDArray[np.uint8]) -> None:
        pixels = np.asarray(pixels)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"picture {name!r} is {pixels.shape} {pixels.dtype}; expected (height, width, 3) uint8")
        for writer in writers(name):
            writer.picture(name, pixels, step())

    def table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if uneven := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"table {name!r} has {len(columns)} columns, and a row of {len(uneven[0])} values")
        for writer in writers(name):
            writer.table(name, columns, rows, step())

    return Trackers(picture, table)


def _writer(callback: TrainerCallback) -> _Writer | None:
    """The writer of an open tracker; None for another callback."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        return _TensorBoard(callback.tb_writer)
    if isinstance(callback, WandbCallback):
        import wandb

        return None if wandb.run is None else _Wandb(wandb)
    return None


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)


class _Wandb:
    def __init__(self, wandb: Any) -> None:
        self.wandb = wandb

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._log(name, self.wandb.Image(pixels), step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._log(name, self.wandb.Table(columns=list(columns), data=[list(row) for row in rows]), step)

    def _log(self, name: str, value: Any, step: int) -> None:
        self.wandb.log({name: value, "train/global_step": step})  # the axis of the trainer's own numbers


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    return str(value).replace("|", r"\|").replace("\n", " ")
