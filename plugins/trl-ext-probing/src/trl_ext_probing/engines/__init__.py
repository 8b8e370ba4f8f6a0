"""Engines: prompts in, completions out, behind one interface.

The same seed gives the same completions, whatever the batches, the order of the prompts, the ranks or interruptions
(but for rounding): the noise of a draw depends on (seed, prompt, sample, position) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Messages = list[dict[str, Any]]
Prompt = str | Messages
"""Text, or the messages of a conversation, to which the model's chat template applies."""


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
        prompt_index: Position of the prompt among those given.
        sample_index: 0 to n - 1 within the prompt.
        token_ids: The tokens, the end token included where it was drawn; None where the engine does not tell.
        text: The tokens in words, special tokens left out.
        finish_reason: `"stop"` at an end token, `"length"` at the limit.
        log_probs: Of the tokens, in nats at the temperature of the draw; None where the engine does not tell.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...] | None
    text: str
    finish_reason: str
    log_probs: tuple[float, ...] | None = None


class Engine(Protocol):
    """Samples completions of prompts."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[Completion]:
        """Give each completion as soon as it is finished, in any order; greedy at temperature 0."""
        ...
