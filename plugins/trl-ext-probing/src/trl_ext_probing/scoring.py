"""Teacher-forced scores: how likely a model finds the label tokens of examples, through TRL's fused head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trl_ext_probing.encoding import Encoded
from trl_ext_probing.ranks import shared_work


class TokenScores(NamedTuple):
    """Of the T label tokens of one example."""

    log_probs: NDArray[np.float32]
    """(T,) natural logarithms."""
    hits: int
    """Labels that are the most probable token."""


class Scorer:
    """A model that scores examples without building logits of all positions.

    Args:
        model: a causal language model of transformers, or an adapter of PEFT around one, which gets TRL's fused head.
        temperature: by which logits are divided.
    """

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        from trl.trainer.utils import add_fused_lm_head

        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(plain, temperature=temperature, outputs=("log_probs", "is_top1"))
        self._model = model.eval()

    def score(self, examples: Sequence[Encoded], batch_tokens: int = 16_384) -> list[TokenScores]:
        """Scores of the examples, in their order, made in batches of similar length.

        Args:
            examples: tokens and first label of each; one without a label gets an empty score.
            batch_tokens: tokens in a batch, padding included; an example longer than that is a batch of its own.
        """
        found = [TokenScores(np.empty(0, dtype=np.float32), 0)] * len(examples)
        for batch in _batches(examples, batch_tokens):
            for place, scores in zip(batch, self._score([examples[i] for i in batch]), strict=True):
                found[place] = scores
        return found

    def score_shared(self, examples: Sequence[Encoded], batch_tokens: int = 16_384) -> list[TokenScores]:
        """The same, of which each process makes its part. Collective."""

        def score(part: list[tuple[int, Encoded]]) -> Iterator[tuple[int, TokenScores]]:
            return zip((i for i, _ in part), self.score([e for _, e in part], batch_tokens), strict=True)

        found = dict(shared_work(list(enumerate(examples)), score, itemgetter(0)))
        return [found[i] for i in range(len(examples))]

    @torch.no_grad()
    def _score(self, batch: Sequence[Encoded]) -> list[TokenScores]:
        width = max(len(example.ids) for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (tokens, first) in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            labels[i, first : len(tokens)] = ids[i, first : len(tokens)]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        output = self._model(**{k: v.to(self._model.device) for k, v in inputs.items()}, fused_lm_head=True)
        log_probs, top = output.log_probs.float().cpu().numpy(), output.is_top1.bool().cpu().numpy()
        spans = [(i, slice(example.first - 1, len(example.ids) - 1)) for i, example in enumerate(batch)]
        return [TokenScores(log_probs[i, span], int(top[i, span].sum())) for i, span in spans]


def _batches(examples: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Places of the examples with a label, the longest first: what does not fit in memory fails at once."""
    places = [i for i, example in enumerate(examples) if example.labels]
    ordered = sorted(places, key=lambda i: (-len(examples[i].ids), i))
    while ordered:
        size = max(1, budget // len(examples[ordered[0]].ids))
        yield ordered[:size]
        ordered = ordered[size:]
