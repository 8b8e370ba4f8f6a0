"""Completions of many prompts, in batches that do not depend on where a run was interrupted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

RewardFunction = Callable[..., Sequence[float | None]]


def load_model(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode, on the GPU where there is one) and tokenizer of a path, an adapter or a hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads an adapter's base model by itself where PEFT is installed.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):  # an adapter's folder without a tokenizer
        tokenizer = AutoTokenizer.from_pretrained(loaded.config._name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_reward(path: str) -> RewardFunction:
    """A reward function by dotted path (`package.module.function`, the working directory included) or TRL's by name.

    Raises:
        ValueError: it cannot be imported; the message says why.
    """
    module, _, name = path.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module or "trl.rewards"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {path!r} is a {type(function).__name__}, not a function")
    return function


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """A prompt as the model sees it: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


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

    Args:
        prompts: text or messages.
        seed: seed of this batch alone; the surrounding random state is left as it was.
        temperature: 0 decodes greedily.
    """
    texts = [prompt_text(tokenizer, p) for p in prompts]
    templated = not isinstance(prompts[0], str)  # the template has put the special tokens in
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not templated
    ).to(model.device)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(choice or {"do_sample": False}),
        )
    completions = []
    for prompt, row in zip(prompts, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        ids = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
        text = tokenizer.decode(ids, skip_special_tokens=True)
        completions.append((text if isinstance(prompt, str) else [{"role": "assistant", "content": text}], ids))
    return completions


def batches(problems: int, n: int, size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Number of the batch and its (problem, sample) pairs, always cut in the same places."""
    pairs = [(i, j) for i in range(problems) for j in range(n)]
    for number, start in enumerate(range(0, len(pairs), size)):
        yield number, pairs[start : start + size]
