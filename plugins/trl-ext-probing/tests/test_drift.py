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
from interruption import killed_after, results_of, same_results
from tokenizers import models, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl_ext_probing.drift.drift_run import Change, compare, run
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.encoding import Encoded, drawn_ids, encode
from trl_ext_probing.intervals import ratio_with_interval
from trl_ext_probing.scored_data import Scores
from trl_ext_probing.scoring import Scorer

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


@pytest.mark.parametrize("completion_only", [True, False])
def test_labels_follow_completion_only_loss(completion_only: bool, tmp_path: Path) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path), max_length=48, report_to=[], use_cpu=True, bf16=False,
        completion_only_loss=completion_only,
    )  # fmt: skip
    data = Dataset.from_list(PAIRS[:1])
    trainer = SFTTrainer(tiny_llama(hidden=16), args=args, train_dataset=data, processing_class=tiny_tokenizer())
    (labels,) = trainer.data_collator(list(trainer.train_dataset))["labels"].tolist()
    ids, first = encode(tiny_tokenizer(), PAIRS[0], completion_only=completion_only)
    assert labels[1:] == [-100] * (first - 1) + ids[first:]


def test_what_is_drawn_begins_behind_the_prompt_s_tokens() -> None:
    """Where tokens merge across the border, a label of SFT may lie in the prompt, and what is drawn does not."""
    tokenizer = merging()
    end = tokenizer.eos_token_id
    assert drawn_ids(tokenizer, "1+2=", "3", [end]) == [*tokenizer("3")["input_ids"], end]
    assert drawn_ids(tokenizer, "1+2=", f"3{END}4", [end])[-1] == end
    chat = CHAT_PAIRS[0]
    drawn = drawn_ids(tiny_tokenizer(), chat["prompt"], chat["completion"], [tiny_tokenizer().eos_token_id])
    assert tiny_tokenizer().decode(drawn) == f"ho{END}", "without the template's line end"


def test_scores_match_one_example_at_a_time(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = [{"prompt": "1+2=", "completion": "3"}, {"text": "some general text"}, CHATS[0], {"text": ""}]
    *scores, empty = Scorer(model).score([encode(tokenizer, row) for row in rows], batch_tokens=60)
    assert (len(empty.log_probs), empty.hits) == (0, 0)
    texts = [
        f"1+2=3{END}",
        f"some general text{END}",
        tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=False),
    ]
    for text, first, got in zip(texts, (4, 1, 1), scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(ids).logits[0, first - 1 : -1]
        expected = cross_entropy(logits, ids[0, first:], reduction="none")
        assert got.log_probs == pytest.approx((-expected).tolist(), rel=1e-4, abs=1e-5)
        assert got.hits == int((logits.argmax(-1) == ids[0, first:]).sum())


def test_scores_at_a_temperature_are_those_of_the_divided_logits() -> None:
    model, ids = tiny_llama(hidden=16).eval(), torch.arange(9)[None]
    (found,) = Scorer(model, temperature=0.5).score([Encoded(ids[0].tolist(), 3)])
    expected = (model(ids).logits[0, 2:-1] / 0.5).log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
    assert found.log_probs == pytest.approx(expected.tolist(), rel=1e-4)


def made_up(nll: Any, hits: Any, tokens: Any) -> Scores:
    scores = Scores("m", {})
    count = len(tokens)
    scores.add({"tokens": list(tokens), "sum_p": [0.0] * count, "sum_nll": list(nll), "hits": list(hits),
                "bins": [], "counts": []})  # fmt: skip
    return scores


@pytest.mark.parametrize("examples", [5, 80])
def test_the_change_is_a_ratio_and_its_interval_covers(examples: int) -> None:
    """With 5 examples the normal quantile in place of Student's would cover in 83 % of the cases."""
    generator = torch.Generator().manual_seed(0)
    covered, repeats = 0, 600
    for _ in range(repeats):
        tokens = torch.randint(20, 50, (examples,), generator=generator)
        moved = torch.randn(examples, generator=generator) * 0.2 + 0.1  # per token, alike within an example
        change = ratio_with_interval(moved * tokens, tokens, 0.9)
        assert change.value == pytest.approx(float((moved * tokens).sum() / tokens.sum()), rel=1e-5)
        covered += change.bounds[1] <= 0.1 <= change.bounds[2]
    assert 0.85 < covered / repeats < 0.95  # four standard errors of 600 repeats at 90 %


def test_two_examples_take_the_quantile_of_one_degree_of_freedom() -> None:
    change = ratio_with_interval([1.0, 3.0, 0.0], [1, 1, 0], 0.9)
    assert (change.value, change.count) == (2, 2)
    assert change.bounds[2] - 2 == pytest.approx(math.tan(0.45 * math.pi))  # s / sqrt(N) is 1, and t that of Cauchy


def test_the_same_model_has_not_drifted_and_what_does_not_compare_is_refused() -> None:
    scores = made_up([3.0, 5.0], [1, 2], [4, 6])
    change = compare(scores, scores)["accuracy"]
    assert (change.before, change.change.bounds) == (0.3, (0, 0, 0))
    with pytest.raises(ValueError, match="one tokenizer"):
        compare(scores, made_up([3.0, 5.0], [1, 2], [4, 7]))
    with pytest.raises(ValueError, match="at least two"):
        compare(made_up([3.0, 0.0], [1, 0], [4, 0]), made_up([3.0, 0.0], [1, 0], [4, 0]))


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


def measured(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Change]]:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults: dict[str, Any] = {
        "base": "before", "model": ["after"], "dataset": "data.jsonl", "output": Path("out"),
        "max_length": 64, "chunk": 2, "device": "cpu",
    }  # fmt: skip
    return run(DriftSettings(**{**defaults, **options}))


def test_examples_without_a_label_are_counted_and_an_interrupted_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "abc"}, {"text": ""}, {"text": "a longer text"}, {"text": None}]
    whole = measured(folder, rows)
    assert "2 of 4 examples have no token to score" in capsys.readouterr().out
    assert whole["after"]["nll"].change.count == 2
    assert whole["after"]["nll"].change.value != 0
    with killed_after(3):
        measured(folder, rows, output=Path("parts"))
    assert measured(folder, rows, output=Path("parts")) == whole
    same_results(folder / "out", folder / "parts")
    assert results_of(folder / "out")["without_labels"] == 2


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (TEXT, {"confidence": 95.0}, "--confidence"),
        (TEXT, {"dtype": "bf16"}, "--dtype"),
        (TEXT, {"model": ["before"]}, "--model 'before' is --base"),
        ([{"content": "a"}], {}, r"neither text, messages, .* --columns content=text"),
        (PAIRS, {"base": "merging"}, r"make other tokens of example 0 \(and of 2 more\)"),
        (CHATS * 2, {"base": "bare"}, r"model 'bare' has no chat template, .* 'messages'"),
        (CHAT_PAIRS * 2, {"model": ["bare"]}, r"model 'bare' has no chat template, .* 'completion'"),
        ([{"text": ""}, {"text": "a"}], {}, "1 of 2 examples have a token to score"),
        (TEXT, {"base": "./nowhere"}, "there is no such folder"),
        ([{"prompt": "a", "completion": CHATS[0]["messages"]}], {}, "make both one kind"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_loads(
    folder: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_ext_probing.scored_data.load_model", lambda *args: pytest.fail("a model loads"))
    with pytest.raises(ConfigurationError, match=message):
        measured(folder, rows, **options)
    assert not (folder / "out").exists(), "a failed attempt blocks nothing"
