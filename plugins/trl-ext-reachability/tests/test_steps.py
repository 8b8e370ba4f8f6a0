"""Steps of completions: delimiters, turns and tokens, judged against hand-made splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl_ext_reachability.steps import Splitter, delimited_spans, turn_spans
from trl_ext_reachability.verifiers import StepChecker

from trl_ext.testing import ModularChain, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "\n", "b"], [(0, 2), (2, 3)]),
        (["a\n", "b"], [(0, 1), (1, 2)]),
        (["a", "\n\n", "\n", "b", ""], [(0, 3), (3, 5)]),  # blank lines end the step before; EOS ends the last
        (["a", "\nb", "c"], [(0, 2), (2, 3)]),  # a token over the end belongs to the step it starts in
        (["a", "\n", ""], [(0, 3)]),  # EOS alone is no step
        (["\n", "a", "\n", "b"], [(0, 3), (3, 4)]),  # nor is white space at the start
        ([""], [(0, 1)]),
        ([], []),
    ],
)
def test_spans_of_lines(pieces: list[str], expected: list[tuple[int, int]]) -> None:
    assert delimited_spans(pieces, "\n") == expected


def test_delimiter_over_several_tokens() -> None:
    assert delimited_spans(["x", "<", "/s>", "y"], "</s>") == [(0, 3), (3, 4)]


@given(st.lists(st.text("ab\n;", max_size=3)))
def test_spans_cover_every_token_once(pieces: list[str]) -> None:
    spans = delimited_spans(pieces, ";")
    assert [i for a, b in spans for i in range(a, b)] == list(range(len(pieces)))
    assert all(a < b for a, b in spans)


def test_turns_are_runs_of_the_mask() -> None:
    assert turn_spans([1, 1, 0, 0, 1, 0]) == [(0, 2), (4, 5)]
    assert turn_spans([0, 0]) == []


def test_tool_results_are_in_no_step_and_end_one() -> None:
    ids = encode("a;bTTTc;d")
    mask = [1, 1, 1, 0, 0, 0, 1, 1, 1]
    splitter = Splitter(TOKENIZER, "delimiter", ";")
    spans = splitter.spans(ids, mask)
    assert splitter.texts(ids, spans) == ["a;", "b", "c;", "d"]
    turns = Splitter(TOKENIZER, "turn", ";")
    assert turns.texts(ids, turns.spans(ids, mask)) == ["a;b", "c;d"]


def test_completion_masked_as_truncated_is_split_all_the_same() -> None:
    splitter = Splitter(TOKENIZER, "delimiter", ";")
    ids = [*encode("a;b"), TOKENIZER.pad_token_id, TOKENIZER.pad_token_id]
    assert splitter.spans(ids, [0] * 5) == [(0, 2), (2, 3)]
    assert splitter.trimmed(ids, [0] * 5) == encode("a;b")


def judge(completion: str, solution: str, *, split: str = "delimiter", eos: bool = True, **options: object) -> list:
    splitter = Splitter(TOKENIZER, split, ",")  # type: ignore[arg-type]
    ids = encode(completion) + [EOS] * eos
    return verdict_on(ids, splitter, solution, **options)


def verdict_on(ids: list[int], splitter: Splitter, solution: object, **options: object) -> list:
    spans = splitter.spans(ids, [1] * len(ids))
    checker = StepChecker(splitter, "solution", **{"eos_ids": frozenset([EOS]), **options})  # type: ignore[arg-type]
    step_ids = [ids[a:b] for a, b in spans]
    return checker(steps=[splitter.texts(ids, spans)], step_ids=[step_ids], solution=[solution])[0]


def test_no_step_is_right_after_a_wrong_one() -> None:
    assert judge("1,2,3", "1,2,3") == [1, 1, 1]
    assert judge("1,5,3", "1,2,3", wrong=-1.0) == [1, -1, -1]
    assert judge("1,2,3,4", "1,2,3") == [1, 1, 1, 0]


def test_stopping_early_is_wrong_and_running_out_of_tokens_is_not() -> None:
    assert judge("1,2", "1,2,3") == [1, 0]
    assert judge("1,2,", "1,2,3", eos=False) == [1, 1]


def test_pattern_takes_what_counts_of_a_step() -> None:
    assert judge("so it is 1, and then 22", "1,22", pattern=r"\d+") == [1, 1]
    assert judge("= 1 apples,x = 3 pears", "= 1,= 2", pattern=r"= (\d+)") == [1, 0]
    assert judge("nothing,2", "none,2", pattern=r"\d+") == [0, 0]


def test_single_tokens_are_judged_as_the_paper_does() -> None:
    """r_i = 1[y_1:i = y*_1:i], EOS included."""
    assert judge("12", "12", split="token") == [1, 1, 1]
    assert judge("1", "12", split="token") == [1, 0]
    assert judge("1", "12", split="token", eos=False) == [1]
    assert judge("123", "12", split="token") == [1, 1, 0, 0]


def test_tokens_are_compared_as_tokens() -> None:
    """Bytes of a character all decode to the same replacement character, and special tokens to nothing."""
    splitter = Splitter(TOKENIZER, "token", ",")
    euro, pound = encode("€"), encode("£")
    assert len(euro) == 3
    assert TOKENIZER.decode(euro[:1]) == TOKENIZER.decode(pound[:1])
    assert verdict_on(euro[::-1], splitter, "€") == [0, 0, 0]
    assert verdict_on([*pound, EOS], splitter, "€") == [0, 0, 0]
    assert verdict_on([*euro, EOS], splitter, "€") == [1, 1, 1, 1]
    other = next(token for token in TOKENIZER.all_special_ids if token != EOS)
    assert verdict_on([*encode("1"), other], splitter, "1") == [1, 0]
    assert verdict_on([*encode("1"), other], splitter, "1", eos_ids=frozenset([EOS, other])) == [1, 1]


def test_any_token_that_ends_a_completion_stops_it() -> None:
    splitter = Splitter(TOKENIZER, "delimiter", ",")
    other = next(token for token in TOKENIZER.all_special_ids if token != EOS)
    assert verdict_on([*encode("1,2"), other], splitter, "1,2,3", eos_ids=frozenset([EOS, other])) == [1, 0]


@pytest.mark.parametrize("solution", [None, 12, ["1,2"], {"role": "assistant", "content": "1,2"}])
def test_solutions_are_text(solution: object) -> None:
    with pytest.raises(ValueError, match=r"solution='solution': the column holds .*, no text"):
        verdict_on(encode("1,2"), Splitter(TOKENIZER, "delimiter", ","), solution)


def test_wrong_solutions_of_a_task_go_wrong_at_one_step() -> None:
    rows = ModularChain(steps=4).dataset(40, noise=1.0)
    for row in rows:
        verdict = judge(row["completion"], row["answer"])
        shown, right = row["completion"].split(","), row["answer"].split(",")
        slip = next(i for i in range(4) if shown[i] != right[i])
        assert verdict == [1] * slip + [0] * (4 - slip)
