"""Columns of the data reach the hooks aligned with the labels, whatever TRL does to the tokens on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import Plugin, assert_close, assert_equal_bits
from safetensors.torch import load_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_ext import hookimpl
from trl_ext.cli.train import train as run_command
from trl_ext.errors import ConfigurationError
from trl_ext.records import AuxiliaryLoss, Column, StreamRequest, TokenRecord
from trl_ext.testing import save_model
from trl_ext.testing.runs import (
    COMMON,
    additions,
    logged,
    make_grpo,
    make_sft,
    moved,
    parameters,
    tiny_model,
    tokenizer,
)

EXAMPLES = Path(__file__).parents[1] / "examples"

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
ROUNDING = {"rtol": 0, "atol": 2e-6}  # sums of fp32 in another order, under SGD
WHOLE = {"max_length": None}  # nothing is cut, so that no row without a label is dropped either
STRATEGIES: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "pad_to_multiple_of": 8, **WHOLE},
    "bfd": {"packing": True, "max_length": 32},
    "bfd_split": {"packing": True, "max_length": 16, "packing_strategy": "bfd_split"},
    "wrapped": {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    "cut": {"max_length": 7},
    "shuffled": {"shuffle_dataset": True, "remove_unused_columns": False},
    "workers": {"dataloader_num_workers": 2},
}
STREAMING = ("padded", "bfd", "wrapped", "shuffled", "workers")


# -- alignment -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Reads(Plugin):
    """The negative log-likelihood; keeps the records of a run."""

    columns: tuple[Column, ...] = (Column("letter", dtype="int"), Column("tokens", per="token", dtype="int"))
    seen: list[TokenRecord] = field(default_factory=list)

    @hookimpl
    def per_token_loss(self, tokens):
        self.seen.append(tokens)
        return -tokens.log_probs


def letters(rows: int = 20) -> Dataset:
    """Row i is one letter, i + 2 times: its tokens, and the letter's id, which is another one in each row."""
    ids = [tokenizer()(chr(ord("A") + i))["input_ids"][0] for i in range(rows)]
    tokens = [[token] * (i + 2) for i, token in enumerate(ids)]
    return Dataset.from_dict({"input_ids": tokens, "letter": ids, "tokens": tokens})


def assert_aligned(tokens: TokenRecord) -> None:
    """Every label is the letter of its sample, and its own value; a sample has one letter."""
    mask = tokens.mask
    labels = tokens.inputs["labels"][:, 1:][mask]
    assert torch.equal(tokens.columns["tokens"][mask], labels)
    assert torch.equal(tokens.per_token("letter")[mask], labels)
    assert torch.equal(tokens.columns["letter"][tokens.sample_index][mask], labels)
    assert tokens.columns["letter"].shape == (tokens.num_samples,)
    of_samples = {(int(sample), int(label)) for sample, label in zip(tokens.sample_index[mask], labels, strict=True)}
    assert len(of_samples) == len({sample for sample, _ in of_samples}) > 1
    assert "trl_ext_columns" not in tokens.inputs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_stay_with_their_tokens(tmp_path, strategy):
    plugin, data = Reads(), letters()
    make_sft(tmp_path, plugins=[plugin], train=data, max_steps=2, **STRATEGIES[strategy]).train()
    assert len(plugin.seen) == 2
    for tokens in plugin.seen:
        assert_aligned(tokens)
        assert torch.equal(tokens.row_ids[tokens.mask], tokens.columns["tokens"][tokens.mask] - data["letter"][0])


@pytest.mark.parametrize("strategy", STREAMING)
def test_values_stay_with_the_tokens_of_a_stream_of_rows(tmp_path, strategy):
    plugin, rows = Reads(), letters().to_iterable_dataset(num_shards=2)
    make_sft(tmp_path, plugins=[plugin], train=rows, max_steps=2, **STRATEGIES[strategy]).train()
    assert len(plugin.seen) == 2
    for tokens in plugin.seen:
        assert_aligned(tokens)


