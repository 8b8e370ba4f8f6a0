"""The vLLM engine, where vLLM and a GPU are there; elsewhere what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from trl_ext_probing.engines import engine, outstanding

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(ConfigurationError, match=r"engine 'vllm' needs the package vllm: pip install 'trl-ext-probing"):
        engine("vllm", model="any")


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
