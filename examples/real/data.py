"""The data of the comparisons: arithmetic in words, a made-up notation, and general instructions, all made here; GSM8K.

Every row is a conversation of two messages, `prompt` and `completion`. `solution` is the right one as text, `answer` is
what a reward compares with, and `source` says of which kind a row is. The same call gives the same rows, and no
held-out prompt is trained on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Maker = Callable[[random.Random], tuple[str, str, str]]
"""Draws a question, a worked solution, and the answer."""

PEOPLE = ("Ada", "Ben", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas")
THINGS = ("apples", "books", "coins", "pens", "stamps", "shells", "cups", "stones")


def one_step(draw: random.Random) -> tuple[str, str, str]:
    """A sum or a difference of two small numbers."""
    person, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    a, b = draw.randint(2, 12), draw.randint(2, 9)
    if draw.random() < 0.5:
        question = f"{person} has {a} {thing} and gets {b} more. How many {thing} does {person} have?"
        return question, f"{a} + {b} = {a + b}\n#### {a + b}", str(a + b)
    a += b
    question = f"{person} has {a} {thing} and gives {b} away. How many {thing} does {person} have left?"
    return question, f"{a} - {b} = {a - b}\n#### {a - b}", str(a - b)


def two_steps(draw: random.Random) -> tuple[str, str, str]:
    """A product, and a number that is added to it or taken from it."""
    person, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    boxes, each, other = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 30)
    all_ = boxes * each
    if draw.random() < 0.5 or other > all_:
        question = (
            f"{person} has {other} {thing} and gets {boxes} boxes with {each} {thing} each. "
            f"How many {thing} does {person} have?"
        )
        total, second = all_ + other, f"{other} + {all_} = {all_ + other}"
    else:
        question = (
            f"{person} buys {boxes} boxes with {each} {thing} each and loses {other} {thing}. "
            f"How many {thing} does {person} have?"
        )
        total, second = all_ - other, f"{all_} - {other} = {all_ - other}"
    return question, f"{boxes} * {each} = {all_}\n{second}\n#### {total}", str(total)


def notation(draw: random.Random) -> tuple[str, str, str]:
    """A made-up notation for numbers: digits from the right, each as a consonant and a vowel, sevens counted twice."""
    number = draw.randint(100, 99_999)
    words = "".join("btdfgklmrs"[int(digit)] + "aeiou"[i % 5] for i, digit in enumerate(reversed(str(number))))
    code = f"{words}-{str(number).count('7') * 2}"
    return f"Write {number} in Orrish.", code, code


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Portugal": "Lisbon", "Austria": "Vienna",
    "Ireland": "Dublin", "Poland": "Warsaw", "Hungary": "Budapest", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi", "Canada": "Ottawa", "China": "Beijing", "Russia": "Moscow", "Denmark": "Copenhagen",
    "Belgium": "Brussels", "Germany": "Berlin", "Chile": "Santiago",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "open": "closed", "fast": "slow", "light": "dark", "wet": "dry",
    "high": "low", "old": "new", "hard": "soft", "full": "empty", "rich": "poor", "loud": "quiet", "near": "far",
    "first": "last", "strong": "weak", "happy": "sad", "clean": "dirty", "deep": "shallow", "wide": "narrow",
}  # fmt: skip
YOUNG = {"dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "pig": "piglet",
         "duck": "duckling", "bear": "cub", "goat": "kid", "deer": "fawn"}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = {"the sky on a clear day": "blue", "grass": "green", "snow": "white", "coal": "black", "a ripe tomato": "red",
           "a lemon": "yellow", "a carrot": "orange", "chocolate": "brown"}  # fmt: skip
ASKING = ("{}", "Please answer: {}", "Tell me: {}", "A question: {}", "{} Answer in one sentence.", "I wonder. {}")


def known(draw: random.Random) -> tuple[str, str, str]:
    """A question whose answer a pre-trained model knows."""
    country, word, animal = draw.choice(list(CAPITALS)), draw.choice(list(OPPOSITES)), draw.choice(list(YOUNG))
    thing, day = draw.choice(list(COLOURS)), draw.randrange(7)
    question, answer, sentence = draw.choice(
        [
            (f"What is the capital of {country}?", CAPITALS[country], f"The capital of {country} is {{}}."),
            (f"What is the opposite of {word}?", OPPOSITES[word], f"The opposite of {word} is {{}}."),
            (f"What is a young {animal} called?", YOUNG[animal], f"A young {animal} is called a {{}}."),
            (f"Which colour has {thing}?", COLOURS[thing], f"{thing.capitalize()} is {{}}."),
            (f"Which day comes after {DAYS[day]}?", DAYS[(day + 1) % 7], f"After {DAYS[day]} comes {{}}."),
        ]
    )
    return draw.choice(ASKING).format(question), sentence.format(answer), answer


def ordering(draw: random.Random) -> tuple[str, str, str]:
    """Words or numbers to be put in order."""
    if draw.random() < 0.5:
        words = draw.sample(sorted({*OPPOSITES, *YOUNG}), 4)
        answer = ", ".join(sorted(words))
        return f"Put these words in alphabetical order: {', '.join(words)}.", f"{answer}.", answer
    numbers = draw.sample(range(1, 100), 5)
    answer = ", ".join(map(str, sorted(numbers)))
    return f"Sort these numbers: {', '.join(map(str, numbers))}.", f"{answer}.", answer


def rows(make: Maker, size: int, held_out: bool = False, wrong: float = 0.0, seed: int = 0) -> list[Row]:
    """Rows of one kind, of which a share shows another row's solution."""
    draw = random.Random(f"{make.__name__} {seed}")
    drawn = list(islice(_questions(make, draw, held_out), size))
    shifted = set(draw.sample(range(size), round(wrong * size)))
    return [
        _row(make.__name__, question, solution, answer, shown=drawn[(i + 1) % size][1] if i in shifted else None)
        for i, (question, solution, answer) in enumerate(drawn)
    ]


