"""Procedural tasks with verifiable answers.

A task draws a prompt and its solution, can write a wrong solution of the same form, and can judge a completion. From
that come data sets in TRL's formats, with a held-out split that shares no prompt with training, and reward functions.
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

Kind = Literal["language_modeling", "prompt_completion", "prompt_only"]
Split = Literal["train", "held_out"]
Completion = str | Sequence[dict[str, Any]]

_HELD_OUT_SHARE = 5  # one prompt in five is never seen in training
_MAX_MISSES = 10_000  # draws in a row without a new held-out prompt after which there are taken to be no more


@dataclass(frozen=True)
class Task(ABC):
    """A family of prompts with one right solution each. Subclasses are frozen dataclasses of its parameters."""

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Give a prompt and its solution."""

    @abstractmethod
    def corrupt(self, rng: random.Random, prompt: str, solution: str) -> str:
        """Give a wrong solution of the same form."""

    def score(self, completion: str, solution: str) -> float:
        """Give the share in [0, 1] of the completion that is right; 1 only where the whole of it is."""
        return float(completion.strip() == solution)

    def dataset(
        self,
        size: int,
        kind: Kind = "prompt_completion",
        *,
        conversational: bool = False,
        split: Split = "train",
        seed: int = 0,
        noise: float = 0.0,
    ) -> Dataset:
        """Give `size` rows in one of TRL's formats; the same arguments give the same rows.

        Columns. language_modeling: `text`, or `messages` where `conversational`. prompt_completion: `prompt`,
        `completion`. prompt_only: `prompt`. Every format also has `answer` (the right solution) and `corrupted`
        (whether the demonstration is wrong).

        Which split a prompt belongs to depends on the prompt alone, so that no held-out prompt is in any training set,
        whatever the seeds and sizes. Held-out prompts are distinct; training prompts may repeat. `noise` is the share
        of rows, rounded to a whole number, whose demonstration is wrong.

        Raises ValueError for an unknown kind or split, a noise outside [0, 1], or too few prompts to hold out.
        """
        if kind not in ("language_modeling", "prompt_completion", "prompt_only"):
            raise ValueError(f"kind={kind!r} is not one of language_modeling, prompt_completion, prompt_only")
        if split not in ("train", "held_out"):
            raise ValueError(f"split={split!r} is not one of train, held_out")
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise}: the share of wrong demonstrations is in [0, 1]")
        # Separate streams: which rows are wrong, and how, leaves the prompts as they are.
        pairs = self._draws(seed, split)
        if split == "held_out":
            pairs = _distinct(pairs, size)
        noise_rng = random.Random(f"{self!r} noise {seed}")
        wrong = set(noise_rng.sample(range(size), round(noise * size)))
        rows = []
        for index, (prompt, solution) in zip(range(size), pairs, strict=False):
            shown = self.corrupt(noise_rng, prompt, solution) if index in wrong else solution
            rows.append(
                _format(kind, conversational, prompt, shown) | {"answer": solution, "corrupted": index in wrong}
            )
        return Dataset.from_list(rows)

    def reward(self, completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
        """Give 1.0 for each completion that is entirely right, else 0.0: a reward function in TRL's form."""
        return [float(self.score(_text(c), a) == 1) for c, a in zip(completions, answer, strict=True)]

    def partial_reward(self, completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
        """Give the share of each completion that is right: a denser reward function in TRL's form."""
        return [self.score(_text(c), a) for c, a in zip(completions, answer, strict=True)]

    def _draws(self, seed: int, split: Split) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"{self!r} {split} {seed}")
        while True:
            prompt, solution = self.draw(rng)
            if (zlib.crc32(prompt.encode()) % _HELD_OUT_SHARE == 0) == (split == "held_out"):
                yield prompt, solution


@dataclass(frozen=True)
class Addition(Task):
    """Sum of two numbers of up to `digits` digits: "12+34=" -> "46"; a wrong solution has one wrong digit."""

    digits: int = 2

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits={self.digits}: numbers have at least one digit")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        return f"{a}+{b}=", str(a + b)

    def corrupt(self, rng: random.Random, prompt: str, solution: str) -> str:
        return _with_another(rng, solution, "0123456789")


@dataclass(frozen=True)
class ModularChain(Task):
    """A chain of `steps` operations modulo `modulus`, with every intermediate result: "7;+5;*3:" -> "2,6" (mod 10).

    `score` is the share of right steps, each judged at its place. A wrong solution goes wrong at one step and carries
    on correctly from there, as a wrong derivation does.
    """

    steps: int = 3
    modulus: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.modulus < 2:
            raise ValueError(f"steps={self.steps}, modulus={self.modulus}: at least one step, modulo at least 2")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        operations = [(rng.choice("+*"), rng.randrange(1, self.modulus)) for _ in range(self.steps)]
        prompt = ";".join([str(rng.randrange(self.modulus)), *(f"{sign}{number}" for sign, number in operations)]) + ":"
        return prompt, ",".join(map(str, self._run(prompt)))

    def corrupt(self, rng: random.Random, prompt: str, solution: str) -> str:
        slip = rng.randrange(self.steps)
        return ",".join(map(str, self._run(prompt, slip, rng.randrange(1, self.modulus))))

    def score(self, completion: str, solution: str) -> float:
        shown, right = completion.strip().split(","), solution.split(",")
        hits = sum(a == b for a, b in zip(shown, right, strict=False))
        return hits / max(len(shown), len(right))

    def _run(self, prompt: str, slip: int = -1, error: int = 0) -> list[int]:
        """Give the result of every step, adding `error` to that of step number `slip`."""
        start, *operations = prompt.rstrip(":").split(";")
        value, results = int(start), []
        for step, operation in enumerate(operations):
            number = int(operation[1:])
            value = value + number if operation[0] == "+" else value * number
            value = (value + (error if step == slip else 0)) % self.modulus
            results.append(value)
        return results


@dataclass(frozen=True)
class Copy(Task):
    """Repetition of `length` letters: "copy abcd:" -> "abcd"; a wrong solution has one wrong letter."""

    length: int = 6
    alphabet: str = "abcdefgh"

    def __post_init__(self) -> None:
        if self.length < 1 or len(set(self.alphabet)) < 2:
            raise ValueError(
                f"length={self.length}, alphabet={self.alphabet!r}: at least one letter, out of at least two"
            )

    def draw(self, rng: random.Random) -> tuple[str, str]:
        letters = "".join(rng.choices(self.alphabet, k=self.length))
        return f"copy {letters}:", letters

    def corrupt(self, rng: random.Random, prompt: str, solution: str) -> str:
        return _with_another(rng, solution, self.alphabet)

    def score(self, completion: str, solution: str) -> float:
        shown = completion.strip()
        return sum(a == b for a, b in zip(shown, solution, strict=False)) / max(len(shown), len(solution))


@dataclass(frozen=True)
class Reverse(Copy):
    """Reversal of `length` letters: "reverse abcd:" -> "dcba"."""

    def draw(self, rng: random.Random) -> tuple[str, str]:
        letters = "".join(rng.choices(self.alphabet, k=self.length))
        return f"reverse {letters}:", letters[::-1]


def _with_another(rng: random.Random, text: str, alphabet: str) -> str:
    """Replace one character of the text by another one of the alphabet."""
    place = rng.randrange(len(text))
    other = rng.choice([character for character in alphabet if character != text[place]])
    return text[:place] + other + text[place + 1 :]


def _distinct(pairs: Iterator[tuple[str, str]], size: int) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    misses = 0
    while len(seen) < size:
        prompt, solution = next(pairs)
        misses = misses + 1 if prompt in seen else 0
        if misses > _MAX_MISSES:
            raise ValueError(f"size={size}: the task has only about {len(seen)} held-out prompts; ask for fewer")
        seen[prompt] = solution
    return iter(seen.items())


def _format(kind: Kind, conversational: bool, prompt: str, completion: str) -> dict[str, Any]:
    user, assistant = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    if kind == "language_modeling":
        return {"messages": user + assistant} if conversational else {"text": prompt + completion}
    if kind == "prompt_only":
        return {"prompt": user if conversational else prompt}
    if conversational:
        return {"prompt": user, "completion": assistant}
    return {"prompt": prompt, "completion": completion}


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
