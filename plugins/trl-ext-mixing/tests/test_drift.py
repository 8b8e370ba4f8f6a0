"""`trl-ext probe drift`: tokens against TRL's, scores against one example at a time, the interval by simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from datasets import Dataset
from tokenizers import models, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl_ext_mixing.drift import Score, compare, drift, encode_for_both, score
from trl_ext_mixing.drift_scores import encode

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama(hidden=16).eval(), tiny_tokenizer()


def merging(adds_eos: bool = False) -> Any:
    """The tiny tokenizer with one token for "=3", which reaches across a boundary; optionally one that appends EOS."""
    plain = tiny_tokenizer()
    vocabulary = {token: i for token, i in plain.get_vocab().items() if i < 256} | {"=3": 259}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary | {f"<{i}>": i for i in range(256, 259)}, merges=[("=", "3")])
    )
    backend.normalizer, backend.pre_tokenizer, backend.decoder = (
        getattr(plain.backend_tokenizer, part) for part in ("normalizer", "pre_tokenizer", "decoder")
    )
    backend.add_special_tokens([END])
    end = backend.token_to_id(END)
    if adds_eos:
        backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token="<256>", chat_template=plain.chat_template
    )


TEXT = [{"text": "some general text"}, {"text": f"it ends{END}"}]
PAIRS = [
    {"prompt": "1+2=", "completion": "3"},
    {"prompt": "1+1=", "completion": f"2{END}"},
    {"prompt": "a prompt that goes on beyond the limit on the length of a row", "completion": "4"},
]
CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
CHAT_PAIRS = [{"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}]


@pytest.mark.parametrize("rows", [TEXT, PAIRS, CHATS, CHAT_PAIRS], ids=["text", "pairs", "chats", "chat pairs"])
@pytest.mark.parametrize("make", [tiny_tokenizer, merging])
def test_tokens_and_labels_are_those_of_trl_s_sft(make: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), max_length=48, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        tiny_llama(vocab_size=300, hidden=16), args=args, train_dataset=Dataset.from_list(rows), processing_class=make()
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    encoded = [encode(make(), row, max_length=48) for row in rows]
    encoded = [(ids, first) for ids, first in encoded if first < len(ids)]  # TRL drops the others
    assert len(encoded) == len(trainer.train_dataset)
    for i, (ids, first) in enumerate(encoded):
        length = int(batch["attention_mask"][i].sum())
        assert ids == batch["input_ids"][i, :length].tolist()
        labelled = [j for j, label in enumerate(batch["labels"][i].tolist()) if label != -100 and j > 0]
        assert list(range(first, len(ids))) == labelled


def test_a_token_across_the_boundary_is_a_label() -> None:
    ids, first = encode(merging(), {"prompt": "1+2=", "completion": "3"})
    assert (len(ids), first) == (5, 3)  # 1 + 2 "=3" EOS
    assert ids[first] == 259


def test_eos_is_not_added_twice() -> None:
    for tokenizer in (tiny_tokenizer(), merging(), merging(adds_eos=True)):
        for text in ("abc", f"abc{END}"):
            ids, _ = encode(tokenizer, {"text": text})
            assert ids.count(tokenizer.eos_token_id) == 1
            ids, first = encode(tokenizer, {"prompt": "a", "completion": text})
            assert (first, len(ids)) == (1, 5)


def test_scores_match_one_example_at_a_time(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = [{"prompt": "1+2=", "completion": "3"}, {"text": "some general text"}, CHATS[0]]
    (scores,) = score(model, tokenizer, rows, batch_size=3)
    texts = [
        f"1+2=3{END}",
        f"some general text{END}",
        tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=False),
    ]
    for text, first, got in zip(texts, (4, 1, 1), scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(ids).logits[0, first - 1 : -1]
        nll = float(cross_entropy(logits, ids[0, first:], reduction="sum"))
        assert got.nll == pytest.approx(nll, rel=1e-5)
        assert got.hits == int((logits.argmax(-1) == ids[0, first:]).sum())
        assert got.tokens == ids.shape[1] - first


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_without_a_label_score_nothing_and_disturb_nothing(tiny: tuple[Any, Any], batch_size: int) -> None:
    rows: list[dict[str, Any]] = [
        {"text": ""}, {"text": "abc"}, {"text": None}, {"messages": []}, {"prompt": "12345678", "completion": "9"},
        {"prompt": "", "completion": "de"}, {"prompt": "x", "completion": ""},
    ]  # fmt: skip
    scores = [s for batch in score(*tiny, rows, batch_size=batch_size, max_length=8) for s in batch]
    assert [s.tokens for s in scores] == [0, 3, 0, 0, 0, 2, 0]
    alone = [next(score(*tiny, [row], max_length=8))[0] for row in rows]
    assert [s.nll for s in scores] == pytest.approx([s.nll for s in alone], rel=1e-5)
    other = [Score(s.nll + 0.1 * s.tokens, s.hits, s.tokens) for s in scores]
    assert compare(scores, other) == compare([scores[1], scores[5]], [other[1], other[5]])
    assert compare(scores, other)["nll"].examples == 2


@pytest.mark.parametrize("examples", [5, 80])
def test_the_change_is_a_ratio_and_its_interval_covers(examples: int) -> None:
    """With 5 examples the normal quantile in place of Student's would cover in 83 % of the cases."""
    generator = torch.Generator().manual_seed(0)
    covered, repeats = 0, 600
    for _ in range(repeats):
        tokens = torch.randint(20, 50, (examples,), generator=generator)
        level = torch.randn(examples, generator=generator) * 0.3 + 2.0
        moved = torch.randn(examples, generator=generator) * 0.2 + 0.1  # per token, alike within an example
        before = [Score(float(a * t), 0, int(t)) for a, t in zip(level, tokens, strict=True)]
        after = [Score(float((a + m) * t), 0, int(t)) for a, m, t in zip(level, moved, tokens, strict=True)]
        change = compare(before, after, confidence=0.9)["nll"]
        total = sum(s.nll for s in after) - sum(s.nll for s in before)
        assert change.change == pytest.approx(total / int(tokens.sum()))
        covered += change.low <= 0.1 <= change.high
    assert 0.85 < covered / repeats < 0.95  # four standard errors of 600 repeats at 90 %


