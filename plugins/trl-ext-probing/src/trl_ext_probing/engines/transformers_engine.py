"""The engine inside of this process: a transformers model decodes, and rows that finish make room for the next.

transformers' own continuous batching is not used: it draws its noise from the global random state, in an order that
depends on the batches, and on a CPU its attention is computed over the cache of all rows for each row.
`benchmarks/probing.py` measures it beside this engine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trl_ext.errors import ConfigurationError
from trl_ext_probing.engines.decoding_batch import DecodingBatch, Row, can_join
from trl_ext_probing.engines.draws import chosen_draws, noise_keys
from trl_ext_probing.engines.interface import Completion, Prompt, SamplingSettings
from trl_ext_probing.engines.prompt_tokens import end_tokens, prompt_tokens
from trl_ext_probing.engines.token_choice import choose_tokens


class TransformersEngine:
    """Samples with a causal language model of transformers; an `Engine`.

    A completion ends with one of the end tokens of the model's generation settings or with the tokenizer's. Prompts
    are completed in the order of their lengths, the longest first; one is read once for all its samples that begin
    together.

    Args:
        model: In evaluation mode, on its device; a PEFT model too, unless its adapter is a learnt prompt.
        tokenizer: The model's.
        batch_size: Completions that are decoded at a time. It decides about memory and speed, and not about what is
            drawn, but for rounding.

    Raises:
        ConfigurationError: The model cannot be used, or batch_size is below 1.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 64) -> None:
        _refuse_model(model)
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} must be at least 1")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @torch.no_grad()
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
        """See `Engine.generate`."""
        if self.model.training:
            raise ConfigurationError("engine 'transformers': the model is in training mode; call model.eval() before")
        settings = SamplingSettings(max_tokens, temperature, top_p, top_k)
        waiting = deque(self._rows(prompts, n, draws, seed))
        ends = end_tokens(self.model, self.tokenizer)
        batch: DecodingBatch | None = None
        while batch or waiting:
            batch = self._with_waiting(batch, waiting)
            tokens, log_probs = choose_tokens(batch.logits, batch.noise_keys, batch.positions(), settings)
            for row in _finished(batch, tokens, log_probs, ends, max_tokens):
                yield self._completion(row)
            batch = _advanced(batch, tokens)

    def _rows(self, prompts: Sequence[Prompt], n: int, draws: Sequence[tuple[int, int]] | None, seed: int) -> list[Row]:
        """One for each draw, the longest prompt first and the samples of a prompt together."""
        chosen = chosen_draws(prompts, n, draws)
        tokens = {i: prompt_tokens(self.tokenizer, prompts[i], i) for i in {draw.prompt_index for draw in chosen}}
        keys = noise_keys(prompts, chosen, seed)
        rows = [Row(draw, key, tokens[draw.prompt_index]) for draw, key in zip(chosen, keys, strict=True)]
        return sorted(rows, key=lambda row: (-len(row.prompt), row.draw))

    def _with_waiting(self, batch: DecodingBatch | None, waiting: deque[Row]) -> DecodingBatch:
        """The batch, joined by waiting rows where an eighth of the places is free: a join costs about a step."""
        if batch is None:
            return self._begun(waiting, self.batch_size)
        free = self.batch_size - len(batch.rows)
        if waiting and 8 * free >= self.batch_size and can_join(batch.cache):
            batch.join(self._begun(waiting, free))
        return batch

    def _begun(self, waiting: deque[Row], most: int) -> DecodingBatch:
        return DecodingBatch(self.model, [waiting.popleft() for _ in range(min(most, len(waiting)))])

    def _completion(self, row: Row) -> Completion:
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Completion(*row.draw, tuple(row.tokens), text, row.finish_reason, tuple(row.log_probs))


def _refuse_model(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ConfigurationError(f"engine 'transformers': {type(model).__name__} is not a causal language model")
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ConfigurationError(
            f"engine 'transformers': an adapter of type {adapter.peft_type} cannot be sampled from"
        )


def _finished(
    batch: DecodingBatch, tokens: torch.Tensor, log_probs: torch.Tensor, ends: frozenset[int], max_tokens: int
) -> list[Row]:
    """Append the tokens (B,) and their log-probabilities (B,) to the rows; those that end with them.

    Raises:
        ConfigurationError: The model gives no numbers, and `argmax` would take any token.
    """
    finished = []
    for row, token, log_prob in zip(batch.rows, tokens.tolist(), log_probs.tolist(), strict=True):
        if row.finish_reason:
            continue
        if math.isnan(log_prob):
            raise ConfigurationError(f"engine 'transformers': logits are NaN after {len(row.tokens)} tokens")
        row.tokens.append(token)
        row.log_probs.append(log_prob)
        row.finish_reason = "stop" if token in ends else "length" if len(row.tokens) == max_tokens else ""
        if row.finish_reason:
            finished.append(row)
    return finished


def _advanced(batch: DecodingBatch, tokens: torch.Tensor) -> DecodingBatch | None:
    """The batch after its tokens (B,), without the finished rows once they are an eighth of it; None of nothing."""
    going_on = [i for i, row in enumerate(batch.rows) if not row.finish_reason]
    if not going_on:
        return None
    if 8 * (len(batch.rows) - len(going_on)) >= len(batch.rows):
        batch.keep(going_on)
        tokens = tokens[going_on]
    batch.step(tokens)
    return batch
