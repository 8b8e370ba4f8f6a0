"""Run by torchrun on two ranks: one of them never leaves a hook."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from helpers import Plugin, make_sft

from trl_ext import hookimpl


class Sleeps(Plugin):
    @hookimpl
    def gradients_ready(self):
        if dist.get_rank() == 1:
            time.sleep(1000)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=1000))
    make_sft(Path(sys.argv[1]) / "run", plugins=[Sleeps()], ddp_timeout=1000).train()
