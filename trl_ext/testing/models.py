"""Tiny language and reward models in fp32, seeded without touching the caller's random state."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Those of `tiny_tokenizer()`.
_VOCAB_SIZE, _PAD, _EOS = 259, 256, 258


def tiny_llama(
    vocab_size: int = _VOCAB_SIZE, hidden: int = 32, layers: int = 2, seed: int = 0, tie: bool = False, **config: Any
) -> PreTrainedModel:
    """Give a Llama with `layers` blocks of width `hidden` (a multiple of 8), 4 heads and 2 key-value heads.

    `tie` shares the embedding with the LM head; `config` overrides any field of `LlamaConfig`. The default ids of pad
    and EOS are those of `tiny_tokenizer()`.
    """
    return _build(LlamaForCausalLM, LlamaConfig, _shape(vocab_size, hidden, layers, tie) | config, seed)


def tiny_reward_model(
    vocab_size: int = _VOCAB_SIZE, hidden: int = 32, layers: int = 2, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Give a Llama with one score in place of the LM head; see `tiny_llama`."""
    shape = _shape(vocab_size, hidden, layers, False) | {"num_labels": 1}
    return _build(LlamaForSequenceClassification, LlamaConfig, shape | config, seed)


def tiny_qwen2(
    vocab_size: int = _VOCAB_SIZE, hidden: int = 32, layers: int = 2, seed: int = 0, tie: bool = True, **config: Any
) -> PreTrainedModel:
    """Give a Qwen2, which has biases in its attention and, as its small releases, a tied LM head; see `tiny_llama`."""
    return _build(Qwen2ForCausalLM, Qwen2Config, _shape(vocab_size, hidden, layers, tie) | config, seed)


def tiny_moe(
    vocab_size: int = _VOCAB_SIZE,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    tie: bool = False,
    experts: int = 4,
    **config: Any,
) -> PreTrainedModel:
    """Give a Mixtral with `experts` experts, two of them active per token, that can return router logits."""
    shape = _shape(vocab_size, hidden, layers, tie) | {"num_local_experts": experts, "num_experts_per_tok": 2}
    return _build(MixtralForCausalLM, MixtralConfig, shape | config, seed)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | PathLike[str]) -> str:
    """Write both to `path`, so that the returned string works as a model id in scripts and command lines.

    The model in memory also takes the path as its id, which is how TRL finds the tokenizer of a model it is handed.
    """
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    model.config._name_or_path = str(path)
    return str(path)


def _shape(vocab_size: int, hidden: int, layers: int, tie: bool) -> dict[str, Any]:
    if hidden < 8 or hidden % 8:
        raise ValueError(f"hidden={hidden}: the width must be a multiple of 8, for 4 heads of an even size")
    # Special ids that the vocabulary does not have would make generation stop on a token that cannot come.
    special = {"pad_token_id": _PAD, "eos_token_id": _EOS} if vocab_size >= _VOCAB_SIZE else {"pad_token_id": None}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "tie_word_embeddings": tie,
        "dtype": torch.float32,
    } | special


def _build(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], config: dict[str, Any], seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would also reseed accelerators, which `fork_rng` does not restore without naming them.
        torch.default_generator.manual_seed(seed)
        return model_class(config_class(**config)).float()
