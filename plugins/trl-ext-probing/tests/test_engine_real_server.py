"""The server engine against `transformers serve`, which the tests start, kill and start again."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trl_ext_probing.engines import Completion, engine, http_servers, outstanding

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

NEEDS_SERVING = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")),
    reason="transformers[serving] is not installed",
)
pytestmark = [pytest.mark.slow, NEEDS_SERVING]

PROMPTS: list[Any] = ["1+2=", [{"role": "user", "content": "3+4="}], "5, 6, 7"]
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def by_draw(completions: list[Completion]) -> dict[tuple[int, int], str]:
    found = {(c.prompt_index, c.sample_index): c.text for c in completions}
    assert len(found) == len(completions), "a completion is there twice"
    return found


def complete(server: Served, **options: Any) -> dict[tuple[int, int], str]:
    """One request at a time: the server has one random state for all."""
    made = engine("server", base_url=server.url, model=server.model, concurrency=1)
    return by_draw(list(made.generate(PROMPTS, max_tokens=8, **options)))


@pytest.mark.timeout(900)
def test_greedy_completions_are_those_of_the_transformers_engine(served: Served) -> None:
    here = engine("transformers", model=tiny_llama(hidden=16).eval(), tokenizer=tiny_tokenizer())
    assert complete(served, temperature=0.0) == by_draw(list(here.generate(PROMPTS, max_tokens=8, temperature=0.0)))


@pytest.mark.timeout(900)
def test_samples_differ_and_come_again_with_the_seed(served: Served) -> None:
    samples = complete(served, n=3)
    assert len(set(samples.values())) == 9
    assert complete(served, n=3) == samples
    assert complete(served, n=3, seed=1) != samples


@pytest.mark.timeout(1200)
def test_a_killed_server_costs_no_completion(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed amid a run and started again: each completion comes once, and is the one of a run without the fall."""
    monkeypatch.setattr(http_servers, "LONGEST_PAUSE", 2.0)
    expected = complete(served, n=4)
    made = engine("server", base_url=served.url, model=served.model, concurrency=1, retries=LONGEST_START)
    run = made.generate(PROMPTS, n=4, max_tokens=8)
    completions = [next(run) for _ in range(5)]
    served.kill()
    served.start()
    completions += run
    assert sorted(by_draw(completions)) == outstanding(3, 4)
    assert by_draw(completions) == expected
