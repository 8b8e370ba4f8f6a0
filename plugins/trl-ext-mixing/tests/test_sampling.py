"""Completions: where they end, what decides them, and the seeds of batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl_ext_mixing.sampling import batch_seed, complete, end_ids

from trl_ext.testing import tiny_llama, tiny_tokenizer

GREEDY: dict[str, Any] = {"seed": 0, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
SAMPLED: dict[str, Any] = {"seed": 0, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}
PROMPTS = ["1+2=", "a much longer prompt than the others: 3+4=", "5", "6"]


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    return tiny_llama(hidden=16).eval(), tiny_tokenizer()


def test_padding_and_batching_do_not_change_greedy_completions(tiny: tuple[Any, Any]) -> None:
    together = complete(*tiny, PROMPTS, **GREEDY)
    alone = [complete(*tiny, [p], **GREEDY)[0] for p in PROMPTS]
    assert together == alone


def test_messages_give_messages(tiny: tuple[Any, Any]) -> None:
    prompt = [{"role": "user", "content": "1+1="}]
    ((completion, ids),) = complete(*tiny, [prompt], seed=0, temperature=1.0, top_p=1.0, max_new_tokens=2)
    assert completion[0]["role"] == "assistant"
    assert len(ids) <= 2


def test_any_end_token_of_the_model_ends_a_completion(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    before = [ids for _, ids in complete(model, tokenizer, PROMPTS, **SAMPLED)]
    end = before[0][3]  # a token that comes up
    assert end != tokenizer.eos_token_id
    for own in (end, [end], [end, 7]):
        model.generation_config.eos_token_id = own
        after = [ids for _, ids in complete(model, tokenizer, PROMPTS, **SAMPLED)]
        assert after[0] == before[0][: before[0].index(end) + 1]
        assert set(end_ids(model, tokenizer)) >= {end, tokenizer.eos_token_id}
    # And the tokenizer's still does, though the model does not name it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(before[1][2])
    after = [ids for _, ids in complete(model, tokenizer, PROMPTS, **SAMPLED)]
    assert after[1] == before[1][: before[1].index(before[1][2]) + 1]


@pytest.mark.parametrize(
    "own", [{"min_p": 0.9}, {"repetition_penalty": 50.0}, {"num_beams": 3}, {"top_k": 1}, {"no_repeat_ngram_size": 1}]
)
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_model_s_own_generation_settings_do_not_leak(
    tiny: tuple[Any, Any], own: dict[str, Any], arguments: dict[str, Any]
) -> None:
    model, tokenizer = tiny
    plain = complete(model, tokenizer, PROMPTS, **arguments)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    config = model.generation_config
    assert complete(model, tokenizer, PROMPTS, **arguments) == plain
    assert model.generation_config is config, "what was set aside is back"
    assert all(getattr(config, name) == value for name, value in own.items())


def test_an_adapter_s_generation_settings_do_not_leak(tiny: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    plain = complete(adapted, tokenizer, PROMPTS, **GREEDY)
    config = adapted.generation_config
    config.repetition_penalty = 50.0
    assert complete(adapted, tokenizer, PROMPTS, **GREEDY) == plain
    assert adapted.generation_config is config
    assert adapted.get_base_model().generation_config is config


def test_the_surrounding_random_state_is_left_as_it_was(tiny: tuple[Any, Any]) -> None:
    before = torch.get_rng_state()
    complete(*tiny, PROMPTS, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_batches_do_not_meet_between_runs() -> None:
    seeds = {batch_seed(seed, number) for seed in range(50) for number in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed takes
    assert batch_seed(3, 5) == 0x7FFFFFFFFFFFFFFF & 0 or batch_seed(3, 5) == batch_seed(3, 5)
