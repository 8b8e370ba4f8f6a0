"""A base model as GRPO would sample it, and as it scores demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def batches(rows: Sequence[Mapping[str, Any]], places: Iterable[int], size: int) -> list[list[int]]:
    """Places of rows in batches of similar length, the longest first: what does not fit in memory fails at once."""
    ordered = sorted(places, key=lambda i: (-len(str(rows[i]["prompt"])), i))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Sampler:
    """How completions are drawn; the defaults are GRPOConfig's."""

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def plain(self) -> bool:
        """Whether every completion can be drawn, with the probability that teacher forcing gives."""
        return self.top_p == 1.0 and self.top_k == 0


class Policy:
    """A causal language model with its tokenizer, and TRL's fused head at the sampling temperature.

    Args:
        path: folder or hub id.
        sampler: how completions are drawn.
        dtype: of the weights: auto, float32, bfloat16 or float16.
    """

    def __init__(self, path: str, sampler: Sampler, dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from trl.trainer.utils import add_fused_lm_head

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = torch.device("cpu") if accelerator is None else accelerator
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(self.device).eval()
        add_fused_lm_head(self.model, temperature=sampler.temperature)
        # As TRL's GRPOTrainer has it: the model's own ends, such as that of a turn, and the tokenizer's.
        eos = self.model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        known = self.tokenizer.eos_token_id
        self.eos_ids: list[int] = eos if known in eos else [known, *eos]
        self.sampler = sampler
        self._generation = GenerationConfig(
            max_new_tokens=sampler.max_completion_length,
            do_sample=True,
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.eos_ids,
            disable_compile=True,
        )
        # Or its own settings would fill in what is not set here, such as a repetition penalty.
        self.model.generation_config = self._generation

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Tokens of a prompt, text or messages, as GRPO gives them to the model."""
        if isinstance(prompt, str):
            return list(self.tokenizer(text=prompt)["input_ids"])
        return self._chat(prompt, add_generation_prompt=True)

    def demonstration_ids(self, prompt: Any, completion: Any) -> list[int]:
        """Tokens of a completion of the prompt, up to and with EOS.

        Raises:
            ValueError: the chat template renders the prompt in another way when an answer follows.
        """
        if isinstance(completion, str):
            ids = list(self.tokenizer(text=completion, add_special_tokens=False)["input_ids"])
        else:
            start, whole = self.prompt_ids(prompt), self._chat([*prompt, *completion])
            if whole[: len(start)] != start:
                raise ValueError(
                    "the chat template does not render a prompt as the beginning of prompt and answer; give the "
                    "demonstrations as text"
                )
            ids = whole[len(start) :]
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Draw one completion for each prompt; the same batch and seed give the same ones. EOS is included."""
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        drawn = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self._generation)
        return [self._up_to_eos(row) for row in drawn[:, width:].tolist()]

    def text(self, completion: Sequence[int]) -> str:
        """A completion without special tokens, as reward functions receive it."""
        return str(self.tokenizer.decode(completion, skip_special_tokens=True))

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """(tokens,) float64 each: log-probability of every token of each completion, given those before."""
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        found = self.model(**batch, use_cache=False, fused_lm_head=True).log_probs.double().cpu()
        return [found[i, len(p) - 1 : len(row) - 1] for i, (p, row) in enumerate(zip(prompts, rows, strict=True))]

    def _chat(self, messages: Any, **options: Any) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(
            conversation=list(messages), tokenize=True, return_dict=True, **options
        )
        return list(rendered["input_ids"])

    def _up_to_eos(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[: end + 1]