def test_text_is_tokenized_first_and_evaluation_carries_columns_too(tmp_path):
    """The column of TRL's own, `completion_mask`, is where the labels are: of a prompt they are on the completion."""
    columns = (Column("length"), Column("completion_mask", per="token", dtype="int"))
    plugin = Reads(columns=columns)
    data = additions(12).map(lambda row: {"length": len(row["prompt"])})
    held_out = data.select(range(4))
    trainer = make_sft(tmp_path, plugins=[plugin], train=data, trainer={"eval_dataset": held_out}, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(held_out)
    trainer.evaluate(trainer.eval_dataset)
    assert len(plugin.seen) == 4
    for tokens in plugin.seen:
        texts = [tokenizer().decode(row) for row in tokens.inputs["input_ids"]]
        assert tokens.columns["length"].tolist() == [text.index("=") + 1 for text in texts]
        assert torch.equal(
            tokens.columns["completion_mask"][tokens.mask], torch.ones_like(tokens.mask[tokens.mask]).long()
        )
        assert tokens.columns["completion_mask"].sum() >= tokens.mask.sum()
    for tokens in plugin.seen[2:]:
        assert torch.equal(tokens.columns["length"], plugin.seen[1].columns["length"])
    with pytest.raises(
        ConfigurationError, match=r"'length', but the evaluation data has only prompt, completion, answer"
    ):
        trainer.evaluate(additions(4))


def test_a_packed_data_set_that_is_evaluated_again_keeps_its_columns(tmp_path):
    plugin = Reads()
    held_out = {"eval_dataset": letters(12)}
    trainer = make_sft(tmp_path, plugins=[plugin], train=letters(), trainer=held_out, **STRATEGIES["bfd"])
    trainer.evaluate(trainer.eval_dataset)
    assert plugin.seen
    for tokens in plugin.seen:
        assert_aligned(tokens)


def test_a_resumed_run_sees_the_same_columns(tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        plugin = Reads()
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **STRATEGIES["bfd"]}
        make_sft(tmp_path, plugins=[plugin], train=letters(), **settings).train(resume_from_checkpoint=resume)
        runs.append(plugin.seen)
    whole, resumed = runs
    assert len(resumed) == 2
    for mine, theirs in zip(resumed, whole[2:], strict=True):
        assert torch.equal(mine.row_ids, theirs.row_ids)
        assert all(torch.equal(mine.columns[name], theirs.columns[name]) for name in ("letter", "tokens"))


# -- hooks beside the objective --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Elsewhere(Plugin):
    """Reads a column per sample in the window and in the auxiliary loss."""

    columns: ClassVar = (Column("letter", dtype="int"),)
    windows: list[Any] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)

    @hookimpl
    def sample_weights(self, window):
        self.windows.append(window)
        assert torch.equal(window.forward(0).columns["letter"], window.columns[0]["letter"])
        return torch.cat([of_batch["letter"] for of_batch in window.columns]) % 2.0

    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.steps.append(micro_step)
        return {"zero": AuxiliaryLoss(0 * micro_step.log_probs.sum(), "batch")}


