"""Demonstrations of rolled-out prompts are tokenized as TRL's own SFT preparation does."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from mixing_runs import SETTINGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl_ext_mixing.demonstrations import Demonstrations

from trl_ext.records import Rewards, Rollouts
from trl_ext.testing import tiny_llama

THINKING = (
    "{% if tools %}[tools {{ tools | length }}]{% endif %}{% if quiet %}[quiet]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that merges across the border of prompt and completion: "?\n\n" and "the answer" become few tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["What is it?\n\nIt is four.", "assistant><think>\n", "42. 7"] * 50, trainer)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = THINKING
    return made


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ROWS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Two and two: ", "completion": "4"},
    "merged": {"prompt": "What is it?", "completion": "\n\nIt is four."},
    "ends already": {"prompt": "Two and two: ", "completion": "4<eos>"},
    "messages": {"prompt": user("What is it?"), "completion": assistant("It is four.")},
    "own options": {
        "prompt": user("What is it?"),
        "completion": assistant("4"),
        "chat_template_kwargs": {"quiet": True},
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    },
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("max_length", [None, 36])
def test_ids_and_labels_are_those_of_trl(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str, max_length: int | None
) -> None:
    row = ROWS[kind]
    # One more, so that there is a data set left where TRL drops the row.
    kept = row | ({"prompt": "a"} if isinstance(row["prompt"], str) else {"prompt": user("a")})
    own = {key: SETTINGS[key] for key in ("bf16", "use_cpu", "report_to", "disable_tqdm")}
    theirs = trl.SFTTrainer(
        tiny_llama(vocab_size=len(tokenizer), hidden=16, eos_token_id=0, pad_token_id=1),
        args=trl.SFTConfig(str(tmp_path), max_length=max_length, **own),
        train_dataset=Dataset.from_list([kept, row]),
        processing_class=tokenizer,
    ).train_dataset
    mine = [source(tokenizer, max_length).encode(r["prompt"], r)[0] for r in (kept, row)]
    assert [d.ids for d in mine if d] == list(theirs["input_ids"])
    assert [[-100] * d.start + d.ids[d.start :] for d in mine if d] == list(theirs["labels"])


def source(tokenizer: Any, max_length: int | None = None, **template: Any) -> Demonstrations:
    context: Any = SimpleNamespace(tokenizer=tokenizer, world_size=1)
    return Demonstrations(context, "completion", max_length, template)


def test_the_options_of_the_run_s_template_apply(tokenizer: PreTrainedTokenizerFast) -> None:
    mine, head = source(tokenizer, quiet=True).encode(ROWS["messages"]["prompt"], ROWS["messages"])
    assert mine is not None
    assert tokenizer.decode(mine.ids).startswith("[quiet]<user>What")
    assert tokenizer.decode(head) == "[quiet]<user>What is it?<eos><assistant><think>\n"


def batch(tokenizer: Any, prompt: Any, row: dict[str, Any], rolled_out: list[int]) -> tuple[Rollouts, Rewards]:
    one = torch.ones(2, len(rolled_out), dtype=torch.long)
    rollouts = Rollouts(
        inputs=[row] * 2,
        prompts=[prompt] * 2,
        completions=["", ""],
        prompt_ids=torch.tensor([rolled_out] * 2),
        prompt_mask=one,
        completion_ids=one,
        mask=one,
        num_generations=2,
        step=0,
        training=True,
    )
    return rollouts, Rewards(torch.zeros(2, 1), ("r",), torch.ones(1), slice(0, 2))


def test_a_prompt_that_was_rolled_out_otherwise_is_warned_of_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    row = ROWS["messages"]
    mine = source(tokenizer)
    _, head = mine.encode(row["prompt"], row)
    with caplog.at_level(logging.WARNING):
        assert set(mine.of_prompts(*batch(tokenizer, row["prompt"], row, head))) == {0}
        assert not caplog.records
        for _ in range(2):
            mine.of_prompts(*batch(tokenizer, row["prompt"], row, [5, *head]))
    assert len([r for r in caplog.records if "tokenized otherwise" in r.getMessage()]) == 1


def test_the_prompt_is_the_one_that_was_rolled_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """An environment may have added to it."""
    row = ROWS["messages"]
    longer = [*row["prompt"], *user("Seen: a door.")]
    found = source(tokenizer).of_prompts(*batch(tokenizer, longer, row, [5]))
    assert "Seen: a door." in tokenizer.decode(found[0].ids)


def test_demonstrations_without_a_label_left_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ROWS["messages"]
    mine = source(tokenizer, max_length=4)
    assert mine.of_prompts(*batch(tokenizer, row["prompt"], row, [5])) == {}
    assert mine.dropped == 1
    wanted = torch.tensor([False])
    assert source(tokenizer).of_prompts(*batch(tokenizer, "p", {"completion": None}, [5]), wanted) == {}
