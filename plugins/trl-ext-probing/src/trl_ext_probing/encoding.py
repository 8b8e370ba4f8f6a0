"""Token ids of text, messages, and prompts with completions, as TRL's trainers make them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from trl_ext.errors import ConfigurationError


class Encoded(NamedTuple):
    """An example as TRL's `SFTTrainer` sees it."""

    ids: list[int]
    first: int
    """Position of the first label: at least 1, and the number of ids or more where there is no label."""

    @property
    def labels(self) -> int:
        """Their number."""
        return max(len(self.ids) - self.first, 0)


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


def prompt_ids(tokenizer: Any, prompt: Any, **template: Any) -> list[int]:
    """Ids of a prompt, text or messages, as GRPO gives them to the model."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return message_ids(tokenizer, prompt, add_generation_prompt=True, **template)


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
    head = prompt_ids(tokenizer, prompt, **template)
    if isinstance(prompt, str):
        ids = text_ids(tokenizer, prompt + completion)
    else:
        ids = message_ids(tokenizer, [*prompt, *completion], **template)
    return ids, head, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(head, ids, strict=False)))


def drawn_ids(tokenizer: Any, prompt: Any, completion: Any, end_ids: Collection[int]) -> list[int]:
    """Ids of a completion as a model would have to draw it behind `prompt_ids`, up to and with an end token.

    They differ from the labels of `encode` where tokens merge across the border: what is drawn begins behind the
    prompt's tokens.

    Args:
        tokenizer: a tokenizer, no processor.
        prompt, completion: both text or both messages.
        end_ids: the tokens that end a completion.

    Raises:
        ConfigurationError: the chat template renders the prompt in another way when an answer follows.
    """
    if isinstance(completion, str):
        ids = list(tokenizer(text=completion, add_special_tokens=False)["input_ids"])
    else:
        whole, head, first = prompt_and_completion_ids(tokenizer, prompt, completion)
        if first < len(head):
            raise ConfigurationError(
                "the chat template does not render a prompt as the beginning of prompt and answer; give the "
                "demonstrations as text"
            )
        ids = whole[len(head) :]
    ids = up_to_end(ids, end_ids)
    return ids if ids and ids[-1] in end_ids else [*ids, tokenizer.eos_token_id]


def up_to_end(ids: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """The ids up to and with the first one that ends a completion."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return list(ids[: end + 1])


def data_column(columns: Sequence[str]) -> str:
    """The column that holds what is scored: `completion` beside `prompt`, else `messages`, else `text`.

    Raises:
        ConfigurationError: there is none of these.
    """
    if {"prompt", "completion"} <= set(columns):
        return "completion"
    for name in ("messages", "text"):
        if name in columns:
            return name
    raise ConfigurationError(
        f"the data has neither text, messages, nor prompt and completion (there are {', '.join(columns)}); rename what "
        "to score: --columns content=text"
    )


def encode(
    tokenizer: Any, row: Mapping[str, Any], max_length: int = 1024, completion_only: bool | None = None
) -> Encoded:
    """Tokenise a row as TRL's SFTTrainer does: text ends with EOS, once; truncated at the end.

    Args:
        tokenizer: a tokenizer, no processor.
        row: with `prompt` and `completion`, `messages`, or `text`.
        max_length: in tokens.
        completion_only: as TRL's `completion_only_loss`: None and True take the completion for labels where a row has
            one, and otherwise all tokens but the first are labels.

    Raises:
        ConfigurationError: one of prompt and completion is text and the other messages.
    """
    column = data_column(list(row))
    content = row[column]
    if not content:
        return Encoded([], 1)
    first = 1
    if column == "completion" and row["prompt"]:
        if isinstance(row["prompt"], str) != isinstance(content, str):
            raise ConfigurationError("one of prompt and completion is text and the other messages; make both one kind")
        ids, _, border = prompt_and_completion_ids(tokenizer, row["prompt"], content)
        first = border if completion_only is not False else 1
    else:
        ids = text_ids(tokenizer, content) if isinstance(content, str) else message_ids(tokenizer, content)
    ids = ids[:max_length]
    return Encoded(ids, min(max(first, 1), max(len(ids), 1)))
