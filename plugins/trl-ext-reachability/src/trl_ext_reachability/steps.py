"""Where the steps of a completion begin and end, in tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

Split = Literal["delimiter", "turn", "token"]
Span = tuple[int, int]
"""First token of a step, and the first one after it."""


def delimited_spans(pieces: Sequence[str], delimiter: str) -> list[Span]:
    """Spans of the steps that a delimiter ends; together they cover all tokens.

    A delimiter belongs to the step that it ends, with the white space and further delimiters after it. A token that
    reaches over the end of a step belongs to the step that it starts in. Nothing but white space is no step: it goes to
    its neighbour, as an EOS token after the last delimiter does.

    Args:
        pieces: the text of each token; special tokens are empty.
        delimiter: any text but the empty one.
    """
    if not pieces:
        return []
    text = "".join(pieces)
    starts = [0, *accumulate(map(len, pieces))][:-1]
    cuts = [0]
    one = re.escape(delimiter)
    for match in re.finditer(rf"{one}(?:\s|{one})*", text):
        if not text[starts[cuts[-1]] : match.start()].strip() or not text[match.end() :].strip():
            continue
        cut = bisect_right(starts, match.end() - 1)
        if cuts[-1] < cut < len(pieces):
            cuts.append(cut)
    return list(pairwise([*cuts, len(pieces)]))


def turn_spans(mask: Sequence[int]) -> list[Span]:
    """Spans of the runs of tokens that the policy wrote: the turns between tool results."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if bool(a) != bool(b)]
    return list(zip(edges[::2], edges[1::2], strict=True))


class Splitter:
    """Splits completions into steps.

    Args:
        tokenizer: the policy's.
        split: "delimiter" (inside each turn), "turn" (one step a turn of the model) or "token".
        delimiter: what ends a step.
    """

    def __init__(self, tokenizer: Any, split: Split, delimiter: str) -> None:
        self.tokenizer = tokenizer
        self.split = split
        self.delimiter = delimiter
        self._pieces: dict[int, str] = {}

    def spans(self, ids: Sequence[int], mask: Sequence[int]) -> list[Span]:
        """Spans of the steps of one completion, in order.

        Args:
            ids: its tokens, with padding on the right.
            mask: 1 for the tokens that the policy wrote and the loss sees. A completion that is masked as a whole, as
                a truncated one may be, is split all the same: it still counts in its group.
        """
        turns = turn_spans(mask) or turn_spans([1] * len(self.trimmed(ids, mask)))
        if self.split == "turn":
            return turns
        return [
            (start + a, start + b)
            for start, end in turns
            for a, b in self._cut([self._piece(token) for token in ids[start:end]])
        ]

    def trimmed(self, ids: Sequence[int], mask: Sequence[int]) -> list[int]:
        """The tokens of a completion without the padding on the right; see `spans` for the arguments."""
        if any(mask):
            return list(ids[: turn_spans(mask)[-1][1]])
        length = len(ids)
        while length and ids[length - 1] == self.tokenizer.pad_token_id:
            length -= 1
        return list(ids[:length])

    def texts(self, ids: Sequence[int], spans: Sequence[Span]) -> list[str]:
        """The text of each step, special tokens left out."""
        return [self.tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in spans]

    def reference(self, solution: str) -> list[str]:
        """The steps of a solution, split as a completion that is this solution would be."""
        ids = self.solution_ids(solution)
        return self.texts(ids, self.spans(ids, [1] * len(ids)))

    def solution_ids(self, solution: str) -> list[int]:
        """The tokens of a solution, without EOS."""
        return list(self.tokenizer(solution, add_special_tokens=False)["input_ids"])

    def _cut(self, pieces: Sequence[str]) -> list[Span]:
        if self.split == "token":
            return [(i, i + 1) for i in range(len(pieces))]
        return delimited_spans(pieces, self.delimiter)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.decode([token], skip_special_tokens=True)
        return self._pieces[token]
