"""What every engine takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from trl_ext.errors import ConfigurationError

Messages = list[dict[str, Any]]
Prompt = str | Messages
"""Text, or the messages of a conversation, to which the model's chat template applies."""


class Draw(NamedTuple):
    """One completion that is to be drawn."""

    prompt_index: int
    sample_index: int


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
        prompt_index: Position of the prompt among those given.
        sample_index: 0 to n - 1 within the prompt.
        token_ids: The tokens, the end token included where it was drawn; None where the engine does not tell.
        text: The tokens in words, special tokens left out.
        finish_reason: `"stop"` at an end token, `"length"` at the limit; a server may have further reasons.
        log_probs: Of the tokens, in nats at the temperature of the draw (1 where that is 0) and before top-k and top-p
            cut the distribution; None where the engine does not tell.
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
        draws: Sequence[tuple[int, int]] | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[Completion]:
        """Give each completion as soon as it is finished, in any order.

        Only these arguments and the end tokens decide. The model's own generation settings (a repetition penalty,
        min_p, beams) do not count, except that an engine cannot keep a server from applying them.

        Args:
            prompts: All prompts, also where only some are to be completed: the noise of a prompt that is there several
                times depends on how many equal ones precede it.
            n: Completions of each prompt.
            draws: Which completions to draw, as pairs (prompt index, sample index), such as those that
                `outstanding` gives of an interrupted run; None draws all.
            max_tokens: Longest completion in tokens, the end token included.
            temperature: Divides the logits; 0 decodes greedily.
            top_p: Only the most probable tokens that together have at least this probability are drawn.
            top_k: Only this many of the most probable tokens are drawn; 0 does not restrict them.
            seed: Decides, together with the prompt, the sample and the position, the noise of each draw.

        Raises:
            ConfigurationError: An argument is out of its range, or a prompt cannot be used.
        """
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn, checked.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int

    def __post_init__(self) -> None:
        in_range = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0, which decodes greedily"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which draws from all tokens"),
            "top_k": (self.top_k >= 0, "at least 0, which draws from all tokens"),
        }
        for name, (holds, allowed) in in_range.items():
            if not holds:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be {allowed}")
