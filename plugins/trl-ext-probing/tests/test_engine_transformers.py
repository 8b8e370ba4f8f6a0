"""The transformers engine against `generate`, against softmax, and against itself in other batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import binom
from trl_ext_probing.engines import Completion, Draw, engine, outstanding
from trl_ext_probing.engines.decoding_batch import DecodingBatch, Row

from trl_ext.errors import ConfigurationError
from trl_ext.testing import tiny_llama, tiny_moe, tiny_qwen2, tiny_tokenizer

PROMPTS = ["1+2=", "a much longer prompt than the others: 3+4=", "5", "6, 7, 8", "1+2=", "the last one"]
ENDS = list(range(0, 256, 12))  # a random model draws one of them soon
SHAPE: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 256, "eos_token_id": 258, "bos_token_id": None}
SHAPE["tie_word_embeddings"] = False  # a random model with one repeats its input


def ready(model: Any) -> Any:
    """A model whose completions have many lengths, and whose logits lie far apart compared with rounding."""
    model.generation_config.eos_token_id = ENDS
    model.generation_config.repetition_penalty = 5.0  # which must not count
    model.get_output_embeddings().weight.data.mul_(10)
    return model.eval()


def complete(model: Any, prompts: Sequence[Any] = PROMPTS, batch_size: int = 4, **options: Any) -> list[Completion]:
    made = engine("transformers", model=model, tokenizer=tiny_tokenizer(), batch_size=batch_size)
    return list(made.generate(prompts, **{"max_tokens": 12, **options}))


def by_draw(completions: Sequence[Completion]) -> dict[tuple[int, int], tuple[int, ...] | None]:
    return {(c.prompt_index, c.sample_index): c.token_ids for c in completions}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "lora":
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(tiny_llama(hidden=16), lora)
    if name in ("llama", "qwen2", "moe"):
        return {"llama": tiny_llama, "qwen2": tiny_qwen2, "moe": tiny_moe}[name](hidden=16, tie=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config: Any = {
        "sliding window": lambda: transformers.MistralConfig(**SHAPE, **sizes, num_key_value_heads=2, sliding_window=6),
        "learnt positions": lambda: transformers.GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4),
        "alibi": lambda: transformers.BloomConfig(**SHAPE, hidden_size=32, n_layer=2, n_head=4),
        "convolutions": lambda: transformers.Lfm2Config(
            **SHAPE, **sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        ),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "moe", "sliding window", "learnt positions", "alibi", "convolutions", "lora"]
)
def test_greedy_completions_are_those_of_generate(name: str) -> None:
    """Of each prompt alone, up to and with the first end token; rows join and leave a batch of 4 meanwhile."""
    model, tokenizer = ready(build(name)), tiny_tokenizer()
    completions = by_draw(complete(model, n=2, temperature=0.0, max_tokens=24))
    lengths = set()
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=[*ENDS, 258], repetition_penalty=1.0
        )
        expected = tuple(alone[0, ids.shape[1] :].tolist())
        assert completions[i, 0] == completions[i, 1] == expected
        lengths.add(len(expected))
    assert len(lengths) > 2


def test_a_finished_row_stays_within_the_table_of_positions() -> None:
    """Of 16 positions, its prompt and completion take all; the others decode on beside it, as they would alone."""
    config = transformers.GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    torch.manual_seed(0)
    model = ready(transformers.AutoModelForCausalLM.from_config(config))
    full, *short = [Row(Draw(i, 0), i, list(range(1, 1 + length))) for i, length in enumerate((15, 3, 4, 5))]
    batch, alone = DecodingBatch(model, [full, *short]), DecodingBatch(model, short)
    full.finish_reason = "length"
    tokens = torch.arange(4)
    for _ in range(8):
        with torch.no_grad():
            batch.step(tokens)
            alone.step(tokens[1:])
        torch.testing.assert_close(batch.logits[1:], alone.logits, rtol=1e-4, atol=1e-4)  # float32, other widths


def test_messages_are_completed_after_the_chat_template() -> None:
    model, tokenizer = ready(tiny_llama(hidden=16)), tiny_tokenizer()
    messages = [{"role": "user", "content": "1+1="}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert complete(model, [messages], temperature=0.0) == complete(model, [text], temperature=0.0)


def next_token(model: Any, ids: list[int], temperature: float, top_k: int) -> torch.Tensor:
    """The distribution that is drawn from, by a pass over all tokens without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
    allowed = logits.topk(top_k).indices
    return torch.zeros_like(logits).index_put((allowed,), logits[allowed].softmax(0))


def test_sampled_frequencies_agree_with_softmax() -> None:
    """Of the first two tokens together; each count lies within its exact binomial bounds, 1e-6 for all together."""
    model = tiny_llama(hidden=16).eval()
    model.get_output_embeddings().weight.data.mul_(5)
    n, temperature, top_k = 3000, 0.7, 4
    completions = complete(model, ["1+2="], 500, n=n, max_tokens=2, temperature=temperature, top_k=top_k)
    counts = Counter(c.token_ids for c in completions)
    prompt = tiny_tokenizer()("1+2=")["input_ids"]
    first = next_token(model, prompt, temperature, top_k)
    expected: dict[tuple[int, ...], float] = {}
    for token in first.nonzero()[:, 0].tolist():
        second = next_token(model, [*prompt, token], temperature, top_k)
        expected |= {(token, other): float(first[token] * second[other]) for other in second.nonzero()[:, 0].tolist()}
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    assert len([p for p in expected.values() if p > 0.01]) > 4
    for pair, probability in expected.items():
        low, high = binom.interval(1 - 1e-6 / len(expected), n, probability)
        assert low <= counts[pair] <= high, (pair, counts[pair], n * probability)


