"""The server engine against `transformers serve`, which the tests start, kill and start again."""

from __future__ import annotations

from typing import Any

import pytest
from real_server import LONGEST_START, NEEDS_SERVING, Served
from trl_ext_probing.engines import Completion, engine, http_servers, outstanding

from trl_ext.testing import tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.slow, NEEDS_SERVING]

PROMPTS: list[Any] = ["1+2=", [{"role": "user", "content": "3+4="}], "5, 6, 7"]


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
