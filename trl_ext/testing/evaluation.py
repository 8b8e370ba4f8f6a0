"""Held-out exact match by greedy generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
) -> float:
    """Give the share of rows, in [0, 1], whose greedy completion of `prompt` is `answer`, white space around it aside.

    `prompt` is text or messages. `max_new_tokens` defaults to the longest answer and its EOS token. The model's
    training mode, the tokenizer's padding side and the random state stay as they were. Raises ValueError without rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("exact_match needs at least one row")
    prompts = [_as_text(tokenizer, row["prompt"]) for row in rows]
    answers = [str(row["answer"]).strip() for row in rows]
    limit = max_new_tokens or 1 + max(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers)

    training, padding_side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        hits = 0
        for start in range(0, len(rows), batch_size):
            batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
            output = model.generate(
                **batch,
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            hits += sum(t.strip() == a for t, a in zip(texts, answers[start : start + batch_size], strict=True))
        return hits / len(rows)
    finally:
        model.train(training)
        tokenizer.padding_side = padding_side


def _as_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
