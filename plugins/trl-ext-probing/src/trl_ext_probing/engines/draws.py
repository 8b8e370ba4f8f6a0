"""Which completions are still to be drawn, and the key of each one's noise."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container, Sequence

from trl_ext.errors import ConfigurationError
from trl_ext_probing.engines.interface import Draw, Prompt


def outstanding(prompts: int, n: int, done: Container[tuple[int, int]] = ()) -> list[Draw]:
    """All draws of `n` completions for each of so many prompts, without those that are done."""
    every = (Draw(i, j) for i in range(prompts) for j in range(n))
    return [draw for draw in every if draw not in done]


def chosen_draws(prompts: Sequence[Prompt], n: int, draws: Sequence[tuple[int, int]] | None) -> list[Draw]:
    """The draws that the arguments of `Engine.generate` ask for.

    Raises:
        ConfigurationError: n is below 1, or a draw is out of range or there twice.
    """
    if n < 1:
        raise ConfigurationError(f"n={n} must be at least 1")
    if draws is None:
        return outstanding(len(prompts), n)
    chosen = [Draw(*draw) for draw in draws]
    for draw, count in Counter(chosen).items():
        if count > 1:
            raise ConfigurationError(f"draws: {tuple(draw)} is there {count} times")
        if not (0 <= draw.prompt_index < len(prompts) and 0 <= draw.sample_index < n):
            raise ConfigurationError(f"draws: there is no {tuple(draw)} with {len(prompts)} prompts and n={n}")
    return chosen


def noise_keys(prompts: Sequence[Prompt], draws: Sequence[Draw], seed: int) -> list[int]:
    """64 bits for each draw, of its seed, prompt and sample: the first of SHA-256, as a signed integer.

    A prompt counts by its content, so neither the order of the prompts nor what else is among them matters. Of equal
    prompts, the number of those before it tells one from the next.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        content = json.dumps(prompt, sort_keys=True)
        names.append(hashlib.sha256(f"{seen[content]}:{content}".encode()).hexdigest())
        seen[content] += 1
    keys = (f"{seed}:{names[draw.prompt_index]}:{draw.sample_index}" for draw in draws)
    return [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True) for key in keys]
