"""The vLLM engine, where vLLM and a GPU are there; elsewhere what it says."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trl_ext_probing.engines import engine, outstanding
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.sampling import SampledModel

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(ConfigurationError, match=r"engine 'vllm' needs the package vllm: pip install 'trl-ext-probing"):
        engine("vllm", model="any")


def test_the_model_that_scored_demonstrations_makes_room_for_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes most of the device's memory when it starts; a module of its name stands for it here."""
    path = save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path)
    sampled = SampledModel(PasskSettings(model=[path], dataset="d", reward=["m:f"], engine="vllm", device="cpu"), path)
    loaded = weakref.ref(sampled.loaded[0])
    started: list[Any] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            started.append(loaded())

    vllm = ModuleType("vllm")
    vllm.__dict__.update(LLM=LLM, SamplingParams=None, TokensPrompt=None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "trl_ext_probing.engines.vllm_engine", None)
    del sys.modules["trl_ext_probing.engines.vllm_engine"]
    assert sampled.engine() is sampled.engine()
    assert started == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
def test_completions_are_those_of_the_transformers_engine(tmp_path: Path) -> None:
    """Greedy ones; samples come again with their seed, also without the others."""
    model, tokenizer = tiny_llama(hidden=64).eval(), tiny_tokenizer()
    model.get_output_embeddings().weight.data.mul_(10)
    there = engine("vllm", model=save_model(model, tokenizer, tmp_path), dtype="float32", enforce_eager=True)
    here = engine("transformers", model=model, tokenizer=tokenizer)
    prompts = ["1+2=", [{"role": "user", "content": "3+4="}], "5"]
    greedy = [
        {c.prompt_index: (c.token_ids, c.finish_reason) for c in e.generate(prompts, max_tokens=8, temperature=0.0)}
        for e in (there, here)
    ]
    assert greedy[0] == greedy[1]
    samples = {(c.prompt_index, c.sample_index): c.token_ids for c in there.generate(prompts, n=4, max_tokens=8)}
    assert sorted(samples) == outstanding(3, 4)
    again = there.generate(prompts, n=4, draws=[(1, 2)], max_tokens=8)
    assert [c.token_ids for c in again] == [samples[1, 2]]
