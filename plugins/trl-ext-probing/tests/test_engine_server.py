"""The server engine against a server that fails in the ways in which servers fail."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from stub_server import Answer, Stub, told
from trl_ext_probing.engines import engine, outstanding

from trl_ext.errors import ConfigurationError

PROMPTS = ["1+2=", [{"role": "user", "content": "3+4="}], "5"]


def texts(base_url: Any, n: int = 4, options: dict[str, Any] | None = None, **sampling: Any) -> dict[Any, str]:
    made = engine("server", base_url=base_url, **(options or {}))
    completions = list(made.generate(PROMPTS, n=n, **sampling))
    assert len({(c.prompt_index, c.sample_index) for c in completions}) == len(completions)
    return {(c.prompt_index, c.sample_index): c.text for c in completions}


def test_requests_carry_the_prompt_the_settings_and_a_seed_of_their_own(
    serve: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    stub = serve()
    options = {"model": "m", "api_key_env": "MY_KEY", "extra": {"min_p": 0.0}}
    found = texts(stub.url, options=options, max_tokens=7, temperature=0.5, top_p=0.9, top_k=3)
    assert sorted(found) == outstanding(3, 4)
    assert len(set(found.values())) == 12
    assert Counter(path for path, _ in stub.requests) == {"/v1/completions": 8, "/v1/chat/completions": 4}
    for path, body in stub.requests:
        seed = body.pop("seed")
        prompt = body.pop("messages" if "chat" in path else "prompt")
        index = PROMPTS.index(prompt)
        assert f"seed {seed}" in [found[index, sample] for sample in range(4)]
        assert body == {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "model": "m", "min_p": 0.0}
    assert {headers["Authorization"] for headers in stub.headers} == {"Bearer secret"}


def test_seeds_do_not_depend_on_what_else_is_drawn(serve: Callable[..., Stub]) -> None:
    stub = serve()
    expected = texts(stub.url)
    assert texts(stub.url + "/v1/", draws=[(2, 3), (1, 0)]) == {d: expected[d] for d in [(2, 3), (1, 0)]}
    assert texts(stub.url, seed=1) != expected
    assert "top_k" not in stub.requests[0][1], "OpenAI refuses what it does not know"
    assert stub.headers[0]["Authorization"] is None


def test_failures_that_pass_are_tried_again(serve: Callable[..., Stub]) -> None:
    """Too many requests, a server that is starting, a connection that breaks, and answers without a completion."""
    failures: list[Answer] = [
        (429, {"error": "slow down"}), (503, b"starting"), (0, b""), (200, b"<html>"), (200, {"choices": []}),
        (200, {"choices": [{"text": None, "finish_reason": "stop"}]}), (200, [1]),
    ]  # fmt: skip

    def answer(path: str, body: dict[str, Any], number: int) -> Answer:
        return failures[number // 2] if number % 2 and number // 2 < len(failures) else told(path, body)

    stub = serve(answer)
    found = texts(stub.url, options={"concurrency": 1})
    assert found == texts(serve().url)
    assert len(stub.requests) == 12 + len(failures)


def test_a_server_that_stays_away_ends_the_run(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda *_: (500, b"out of memory"))
    with pytest.raises(ConfigurationError, match=r"no usable answer in 3 attempts.*500.*out of memory"):
        texts(stub.url, n=1, options={"retries": 2, "concurrency": 1})
    first = [body["prompt"] for _, body in stub.requests[:3]]
    assert first == first[:1] * 3  # another completion may have begun before the first one was given up
    stub.close()
    with pytest.raises(ConfigurationError, match="ConnectError"):
        texts(stub.url, options={"retries": 0})


def test_a_refusal_ends_the_run_at_once(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda *_: (404, {"error": "no model 'x'"}))
    with pytest.raises(ConfigurationError, match=r"refuses the request: status 404.*no model 'x'"):
        texts(stub.url, options={"model": "x", "concurrency": 1})
    assert len(stub.requests) == 1


def test_slow_answers_are_asked_for_again(serve: Callable[..., Stub]) -> None:
    release = threading.Event()

    def answer(path: str, body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            release.wait(20)
        return told(path, body)

    stub = serve(answer)
    assert len(texts(stub.url, n=1, options={"timeout": 3, "concurrency": 1})) == 3
    assert len(stub.requests) == 4
    release.set()


def test_servers_take_turns_and_one_that_is_down_costs_nothing_but_time(serve: Callable[..., Stub]) -> None:
    stubs = [serve(), serve(), serve(lambda *_: (503, b"down"))]
    assert texts([stub.url for stub in stubs]) == texts(serve().url)
    assert [len(stub.requests) for stub in stubs[:2]] == [pytest.approx(6, abs=2)] * 2
    assert len(stubs[2].requests) >= 4


def test_open_requests_are_bounded_and_end_with_the_iterator(serve: Callable[..., Stub]) -> None:
    together = threading.Barrier(3)
    hang = threading.Event()

    def answer(path: str, body: dict[str, Any], number: int) -> Answer:
        if number < 9:
            together.wait(20)  # three have to be open at a time
        else:
            hang.wait(20)
        return told(path, body)

    stub = serve(answer)
    completions = engine("server", base_url=stub.url, concurrency=3).generate(["a"], n=100)
    for _ in range(6):
        next(completions)
    completions.close()  # returns although the requests that are open hang
    assert stub.most_open == 3
    assert len(stub.requests) <= 12
    hang.set()


def test_what_a_server_ignores_is_said_once(serve: Callable[..., Stub], caplog: pytest.LogCaptureFixture) -> None:
    def answer(path: str, body: dict[str, Any], _: int) -> Answer:
        return 200, {"choices": [{"text": "same", "finish_reason": "stop"}], "usage": {"completion_tokens": 99}}

    def said(**options: Any) -> list[str]:
        caplog.clear()
        made = engine("server", base_url=serve(answer).url)
        list(made.generate(["a", "b"], n=12, **options))
        return [record.args[0] for record in caplog.records if "ignore" in record.message]  # type: ignore[index,misc]

    with caplog.at_level(logging.WARNING):
        assert said() == ["temperature"]
        assert said(max_tokens=50, temperature=0.0) == ["max_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": []}, "needs a base_url"),
        ({"base_url": "localhost:8000"}, "'localhost:8000' is not a URL such as"),
        ({"base_url": "http://h", "api_key_env": "NO_SUCH_KEY"}, "no variable NO_SUCH_KEY"),
        ({"base_url": "http://h", "concurrency": 0}, "concurrency=0"),
        ({}, "'base_url'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        engine("server", **options)