def test_windows_and_auxiliary_losses_have_the_columns_too(tmp_path):
    plugin = Elsewhere()
    trainer = make_sft(tmp_path, plugins=[plugin], train=letters(), max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    (window,) = plugin.windows
    for inputs, columns, step in zip(window.micro_batches, window.columns, plugin.steps, strict=True):
        assert torch.equal(columns["letter"], inputs["input_ids"][:, 0])
        assert torch.equal(step.columns["letter"], columns["letter"])
        assert "trl_ext_columns" not in inputs
        assert "trl_ext_columns" not in step.inputs


@dataclass(eq=False)
class Streamed(Reads):
    """Reads a stream as well."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_streams_carry_the_columns_that_the_objective_reads(tmp_path, kind):
    plugin, streams = Streamed(), {"general": letters()}
    train = letters() if kind == "sft" else additions(8, "prompt_only")
    make = {"sft": make_sft, "grpo": make_grpo}[kind]
    make(tmp_path / "run", plugins=[plugin], train=train, streams=streams, max_steps=2).train()
    streamed = [tokens for tokens in plugin.seen if tokens.stream]
    assert len(streamed) == 2
    for tokens in streamed:
        assert_aligned(tokens)
        total = tokens.columns["tokens"][tokens.mask].sum()
        assert tokens.column_totals["tokens"] == total
    with pytest.raises(ConfigurationError, match=r"'letter', but stream 'general' has only prompt, completion"):
        make(tmp_path / "run", plugins=[Streamed()], train=train, streams={"general": additions(8)})


@dataclass(eq=False)
class Difficulty(Plugin):
    columns: ClassVar = (Column("difficulty", default=0.5),)
    seen: list[Any] = field(default_factory=list)

    @hookimpl
    def advantages(self, rollouts, advantages):
        self.seen.append(rollouts)
        return advantages * rollouts.columns["difficulty"]


def test_rollouts_have_the_columns_of_their_prompts(tmp_path):
    plugin = Difficulty()
    train = additions(8, "prompt_only").map(
        lambda row: {"difficulty": None if "1" in row["prompt"] else len(row["answer"])}
    )
    make_grpo(tmp_path / "run", plugins=[plugin], train=train, max_steps=2).train()
    for rollouts in plugin.seen:
        expected = [0.5 if "1" in row["prompt"] else len(row["answer"]) for row in rollouts.inputs]
        assert rollouts.columns["difficulty"].tolist() == expected


# -- weights ---------------------------------------------------------------------------------------------------------


def train(folder: Any, spec: Any, data: Any, plain: bool = False, **config: Any) -> Any:
    trainer = make_sft(
        folder, names=[] if plain else [spec], train=data, plain=plain, **{"max_steps": 3, **SGD, **config}
    )
    start = parameters(trainer)
    trainer.train()
    assert moved(trainer, start) > 500 * ROUNDING["atol"]
    return trainer


@pytest.mark.parametrize("denominator", ["tokens", "weights"])
@pytest.mark.parametrize("strategy", ["padded", "padding-free", "bfd", "wrapped"])
def test_weights_of_one_change_no_bit(tmp_path, strategy, denominator):
    data = additions(24).map(lambda row: {"weight": 1.0})
    config = {**STRATEGIES[strategy], "gradient_accumulation_steps": 2}
    weighted = train(tmp_path, f"weighted:denominator={denominator}", data, **config)
    assert_equal_bits(parameters(weighted), parameters(train(tmp_path, "", data, plain=True, **config)))


def masked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokens, without labels where the weight is 0."""
    return {"labels": [-100] * len(row["input_ids"]) if row["weight"] == 0 else row["input_ids"]}


@pytest.mark.parametrize("strategy", ["padding-free", "bfd", "wrapped"])
def test_weights_of_zero_and_one_train_on_the_subset(tmp_path, strategy):
    """Plain TRL on the same rows, of which some have no labels; over all tokens, the loss is smaller by their share."""
    data = letters().map(lambda row, i: {"weight": i % 2}, with_indices=True)
    config = {**STRATEGIES[strategy], "gradient_accumulation_steps": 2}
    subset = train(tmp_path, "", data.map(masked), plain=True, **config)
    weighted = train(tmp_path, "weighted:denominator=weights", data, **config)
    assert_close(parameters(weighted), parameters(subset), **ROUNDING)
    assert logged(weighted)[0]["loss"] == pytest.approx(logged(subset)[0]["loss"], rel=1e-5)


def test_a_window_is_one_batch_also_over_the_weights(tmp_path):
    data = additions(24).map(lambda row, i: {"weight": i % 3 - 0.5}, with_indices=True)
    sizes = [(2, 4), (8, 1)]
    many, one = (
        train(
            tmp_path, "weighted:denominator=weights", data, per_device_train_batch_size=b, gradient_accumulation_steps=a
        )
        for b, a in sizes
    )
    assert_close(parameters(many), parameters(one), **ROUNDING)


# -- messages --------------------------------------------------------------------------------------------------------

TURNS = (("user", None), ("assistant", 0.0), ("user", None), ("assistant", 1.0), ("assistant", 2.0))


def conversations(form: str, rows: int = 8) -> Dataset:
    """Two turns of the user and three of the assistant; weights as keys of the messages, or lists beside them."""
    texts = [[f"{i}{'abcde'[j] * (i % 3 + 1)}" for j in range(len(TURNS))] for i in range(rows)]
    messages = [
        [
            {"role": role, "content": text} | ({"weight": weight} if form == "key" else {})
            for (role, weight), text in zip(TURNS, row, strict=True)
        ]
        for row in texts
    ]
    lists = {
        "list of all": [weight for _, weight in TURNS],
        "list of the assistant's": [weight for role, weight in TURNS if role == "assistant"],
    }
    beside = {"weight": [lists[form]] * rows} if form in lists else {}
    return Dataset.from_dict({"messages": messages, **beside})


def by_hand(messages: list[Mapping[str, Any]], weights: list[float | None]) -> dict[str, Any]:
    """Tokens, and a weight for each, from the template's text message by message."""
    ids, of_tokens = [], []
    for message, weight in zip(messages, weights, strict=True):
        if message["role"] == "user":
            parts = [(f"<|im_start|>user\n{message['content']}<|im_end|>\n", 0.0)]
        else:
            parts = [("<|im_start|>assistant\n", 0.0), (f"{message['content']}<|im_end|>", weight), ("\n", 0.0)]
        for text, of_text in parts:
            tokens = tokenizer()(text)["input_ids"]
            ids += tokens
            of_tokens += [of_text] * len(tokens)
    return {"input_ids": ids, "by hand": of_tokens}


def labelled(messages: list[Mapping[str, Any]], weights: list[float | None]) -> dict[str, Any]:
    """Tokens with labels where the weight is not 0."""
    made = by_hand(messages, weights)
    labels = [token if weight else -100 for token, weight in zip(made["input_ids"], made["by hand"], strict=True)]
    return {"input_ids": made["input_ids"], "labels": labels}


@dataclass(eq=False)
class ByMessage(Plugin):
    columns: ClassVar = (Column("weight", per="message"),)
    seen: list[TokenRecord] = field(default_factory=list)

    @hookimpl
    def per_token_loss(self, tokens):
        self.seen.append(tokens)
        return -tokens.log_probs * tokens.columns["weight"]


@pytest.mark.parametrize("form", ["key", "list of all", "list of the assistant's"])
def test_weights_of_messages_are_those_of_their_tokens(tmp_path, form):
    plugin, data = ByMessage(), conversations(form)
    make_sft(tmp_path, plugins=[plugin], train=data, assistant_only_loss=True, max_steps=2).train()
    made = [by_hand(row["messages"], [weight for _, weight in TURNS]) for row in data]
    expected = {tuple(row["input_ids"]): row["by hand"] for row in made}
    for tokens in plugin.seen:
        for ids, mask, weights in zip(tokens.inputs["input_ids"], tokens.mask, tokens.columns["weight"], strict=True):
            row = tuple(ids[ids != tokenizer().pad_token_id].tolist())
            own = torch.tensor(expected[row])[1:]
            assert torch.equal(torch.where(mask, weights, 0.0)[: len(own)], own)


@pytest.mark.parametrize("strategy", ["padding-free", "bfd"])
def test_weights_of_messages_equal_labels_made_by_hand(tmp_path, strategy):
    """Weights of 0, 1 and 2, where 2 is made 1: plain TRL on tokens whose labels were written out."""
    weights = [None, 0.0, None, 1.0, 1.0]
    data = conversations("list of all").map(lambda row: {"weight": weights})
    config = {**STRATEGIES[strategy]} | ({"max_length": 128} if strategy == "bfd" else {})
    rows = Dataset.from_list([labelled(row["messages"], weights) for row in data])
    hand = train(tmp_path, "", rows, plain=True, **config)
    spec = "weighted:per=message,denominator=weights"
    weighted = train(tmp_path, spec, data, assistant_only_loss=True, **config)
    assert_close(parameters(weighted), parameters(hand), **ROUNDING)


def test_the_example_trains_from_yaml_alone(process, tmp_path, monkeypatch):
    """What it trains is plain TRL on its tokens, with labels written out where a weight is 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    example = yaml.safe_load((EXAMPLES / "weighted.yaml").read_text())
    save_model(tiny_model(), tokenizer(), tmp_path / example["model_name_or_path"])
    sizes = {
        name: example[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    }
    changed = {**COMMON, **SGD, **sizes, "lr_scheduler_type": "constant", "max_steps": 2}
    flags = [text for key, value in changed.items() for text in (f"--{key}", str(value))]
    run_command("sft", ["--config", "examples/weighted.yaml", "--output_dir", "run", "--dtype", "float32", *flags])
    with open("examples/data/conversations.jsonl") as file:
        messages = [json.loads(line)["messages"] for line in file]
    rows = [labelled(turns, [message.get("weight") for message in turns]) for turns in messages]
    hand = make_sft(tmp_path / "hand", plain=True, train=Dataset.from_list(rows), **changed)
    hand.train()
    trained = load_file("run/model.safetensors")
    assert_close(trained, {name: parameters(hand)[name] for name in trained}, **ROUNDING)


# -- objectives on TRL's own column ----------------------------------------------------------------------------------


def test_wit_goes_from_the_completion_alone_to_the_whole_sequence(tmp_path):
    data = additions(24)
    ends = {"wit:prompt=0,response=1": True, "wit:prompt=1,response=1": False}
    for spec, completion_only in ends.items():
        plain = train(tmp_path, "", data, plain=True, completion_only_loss=completion_only, **STRATEGIES["bfd"])
        wit = train(tmp_path, spec, data, completion_only_loss=False, **STRATEGIES["bfd"])
        assert_close(parameters(wit), parameters(plain), **ROUNDING)


# -- what is refused, before the model loads -------------------------------------------------------------------------


@dataclass(eq=False)
class Wants(Plugin):
    column: Column
    other: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.column,)

    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs


@dataclass(eq=False)
class AlsoWants(Wants):
    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs


@dataclass(eq=False)
class WantsOfPrompts(Wants):
    @hookimpl
    def advantages(self, advantages):
        return advantages


class OwnCollator(DataCollatorForLanguageModeling):
    pass


def with_weight(values: list[Any]) -> Dataset:
    return additions(len(values)).add_column("weight", values)


MESSAGES = conversations("key")
REFUSED: dict[str, tuple[Column, dict[str, Any], str]] = {
    "no such column": (
        Column("wieght"),
        {"train": with_weight([1.0, 2.0])},
        r"plugin 'Wants' .* reads the column 'wieght', but the training data has only prompt, completion, answer, "
        r"corrupted, weight. Did you mean 'weight'\? Rename a column with dataset_columns, or change plugins=\[Wants",
    ),
    "not in the evaluation data": (
        Column("weight"),
        {"train": with_weight([1.0, 2.0]), "trainer": {"eval_dataset": {"mine": additions(2)}}},
        "'weight', but the evaluation data 'mine' has only",
    ),
    "text": (
        Column("weight"),
        {"train": with_weight(["1", "2"])},
        "row 0 of the training data has '1', which is not a finite",
    ),
    "missing in a row": (
        Column("weight"),
        {"train": with_weight([1.0, None])},
        "row 1 of the training data has no value",
    ),
    "not finite": (
        Column("weight"),
        {"train": with_weight([1.0, float("inf")])},
        "row 1 .* has inf, which is not a finite",
    ),
    "no whole number": (
        Column("weight", dtype="int"),
        {"train": with_weight([1.0, 0.5])},
        "row 1 .* not a whole number",
    ),
    "unknown text": (
        Column("answer", dtype="text", values=("7", "8")),
        {"train": additions(2)},
        "row 0 .* which is not one of 7, 8",
    ),
    "streaming": (
        Column("weight"),
        {"train": additions(4).to_iterable_dataset()},
        "'weight', but the training data has only prompt",
    ),
    "one value where lists are wanted": (
        Column("weight", per="message"),
        {"train": with_weight([1.0, 2.0]), "assistant_only_loss": True},
        "row 0 .* has 1.0, and not a list with a value for each message",
    ),
    "all tokens are trained on": (
        Column("weight", per="message"),
        {"train": MESSAGES},
        "is not trained on the assistant's turns alone.*set assistant_only_loss: true",
    ),
    "a collator that drops it": (
        Column("weight"),
        {"train": with_weight([1.0, 2.0]), "trainer": {"data_collator": OwnCollator(0)}},
        "a collator of your own .OwnCollator. would drop; leave out data_collator",
    ),
    "no preparation": (
        Column("weight"),
        {"train": with_weight([1.0, 2.0]), "dataset_kwargs": {"skip_prepare_dataset": True}},
        "remove skip_prepare_dataset from dataset_kwargs",
    ),
    "images": (
        Column("weight"),
        {"train": with_weight([1.0, 2.0]).add_column("image", ["a", "b"])},
        "has 'image', and columns are carried with text alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_in_the_data_is_refused_before_the_model_loads(tmp_path, case):
    column, run, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        make_sft(tmp_path, model="no/such-model", plugins=[Wants(column)], **run)


@pytest.mark.parametrize(
    ("column", "config", "message"),
    [
        (
            Column("tokens", per="token"),
            {},
            "with one value per token; the prompts of GRPO have columns per sample only",
        ),
        (Column("answer", dtype="text", values=("1",)), {"remove_unused_columns": True}, "drops; set it to False"),
        (Column("weight"), {}, "'weight', but the training data has only prompt, answer, corrupted"),
    ],
)
def test_grpo_refuses_what_its_prompts_do_not_carry(tmp_path, column, config, message):
    streams = {"general": additions(8)}
    with pytest.raises(ConfigurationError, match=message):
        make_grpo(tmp_path / "run", plugins=[WantsOfPrompts(column), Asks()], streams=streams, **config)


@dataclass(eq=False)
class Asks(Plugin):
    @hookimpl
    def streams(self):
        return [StreamRequest("general")]


@dataclass(eq=False)
class Notes(Plugin):
    """Reads columns beside the objective."""

    columns: tuple[Column, ...]

    @hookimpl
    def auxiliary_losses(self, micro_step):
        return {"zero": AuxiliaryLoss(0 * micro_step.log_probs.sum(), "batch")}


def test_two_plugins_share_a_column_and_are_refused_if_they_want_it_in_two_ways(tmp_path):
    data, reads = with_weight([1.0, 2.0, 3.0, 4.0]), Reads(columns=(Column("weight"),))
    trainer = make_sft(tmp_path, plugins=[reads, Notes((Column("weight"),))], train=data)
    assert [wanted.column.name for wanted in trainer.ext_columns.data] == ["weight"]
    with pytest.raises(
        ConfigurationError, match=r"plugins 'Reads' .* and 'Notes' .* ask for the column 'weight'.*differ"
    ):
        make_sft(tmp_path, plugins=[reads, Notes((Column("weight", dtype="int"),))], train=data)


def test_a_row_with_more_or_fewer_values_than_messages_is_refused(tmp_path):
    first, second = list(conversations("list of all"))[:2]
    data = Dataset.from_list([first, {**second, "weight": [1.0]}])
    message = "row 1 of the training data has 1 values for 5 messages, 3 of them the assistant's"
    with pytest.raises(ConfigurationError, match=message):
        make_sft(tmp_path, plugins=[ByMessage()], train=data, assistant_only_loss=True)


def test_turns_that_the_template_does_not_tell_apart_are_refused(tmp_path, monkeypatch):
    """The last two messages are the assistant's, and nothing is between their texts."""
    text = "{{- message['content'] + '<|im_end|>' -}}"
    own = "{%- generation -%}" + text + "{%- endgeneration -%}"
    alike = f"{{%- for message in messages -%}}{{%- if message['role'] == 'assistant' -%}}{own}{{%- else -%}}{text}"
    monkeypatch.setattr(tokenizer(), "chat_template", alike + "{%- endif -%}{%- endfor -%}")
    with pytest.raises(ConfigurationError, match=r"row 0 .* has 3 turns of the assistant, of which .* tells 2 apart"):
        make_sft(tmp_path, plugins=[ByMessage()], train=conversations("key"), assistant_only_loss=True)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("weight", r"declares columns = 'weight', which is not a tuple of Column; write columns = \(Column"),
        (("weight",), "which is not a tuple of Column"),
    ],
)
def test_a_declaration_of_another_form_is_refused(tmp_path, declared, message):
    with pytest.raises(ConfigurationError, match=message):
        make_sft(tmp_path, model="no/such-model", plugins=[Reads(columns=declared)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "labels"}, "is no column beside the tokens"),
        ({"name": "a", "per": "turn"}, "per='turn' is not one of sample, message, token"),
        ({"name": "a", "dtype": "str"}, "dtype='str' is not one of"),
        ({"name": "a", "dtype": "text"}, "a column of texts names them"),
        ({"name": "a", "default": "x"}, "has 'x', which is not a finite number"),
    ],
)
def test_a_column_refuses_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Column(**options)


def test_texts_are_their_places_and_truth_values_count():
    texts = Column("task", dtype="text", values=("true", "math", "3"), default="math")
    assert [texts.encode(value) for value in (True, "math", 3, None)] == [0, 1, 2, 1]
    assert Column("flag").encode(True) == 1.0
