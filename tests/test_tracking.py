"""Pictures and tables of plugins come to the trainer's own trackers, once, from the first rank."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Plugin, make_sft

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.trainers.tracking import trackers_of

PIXELS = np.zeros((4, 6, 3), dtype=np.uint8)
PIXELS[1, 2] = 255, 128, 0


@dataclass(eq=False)
class Shows(Plugin):
    """Logs a picture after each step, and a table at the end."""

    rows: tuple[tuple[Any, ...], ...] = ((1, "one|two"), (2, "three\nfour"))

    @hookimpl
    def setup(self, context):
        self.trackers = context.trackers

    @hookimpl
    def weights_updated(self, step):
        self.trackers.picture("shows/dot", PIXELS)

    @hookimpl
    def end(self):
        self.trackers.table("shows/numbers", ("number", "text"), self.rows)


def test_tensorboard_gets_pictures_and_tables(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make_sft(tmp_path / "run", plugins=[Shows()], report_to="tensorboard", max_steps=2).train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    pictures = events.Images("shows/dot")
    assert [event.step for event in pictures] == [0, 1]
    assert [(event.height, event.width) for event in pictures] == [(4, 6)] * 2
    assert _decoded(pictures[0].encoded_image_string).tolist() == PIXELS.tolist()
    (table,) = events.Tensors("shows/numbers/text_summary")
    assert table.step == 2
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| number | text |",
        "| --- | --- |",
        r"| 1 | one\|two |",
        "| 2 | three four |",
    ]


def _decoded(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def test_wandb_gets_pictures_and_tables(tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make_sft(tmp_path / "run", plugins=[Shows()], report_to="wandb", max_steps=2).train()
    media = wandb.run.dir
    wandb.finish()
    assert len(list(Path(media).rglob("*.png"))) == 2
    assert len(list(Path(media).rglob("*.table.json"))) == 1


def test_without_a_tracker_that_takes_them_it_is_said_once(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="trl_ext.trainers.tracking"):
        make_sft(tmp_path, plugins=[Shows()], max_steps=2).train()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "trl_ext.trainers.tracking"]
    assert said.startswith("'shows/dot' is not shown: report_to names no tracker that takes pictures and tables")


def test_other_ranks_write_nothing_and_say_nothing(caplog) -> None:
    trackers = trackers_of([], writes=False, step=lambda: 0)
    trackers.picture("dot", PIXELS)
    trackers.table("numbers", ("a",), [(1,)])
    assert not caplog.records


@pytest.mark.parametrize("pixels", [PIXELS[..., 0], PIXELS.astype(float), PIXELS[..., :2]])
def test_what_is_no_picture_is_refused_on_all_ranks(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"picture 'dot' is .*; expected \(height, width, 3\) uint8"):
        trackers_of([], writes=False, step=lambda: 0).picture("dot", pixels)


def test_an_uneven_table_is_the_fault_of_its_plugin(tmp_path) -> None:
    plugin = Shows(rows=((1,),))
    with pytest.raises(PluginError, match=r"'Shows'.* failed in hook 'end' .* 2 columns, and a row of 1 values"):
        make_sft(tmp_path, plugins=[plugin], max_steps=1).train()
