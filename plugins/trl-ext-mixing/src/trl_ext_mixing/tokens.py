"""Token ids of text, messages, and prompts with completions, as TRL's SFT makes them."""

from __future__ import annotations

from itertools import takewhile
from typing import Any


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that ends with EOS, once: also where the tokenizer puts one behind every text by itself."""
    end = tokenizer.eos_token or ""
    ids = list(tokenizer(text=text if text.endswith(end) else text + end)["input_ids"])
    if ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids.pop()
    return ids


def message_ids(tokenizer: Any, messages: Any, **template: Any) -> list[int]:
    """Ids of messages as the chat template writes them; further arguments are the template's."""
    written = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template)
    return list(written["input_ids"])


def prompt_and_completion_ids(
    tokenizer: Any, prompt: Any, completion: Any, **template: Any
) -> tuple[list[int], list[int], int]:
    """Ids of a prompt with its completion, of the prompt alone, and the position of the first label in the former.

    Labels begin where the two part ways, which is inside of the prompt where tokens merge across the border, or where
    the template opens a turn that answers are rendered without (`<think>`).

    Args:
        tokenizer: a tokenizer, no processor.
        prompt, completion: both text or both messages.
        template: arguments of the chat template.
    """
    if isinstance(prompt, str):
        ids, head = text_ids(tokenizer, prompt + completion), list(tokenizer(text=prompt)["input_ids"])
    else:
        ids = message_ids(tokenizer, [*prompt, *completion], **template)
        head = message_ids(tokenizer, prompt, add_generation_prompt=True, **template)
    return ids, head, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(head, ids, strict=False)))
