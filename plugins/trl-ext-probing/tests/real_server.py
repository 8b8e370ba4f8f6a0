"""A process of `transformers serve`, which tests start, kill and start again."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

NEEDS_SERVING = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")),
    reason="transformers[serving] is not installed",
)
LONGEST_START = 300  # seconds, on a machine with much else to do


class Served:
    """`transformers serve` with a tiny model, on the same port whenever it starts."""

    def __init__(self, folder: Path) -> None:
        model = tiny_llama(hidden=16)
        model.generation_config.update(do_sample=True, top_k=0)  # else the server would always decode greedily
        self.model = save_model(model, tiny_tokenizer(), folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start the process, without waiting until it answers."""
        program = "from transformers.cli.transformers import main; main()"
        arguments = ["serve", self.model, "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        """Until the server answers."""
        end = time.monotonic() + LONGEST_START
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError("the server does not start")
