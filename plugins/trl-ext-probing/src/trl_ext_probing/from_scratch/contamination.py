"""Which evaluation samples share n-grams with the training set.

After the convention of GPT-3 (arXiv 2005.14165, section 4): a sample is contaminated if it has an n-gram of 13 words
in common with the training data, or is found there as a whole where it is shorter than that. Other than there,
symbols are words too, since they carry the meaning of a formula.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from trl_ext_probing.from_scratch.row_texts import Row, completion_text, prompt_text, whole_text

N = 13
_WORD = re.compile(r"\w+|[^\w\s]")
Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Words and single symbols, regardless of case and white space."""
    return _WORD.findall(text.casefold())


def ngrams(sequence: Sequence[str], n: int) -> Iterator[Gram]:
    """Every run of n words; none where there are fewer."""
    return zip(*(sequence[i:] for i in range(n)), strict=False)


def sample_ngrams(row: Row, n: int) -> set[Gram]:
    """What of an evaluation sample the training set should not hold.

    The n-grams of its prompt, and those of its answer. A prompt of fewer than n words is one n-gram of its own length;
    a short answer is none, since "4" would be found anywhere.
    """
    prompt, answer = words(prompt_text(row)), words(completion_text(row) or "")
    found = {*ngrams(prompt, n), *ngrams(answer, n)}
    if 0 < len(prompt) < n:
        found.add(tuple(prompt))
    return found


def contaminated(rows: Sequence[Row], training: Iterable[Row], n: int = N) -> dict[int, int]:
    """The contaminated evaluation samples: their row, and the first row of the training set that shares an n-gram.

    Memory goes with the evaluation set: the training set is read once, row by row.

    Args:
        rows: the evaluation set.
        training: the training set, with `prompt` and `completion`, `messages` or `text`.
        n: words in an n-gram.
    """
    holders: dict[Gram, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for gram in sample_ngrams(row, n):
            holders[gram].append(i)
    lengths = sorted({len(gram) for gram in holders})
    found: dict[int, int] = {}
    for number, row in enumerate(training):
        text = words(whole_text(row))
        for length in lengths:
            for gram in ngrams(text, length):
                for i in holders.get(gram, ()):
                    found.setdefault(i, number)
    return dict(sorted(found.items()))