def test_each_position_has_noise_of_its_own() -> None:
    """An almost uniform model, with no token above 2 %, seldom repeats one; with one noise for both it always would."""
    completions = complete(tiny_llama(hidden=16).eval(), ["1+2="], 200, n=200, max_tokens=2)
    repeated = [c for c in completions if c.token_ids and len(c.token_ids) == 2 and len(set(c.token_ids)) == 1]
    assert len(repeated) <= binom.ppf(1 - 1e-6, 200, 0.02)


def test_log_probs_are_those_of_the_tempered_model() -> None:
    model, tokenizer = ready(tiny_llama(hidden=16)), tiny_tokenizer()
    for completion in complete(model, n=2, temperature=0.5, top_p=0.9):
        prompt = tokenizer(PROMPTS[completion.prompt_index])["input_ids"]
        assert completion.token_ids
        assert completion.log_probs
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            log_probs = (model(ids[None]).logits[0, len(prompt) - 1 : -1] / 0.5).log_softmax(-1)
        expected = log_probs.gather(-1, ids[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_draws_do_not_depend_on_batches_order_ranks_or_interruptions() -> None:
    model = ready(tiny_llama(hidden=16))
    whole = complete(model, n=3)
    expected = by_draw(whole)
    assert sorted(expected) == outstanding(len(PROMPTS), 3)
    assert len(whole) == 18
    assert len(set(expected.values())) == 18, "equal prompts and samples of one prompt have noise of their own"
    for batch_size in (1, 64):
        assert by_draw(complete(model, n=3, batch_size=batch_size)) == expected
    halves = [[d for d in outstanding(len(PROMPTS), 3) if d.prompt_index % 2 == rank] for rank in (0, 1)]
    ranks = [by_draw(complete(model, n=3, draws=half)) for half in halves]
    assert ranks[0] | ranks[1] == expected
    done = by_draw(whole[:7])
    rest = by_draw(complete(model, n=3, draws=outstanding(len(PROMPTS), 3, done)))
    assert done | rest == expected
    backwards = by_draw(complete(model, PROMPTS[:4][::-1], n=3))
    assert backwards == {(3 - i, j): expected[i, j] for i, j in backwards}
    assert by_draw(complete(model, n=3, seed=1)) != expected


def test_completions_come_as_they_finish_and_leave_no_trace() -> None:
    """The first one is there before the last prompt is read; the caller's gradients stay switched on in between."""
    model = ready(tiny_llama(hidden=16))
    before = torch.get_rng_state()
    reads: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: reads.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    completions = engine("transformers", model=model, tokenizer=tiny_tokenizer(), batch_size=2).generate(PROMPTS)
    next(completions)
    so_far = len([width for width in reads if width > 1])
    assert torch.is_grad_enabled()
    assert len(list(completions)) == len(PROMPTS) - 1
    hook.remove()
    assert so_far == 1
    assert len([width for width in reads if width > 1]) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_is_read_once_for_its_samples() -> None:
    model = ready(tiny_llama(hidden=16))
    read: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True)
    complete(model, ["a long prompt"], n=8, batch_size=8, max_tokens=2)
    assert read[0] == (1, 13)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a"], {"n": 0}, "n=0"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0"),
        (["a"], {"temperature": float("nan")}, "temperature=nan"),
        (["a"], {"top_p": 0.0}, "top_p=0.0"),
        (["a"], {"top_k": -1}, "top_k=-1"),
        (["a", ""], {}, "prompt 1 has no tokens"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(prompts: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        complete(tiny_llama(hidden=16).eval(), prompts, **options)


def test_models_that_cannot_be_sampled_from_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="training mode"):
        complete(tiny_llama(hidden=16).train())
    prompt = get_peft_model(tiny_llama(hidden=16), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigurationError, match="PROMPT_TUNING"):
        complete(prompt.eval())
    broken = tiny_llama(hidden=16).eval()
    broken.get_output_embeddings().weight.data[0] = float("nan")
    with pytest.raises(ConfigurationError, match="NaN after 0 tokens"):
        complete(broken)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    made = engine("transformers", model=tiny_llama(hidden=16).eval(), tokenizer=tokenizer)
    with pytest.raises(ConfigurationError, match="prompt 0 is a list of messages"):
        next(made.generate([[{"role": "user", "content": "a"}]]))


def test_one_message_names_a_wrong_engine_or_option() -> None:
    with pytest.raises(ConfigurationError, match=r"'transformer' is unknown. Did you mean 'transformers'"):
        engine("transformer")
    with pytest.raises(ConfigurationError, match=r"engine 'transformers': .*'batchsize'"):
        engine("transformers", model=None, tokenizer=None, batchsize=3)
