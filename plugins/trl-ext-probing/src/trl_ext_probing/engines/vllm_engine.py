"""The engine of vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt

from trl_ext_probing.engines.draws import chosen_draws, noise_keys
from trl_ext_probing.engines.interface import Completion, Prompt, SamplingSettings
from trl_ext_probing.engines.prompt_tokens import prompt_tokens

AT_A_TIME = 1024
"""Completions that vLLM gets together, and gives back together: what an interruption can lose."""


class VllmEngine:
    """Samples with vLLM; an `Engine`.

    vLLM takes a seed for each completion and makes its noise of it by itself. Log-probabilities are not given, since
    its version and options decide whether the temperature counts in them.

    Args:
        model: A folder or a hub id.
        options: vLLM's own, such as `dtype` and `tensor_parallel_size`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        # generation_config="vllm": the model's own sampling settings do not count, but its end tokens do.
        self.llm = LLM(model=model, **{"generation_config": "vllm", **options})

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
        settings = SamplingSettings(max_tokens, temperature, top_p, top_k)
        chosen = chosen_draws(prompts, n, draws)
        keyed = list(zip(chosen, noise_keys(prompts, chosen, seed), strict=True))
        tokenizer = self.llm.get_tokenizer()
        for start in range(0, len(keyed), AT_A_TIME):
            part = keyed[start : start + AT_A_TIME]
            tokens = [prompt_tokens(tokenizer, prompts[draw.prompt_index], draw.prompt_index) for draw, _ in part]
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=ids) for ids in tokens],
                [_parameters(settings, key) for _, key in part],
                use_tqdm=False,
            )
            for (draw, _), output in zip(part, outputs, strict=True):
                (made,) = output.outputs
                yield Completion(*draw, tuple(made.token_ids), made.text, made.finish_reason)


def _parameters(settings: SamplingSettings, key: int) -> Any:
    return SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=key % 2**31,
    )
