"""On two ranks: one of them never leaves a hook."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist
from helpers import Plugin

from trl_ext import hookimpl
from trl_ext.testing.runs import make_sft


class Sleeps(Plugin):
    @hookimpl
    def gradients_ready(self):
        if dist.get_rank() == 1:
            time.sleep(1000)


def main(folder: Path) -> None:
    make_sft(folder / "run", plugins=[Sleeps()], ddp_timeout=1000).train()
