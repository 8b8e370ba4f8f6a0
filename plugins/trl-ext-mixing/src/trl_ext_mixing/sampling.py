"""Completions of many prompts, in batches that do not depend on where a run was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """A prompt as the model sees it: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's own, such as that of a turn, and the tokenizer's.

    As in TRL's `GRPOTrainer`, so that a probe's completions end where those of training did.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = [] if own is None else [own] if isinstance(own, int) else list(own)
    known = tokenizer.eos_token_id
    return listed if known is None or known in listed else [known, *listed]


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    seed: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> list[tuple[Any, list[int]]]:
    """One sampled completion per prompt: as text, or as messages where the prompt is; with its token ids.

    Nothing but the arguments and the end tokens decides: the model's generation settings (a repetition penalty, min_p,
    beams) are set aside meanwhile.

    Args:
        prompts: text or messages.
        seed: seed of this batch alone; the surrounding random state is left as it was.
        temperature: 0 decodes greedily.

    Returns:
        A completion's ids go up to and with the first of `end_ids`, or without one to `max_new_tokens`.
    """
    from transformers import GenerationConfig

    texts = [prompt_text(tokenizer, p) for p in prompts]
    templated = not isinstance(prompts[0], str)  # the template has put the special tokens in
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not templated
    ).to(model.device)
    ends = end_ids(model, tokenizer)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        **(choice or {"do_sample": False}),
    )
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        _only(model, settings),
    ):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
        )
    completions = []
    for prompt, row in zip(prompts, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        ids = row[:end]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        completions.append((text if isinstance(prompt, str) else [{"role": "assistant", "content": text}], ids))
    return completions


@contextmanager
def _only(model: Any, settings: Any) -> Iterator[None]:
    """Let `generate` see no other settings: it fills in what its argument leaves open from the model's own."""
    # PEFT hands its wrapper's settings, which are those of the model inside unless set, to the model inside.
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = settings
    try:
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


def batches(problems: int, n: int, size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Number of the batch and its (problem, sample) pairs, always cut in the same places."""
    pairs = [(i, j) for i in range(problems) for j in range(n)]
    for number, start in enumerate(range(0, len(pairs), size)):
        yield number, pairs[start : start + size]


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: the first 63 bits of SHA-256 of "seed:number".

    Not their sum, with which batch 1 of seed 0 would draw what batch 0 of seed 1 does.
    """
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
