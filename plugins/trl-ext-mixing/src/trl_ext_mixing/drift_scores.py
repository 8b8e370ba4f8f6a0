"""Likelihood and hits of a model on general data, row by row, on the tokens that TRL's SFT would train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigurationError
from trl_ext_mixing.tokens import message_ids, prompt_and_completion_ids, text_ids

if TYPE_CHECKING:
    from torch import Tensor

Encoded = tuple[list[int], int]
"""Token ids, and the position of the first label among them: at least 1, and their number where there is no label."""


@dataclass(frozen=True)
class Score:
    """Sums over the label tokens of one example."""

    nll: float
    hits: int
    """Labels that are the most probable token."""
    tokens: int


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


def encode(tokenizer: Any, row: dict[str, Any], max_length: int = 1024) -> Encoded:
    """Tokenise a row as TRL's SFTTrainer does: text ends with EOS, once; truncated at the end.

    Labels are the completion where a row has one, and all tokens but the first otherwise (of messages: as the chat
    template writes them).

    Raises:
        ConfigurationError: one of prompt and completion is text and the other messages.
    """
    column = data_column(list(row))
    content = row[column]
    if not content:
        return [], 1
    first = 1
    if column == "completion" and row["prompt"]:
        if isinstance(row["prompt"], str) != isinstance(content, str):
            raise ConfigurationError("one of prompt and completion is text and the other messages; make both one kind")
        ids, _, first = prompt_and_completion_ids(tokenizer, row["prompt"], content)
    else:
        ids = text_ids(tokenizer, content) if isinstance(content, str) else message_ids(tokenizer, content)
    ids = ids[:max_length]
    return ids, min(max(first, 1), max(len(ids), 1))


def score(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, batch_size: int = 8, max_length: int = 1024
) -> Iterator[list[Score]]:
    """Scores of the rows, a batch at a time; on the tokens of `encode`."""
    yield from score_encoded(model, [encode(tokenizer, row, max_length) for row in rows], batch_size=batch_size)


def score_encoded(model: Any, encoded: Sequence[Encoded], *, batch_size: int = 8) -> Iterator[list[Score]]:
    """Scores of tokenised rows, a batch at a time; of a row without a label, zeros."""
    import torch

    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        if all(first >= len(ids) for ids, first in batch):
            yield [Score(0.0, 0, 0)] * len(batch)
            continue
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (tokens, first) in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            attention[i, : max(len(tokens), 1)] = 1  # a row that attends to nothing may give NaN
            mask[i, first : len(tokens)] = True
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention.to(model.device), use_cache=False).logits[:, :-1]
        yield _scores(logits, ids[:, 1:], mask[:, 1:])


def _scores(logits: Tensor, labels: Tensor, mask: Tensor) -> list[Score]:
    import torch

    losses = torch.nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
    nll = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, losses)
    hits = (logits.argmax(-1) == labels) & mask
    columns = (nll.sum(1).tolist(), hits.sum(1).tolist(), mask.sum(1).tolist())
    return [Score(*row) for row in zip(*columns, strict=True)]
