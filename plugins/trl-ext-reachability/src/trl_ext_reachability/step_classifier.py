"""A token-classification model as verifier: the probability that a step is right, read where the step ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class StepClassifier:
    """Scores steps with a process reward model.

    The model reads prompt, step, separator, step, separator, ... in its own tokenizer's tokens, and what it says at the
    last token of a separator is the reward of the step before: the probability of label 1, or the sigmoid of a single
    output. A causal model judges a step by what came before; a bidirectional one also sees what follows.

    Args:
        path: folder or hub id of a model for `AutoModelForTokenClassification`.
        separator: what ended the steps when the model was trained.
        device: where to run it; every rank has a copy.
        batch_size: completions in a forward.
    """

    def __init__(self, path: str, separator: str, device: torch.device, batch_size: int = 8) -> None:
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForTokenClassification.from_pretrained(path, dtype="auto").to(device).eval()
        self.device = device
        self.batch_size = batch_size
        self._separator = self._encode(separator)
        if not self._separator:
            raise ValueError(f"separator={separator!r} has no token in the tokenizer of {path}")

    def __call__(self, steps: Sequence[Sequence[str]], prompts: Sequence[Any], **columns: Any) -> list[list[float]]:
        """Rewards in [0, 1], one per step."""
        rows = [self._row(prompt, row) for prompt, row in zip(prompts, steps, strict=True)]
        rewards: list[list[float]] = []
        for start in range(0, len(rows), self.batch_size):
            rewards += self._score(rows[start : start + self.batch_size])
        return rewards

    def _row(self, prompt: Any, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens, and the places of the separators' last ones."""
        bos = self.tokenizer.bos_token_id
        ids = self._encode_prompt(prompt)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        ends = []
        for step in steps:
            ids = [*ids, *self._encode(step.strip()), *self._separator]
            ends.append(len(ids) - 1)
        return ids, ends

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        width = max(len(ids) for ids, _ in rows)
        # Padding is masked, so its token does not matter; not every tokenizer has one.
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        right = logits[..., 0].sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)[..., 1]
        return [[row[end] for end in ends] for row, (_, ends) in zip(right.tolist(), rows, strict=True)]

    def _encode_prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt)
        if self.tokenizer.chat_template is None:
            return self._encode("\n".join(message["content"] for message in prompt))
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return self._encode(str(text))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