def test_two_examples_take_the_quantile_of_one_degree_of_freedom() -> None:
    before, after = [Score(0.0, 0, 1)] * 2, [Score(1.0, 0, 1), Score(3.0, 0, 1)]
    change = compare(before, after, confidence=0.9)["nll"]
    assert change.change == 2
    assert change.high - 2 == pytest.approx(math.tan(0.45 * math.pi))  # s / sqrt(N) is 1, and t that of Cauchy


def test_the_same_model_has_not_drifted_and_what_does_not_compare_is_refused() -> None:
    scores = [Score(3.0, 1, 4), Score(5.0, 2, 6)]
    change = compare(scores, scores)["accuracy"]
    assert (change.before, change.change, change.low, change.high) == (0.3, 0, 0, 0)
    with pytest.raises(ValueError, match="one tokenizer"):
        compare(scores, [Score(3.0, 1, 4), Score(5.0, 2, 7)])
    with pytest.raises(ValueError, match="at least two"):
        compare(scores[:1], scores[:1])
    with pytest.raises(ValueError, match="no label"):
        compare([Score(0.0, 0, 0)], [Score(0.0, 0, 0)])


# -- the probe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("before", "after")):
        save_model(tiny_llama(hidden=16, seed=seed), tiny_tokenizer(), tmp_path / name)
    bare, other = tiny_tokenizer(), merging()
    bare.chat_template = None
    save_model(tiny_llama(hidden=16), bare, tmp_path / "bare")
    save_model(tiny_llama(vocab_size=300, hidden=16), other, tmp_path / "merging")
    return tmp_path


def run(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults: dict[str, Any] = {"max_length": 64, "batch_size": 2, "confidence": 0.95, "dtype": "auto", "device": "cpu"}
    drift(
        **{
            "base": "before",
            "model": "after",
            "dataset": "data.jsonl",
            "output": Path("out/d.json"),
            **defaults,
            **options,
        }
    )
    return json.loads((folder / "out/d.json").read_text())  # type: ignore[no-any-return]


def test_examples_without_a_label_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(folder, [{"text": "abc"}, {"text": ""}, {"text": "a longer text"}, {"text": None}])
    assert result["without_labels"] == 2
    assert result["nll"]["examples"] == 2
    assert "2 of 4 examples have no token to score" in capsys.readouterr().out
    assert result["nll"]["change"] != 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (TEXT, {"confidence": 95.0}, "--confidence"),
        (TEXT, {"dtype": "bf16"}, "--dtype"),
        ([{"content": "a"}], {}, r"neither text, messages, .* --columns content=text"),
        (PAIRS, {"base": "merging"}, r"make other tokens of example 0 \(and of 2 more\)"),
        (CHATS * 2, {"base": "bare"}, r"model 'bare' has no chat template, .* 'messages'"),
        (CHAT_PAIRS * 2, {"model": "bare"}, r"model 'bare' has no chat template, .* 'completion'"),
        ([{"text": ""}, {"text": "a"}], {}, "1 of 2 examples have a token to score"),
        (TEXT, {"base": "./nowhere"}, "there is no such folder"),
        ([{"prompt": "a", "completion": CHATS[0]["messages"]}], {}, "make both one kind"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_loads(
    folder: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_ext_mixing.drift.load_model", lambda *args: pytest.fail("a model loads"))
    with pytest.raises(ConfigurationError, match=message) as caught:
        run(folder, rows, **options)
    assert isinstance(caught.value.__cause__, ValueError | None)


def test_both_tokenizers_agree_where_no_text_tells_them_apart(folder: Path) -> None:
    encoded = encode_for_both("before", "after", TEXT, "text", 64)
    assert [len(ids) for ids, _ in encoded] == [18, 8]
