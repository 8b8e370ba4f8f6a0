"""Makes the helpers beside the tests importable under `--import-mode=importlib`, and has the fixtures of several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from real_server import Served
    from stub_server import Answer, Stub


@pytest.fixture(autouse=True, scope="module")
def names_of_trl() -> Iterator[None]:
    """Reading the settings of a training puts our classes in TRL's place, which is undone for the next tests."""
    from trl_ext.cli.patching import PLACES

    with pytest.MonkeyPatch.context() as patch:
        for name, places in PLACES.items():
            for place in places:
                module = import_module(place)
                patch.setattr(module, name, getattr(module, name))
        yield


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    """Starts stub servers, each with a function of its answers; pauses between attempts are short."""
    from stub_server import Stub, told
    from trl_ext_probing.engines import http_servers

    monkeypatch.setattr(http_servers, "LONGEST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stubs: list[Stub] = []

    def start(answer: Callable[[str, dict[str, Any], int], Answer] = told) -> Stub:
        stubs.append(Stub(answer))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of transformers that answers."""
    from real_server import Served

    server = Served(tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        server.kill()