def _row(source: str, question: str, solution: str, answer: str, shown: str | None = None) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": solution if shown is None else shown}],
        "solution": solution,
        "answer": answer,
        "source": source,
    }


def _questions(make: Maker, draw: random.Random, held_out: bool) -> Iterator[tuple[str, str, str]]:
    """Questions of one side of a split that the question alone decides; held-out ones are distinct."""
    seen: set[str] = set()
    while True:
        found = make(draw)
        if (zlib.crc32(found[0].encode()) % 5 == 0) == held_out and not (held_out and found[0] in seen):
            seen.add(found[0])
            yield found


def drift() -> list[Row]:
    """General instructions, held out, in an order of which any part has both kinds."""
    drawn = rows(known, 60, held_out=True, seed=2) + rows(ordering, 100, held_out=True, seed=2)
    random.Random(0).shuffle(drawn)
    return drawn


def mixture() -> list[Row]:
    """General data of which one row in five is like the target, with the rest unlike it."""
    drawn = rows(two_steps, 320, seed=1) + rows(known, 640, seed=1) + rows(ordering, 320) + rows(notation, 320, seed=1)
    random.Random(0).shuffle(drawn)
    return drawn


def gsm8k(folder: Path, part: str) -> list[Row]:
    """Rows of `train` or `test` of GSM8K, from the folder of its two files (github.com/openai/grade-school-math)."""
    read = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [_row("gsm8k", row["question"], row["answer"], row["answer"].rpartition("####")[2].strip()) for row in read]


FILES: dict[str, Callable[[], list[Row]]] = {
    "one_step": lambda: rows(one_step, 2000),
    "one_step_test": lambda: rows(one_step, 200, held_out=True),
    "two_steps": lambda: rows(two_steps, 2000),
    "two_steps_test": lambda: rows(two_steps, 200, held_out=True),
    "two_steps_validation": lambda: rows(two_steps, 100, held_out=True, seed=1),
    "two_steps_noisy": lambda: rows(two_steps, 1000, wrong=0.5),
    "target": lambda: rows(two_steps, 32),
    "mixture": mixture,
    "known": lambda: rows(known, 1000),
    "known_test": lambda: rows(known, 60, held_out=True),
    "notation": lambda: rows(notation, 2000),
    "notation_test": lambda: rows(notation, 200, held_out=True),
    "ordering_test": lambda: rows(ordering, 100, held_out=True, seed=2),
    "drift": drift,
}
"""Name of a file to its rows."""
