"""Rows of different lengths that decode together over one key-value cache, which others join and leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl_ext_probing.engines.interface import Draw


@dataclass
class Row:
    """One completion in the making."""

    draw: Draw
    noise_key: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""


class DecodingBatch:
    """Rows, the cache of what the model has read of them, and the logits of their next tokens.

    The rows end together: a shorter one has padding before it, which its mask hides. So the cache of another batch
    joins by padding the shorter of the two.

    Attributes:
        rows: B rows.
        logits: (B, V), float32, of the next token of each.
    """

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        """Read the prompts, each one once for all rows that begin with it."""
        self.model, self.rows = model, list(rows)
        self.accepts = _forward_parameters(model)
        self.cache = empty_cache(model)
        prompts, of_row = _distinct([row.prompt for row in rows])
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        self.mask = self._tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.logits = self._next_logits(self._tensor(padded), (self.mask.cumsum(-1) - 1).clamp_(min=0))
        self._select(self._tensor(of_row))
        self.noise_keys = self._tensor([row.noise_key for row in rows])

    def positions(self) -> torch.Tensor:
        """Number of tokens that each row has drawn, (B,)."""
        return self._tensor([len(row.tokens) for row in self.rows])

    def step(self, tokens: torch.Tensor) -> None:
        """Read the next token of each row, (B,); of a finished one, that nobody has dropped yet, it does not matter."""
        self.mask = pad(self.mask, (0, 1), value=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        finished = self._tensor([[bool(row.finish_reason)] for row in self.rows])
        # Those of a finished row would grow on, and could leave the model's table of positions.
        self.logits = self._next_logits(tokens[:, None], positions.masked_fill(finished, 0))

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.rows = [self.rows[i] for i in indices]
        kept = self._tensor(indices)
        self._select(kept)
        self.noise_keys = self.noise_keys[kept]
        if can_join(self.cache):
            self._trim()

    def join(self, other: DecodingBatch) -> None:
        """Take in the rows of another batch, behind one's own."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            if layer.is_initialized:  # a layer that reads the cache of another has none
                layer.keys = torch.cat([_widened(layer.keys, width), _widened(joining.keys, width)])
                layer.values = torch.cat([_widened(layer.values, width), _widened(joining.values, width)])
        masks = (pad(batch.mask, (width - batch.mask.shape[1], 0)) for batch in (self, other))
        self.mask = torch.cat([*masks])
        self.logits = torch.cat([self.logits, other.logits])
        self.noise_keys = torch.cat([self.noise_keys, other.noise_keys])
        self.rows += other.rows

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)

    def _next_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits, (B, V), after these tokens, (B, T), which the cache takes in."""
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepts},
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _select(self, indices: torch.Tensor) -> None:
        self.cache.reorder_cache(indices)
        self.mask, self.logits = self.mask[indices], self.logits[indices]

    def _trim(self) -> None:
        """Cut off the columns in which all rows have padding."""
        surplus = self.mask.shape[1] - int(self.mask.sum(-1).max())
        self.mask = self.mask[:, surplus:]
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., surplus:, :], layer.values[..., surplus:, :]


def empty_cache(model: Any) -> DynamicCache:
    """A cache whose attention layers keep all tokens, also those that a sliding window no longer sees.

    Rows can then join, leave and be trimmed, which a layer that forgets does not allow. A model with layers of
    another kind, such as a state-space model's, gets the cache that `generate` would give it.
    """
    own = DynamicCache(config=model.config)
    return DynamicCache() if all(isinstance(layer, DynamicLayer) for layer in own.layers) else own


def can_join(cache: DynamicCache) -> bool:
    """Whether the cache is nothing but keys and values, one for each token."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _forward_parameters(model: Any) -> set[str]:
    """The names of what the model's forward takes; PEFT's hands everything on to that of the model inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def _distinct(prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts without repetitions, and the place of each one's in that list."""
    places: dict[tuple[int, ...], int] = {}
    of_row = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return [list(prompt) for prompt in places], of_row


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values, (B, heads, T, D), with padding before them up to T = width."""
    return pad(states, (0, 0, width - states.shape[-2], 0))
