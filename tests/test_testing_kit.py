"""The test kit: what it makes is the same every time, right, and usable offline."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel

from trl_ext.testing import (
    Addition,
    Copy,
    ModularChain,
    Reverse,
    Task,
    exact_match,
    save_model,
    tiny_llama,
    tiny_moe,
    tiny_qwen2,
    tiny_tokenizer,
)
from trl_ext.testing.ranks import RanksError, end_of_ranks, on_ranks

TASKS = [Addition(), ModularChain(), Copy(), Reverse()]
MODELS = [tiny_llama, tiny_qwen2, tiny_moe]
Builder = Callable[..., PreTrainedModel]


def solve(prompt: str) -> str:
    """Solve any of the tasks' prompts from its text alone, by another route than the tasks themselves."""
    if match := re.fullmatch(r"(copy|reverse) (\w+):", prompt):
        return match[2] if match[1] == "copy" else "".join(reversed(match[2]))
    if match := re.fullmatch(r"(\d+)\+(\d+)=", prompt):
        return str(sum(map(int, match.groups())))
    expression, *operations = prompt.removesuffix(":").split(";")
    results = []
    for operation in operations:
        expression = f"({expression}){operation}"
        results.append(str(eval(expression) % 10))  # the whole expression at once, reduced only at the end
    return ",".join(results)


@pytest.mark.parametrize("task", TASKS, ids=repr)
class TestTasks:
    def test_solutions_are_right_and_wrong_ones_are_wrong(self, task: Task) -> None:
        rows = task.dataset(200, noise=0.5)
        for row in rows:
            assert row["answer"] == solve(row["prompt"])
            assert (row["completion"] != row["answer"]) == row["corrupted"]

    def test_noise_is_an_exact_share_and_moves_no_prompt(self, task: Task) -> None:
        clean, noisy = task.dataset(40, noise=0.0), task.dataset(40, noise=0.3)
        assert sum(noisy["corrupted"]) == 12
        assert list(noisy["prompt"]) == list(clean["prompt"])
        assert not any(clean["corrupted"])

    def test_same_seed_same_rows_other_seed_other_rows(self, task: Task) -> None:
        assert list(task.dataset(20, seed=3, noise=0.2)) == list(task.dataset(20, seed=3, noise=0.2))
        assert list(task.dataset(20, seed=3)) != list(task.dataset(20, seed=4))

    def test_held_out_prompts_are_distinct_and_never_trained_on(self, task: Task) -> None:
        held_out = list(task.dataset(100, split="held_out", seed=1)["prompt"])
        assert len(set(held_out)) == 100
        assert set(held_out).isdisjoint(task.dataset(5000, seed=1)["prompt"])
        assert set(held_out).isdisjoint(task.dataset(5000, seed=2)["prompt"])

    def test_rewards_tell_right_from_wrong(self, task: Task) -> None:
        rows = task.dataset(20, noise=0.5)
        expected = [0.0 if wrong else 1.0 for wrong in rows["corrupted"]]
        columns = {name: rows[name] for name in ("prompt", "answer", "corrupted")}
        assert task.reward(completions=rows["completion"], **columns) == expected
        chats = [[{"role": "assistant", "content": f" {text}\n"}] for text in rows["completion"]]
        assert task.reward(completions=chats, **columns) == expected

    def test_formats_agree(self, task: Task) -> None:
        pairs = task.dataset(5, noise=0.4)
        text = task.dataset(5, "language_modeling", noise=0.4)
        chat = task.dataset(5, "language_modeling", conversational=True, noise=0.4)
        chat_pairs = task.dataset(5, conversational=True, noise=0.4)
        prompts = task.dataset(5, "prompt_only", noise=0.4)
        for i, row in enumerate(pairs):
            user = [{"role": "user", "content": row["prompt"]}]
            assistant = [{"role": "assistant", "content": row["completion"]}]
            assert text[i]["text"] == row["prompt"] + row["completion"]
            assert chat[i]["messages"] == user + assistant
            assert (chat_pairs[i]["prompt"], chat_pairs[i]["completion"]) == (user, assistant)
            assert prompts[i]["prompt"] == row["prompt"]
            assert "completion" not in prompts.column_names


def test_partial_reward_counts_the_right_steps() -> None:
    score = ModularChain(steps=3).partial_reward
    assert score(["1,2,3", "1,9,3", "1", "1,2,3,4", "", "x"], answer=["1,2,3"] * 6) == pytest.approx(
        [1, 2 / 3, 1 / 3, 3 / 4, 0, 0]
    )


def test_a_wrong_chain_carries_its_slip_on() -> None:
    task = ModularChain(steps=4, modulus=7)
    for row in task.dataset(50, noise=1.0):
        shown = list(map(int, row["completion"].split(",")))
        values = [int(row["prompt"].split(";")[0]), *shown]
        operations = row["prompt"].removesuffix(":").split(";")[1:]
        slips = [eval(f"({values[i]}){op}") % 7 != shown[i] for i, op in enumerate(operations)]
        assert sum(slips) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Addition().dataset(2, "text"), "kind='text'"),
        (lambda: Addition().dataset(2, split="test"), "split='test'"),
        (lambda: Addition().dataset(2, noise=1.5), r"noise=1\.5"),
        (lambda: Addition(digits=1).dataset(90, split="held_out"), "held-out prompts"),
        (lambda: Addition(digits=0), "digits=0"),
        (lambda: ModularChain(modulus=1), "modulus=1"),
        (lambda: Copy(alphabet="aa"), "alphabet='aa'"),
        (lambda: tiny_llama(hidden=12), "hidden=12"),
        (lambda: exact_match(tiny_llama(), tiny_tokenizer(), []), "at least one row"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_chat_template_masks_the_assistant_only() -> None:
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1=\n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "naïve?"},
        {"role": "assistant", "content": "yes"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(kept) == "2<|im_end|>yes<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "yes<|im_end|>\n"


def test_tokenizer_is_one_token_a_byte_with_its_own_specials() -> None:
    tokenizer = tiny_tokenizer()
    text = " 12+34=\n\t日本 don't é"
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    assert tokenizer.bos_token is None
    assert len(tokenizer) == 259


@pytest.mark.parametrize("build", MODELS)
class TestModels:
    def test_saves_and_loads_as_a_local_id(self, build: Builder, tmp_path: Path) -> None:
        model, tokenizer = build(), tiny_tokenizer()
        path = save_model(model, tokenizer, tmp_path / "model")
        assert model.config._name_or_path == path
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert loaded.dtype == torch.float32
        assert loaded.config._name_or_path == path
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        for auto in (AutoTokenizer, AutoProcessor):
            again = auto.from_pretrained(path)
            for text in ("12+34= é\n<|im_end|>", "e\u0301"):  # the second is not in normal form C
                assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.chat_template == tokenizer.chat_template
            assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)

    def test_seed_fixes_the_weights_and_leaves_the_random_state(self, build: Builder) -> None:
        before = torch.get_rng_state()
        first, again, other = build(seed=1), build(seed=1), build(seed=2)
        assert torch.equal(torch.get_rng_state(), before)
        ids = torch.arange(10).unsqueeze(0)
        assert torch.equal(first(ids).logits, again(ids).logits)
        assert not torch.equal(first(ids).logits, other(ids).logits)

    def test_special_ids_are_the_tokenizers(self, build: Builder) -> None:
        config, tokenizer = build().config, tiny_tokenizer()
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert config.vocab_size == len(tokenizer)

    def test_tie_shares_the_embedding(self, build: Builder) -> None:
        for tie in (True, False):
            model = build(tie=tie)
            assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie


def test_moe_gives_router_logits() -> None:
    model = tiny_moe(layers=2, experts=3)
    output = model(torch.arange(5).unsqueeze(0), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(5, 3)] * 2
    assert output.aux_loss.isfinite()


class TestExactMatch:
    def test_counts_right_greedy_completions(self) -> None:
        """Oracle: one prompt at a time, without padding or batches, by repeated arg max."""
        model, tokenizer = tiny_llama(seed=5, initializer_range=0.5), tiny_tokenizer()
        rows = [dict(row) for row in Copy(length=3).dataset(9, split="held_out")]
        rows += [{"prompt": [{"role": "user", "content": "a longer prompt"}], "answer": ""}]
        for i, row in enumerate(rows):
            prompt = row["prompt"]
            if not isinstance(prompt, str):
                prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt)["input_ids"]
            start = len(ids)
            for _ in range(4):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            if i % 2 == 0:
                row["answer"] = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert exact_match(model, tokenizer, rows, max_new_tokens=4, batch_size=4) == 0.5

    def test_leaves_mode_padding_side_and_random_state(self) -> None:
        model, tokenizer = tiny_llama().train(), tiny_tokenizer()
        tokenizer.padding_side = "right"
        before = torch.get_rng_state()
        exact_match(model, tokenizer, Addition().dataset(3))
        assert model.training
        assert tokenizer.padding_side == "right"
        assert torch.equal(torch.get_rng_state(), before)


def test_importing_the_kit_loads_nothing_heavy() -> None:
    code = "import sys, trl_ext.testing; print(sorted({'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- several ranks ---------------------------------------------------------------------------------------------------


def rank_and_sum(start: int) -> tuple[int, int, str]:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ["MARK"]


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


class TestRanks:
    def test_results_come_in_the_order_of_the_ranks_and_the_environment_is_that_of_the_test(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MARK", "here")
        assert on_ranks(rank_and_sum, 3) == [(0, 7, "here"), (1, 7, "here")]

    def test_a_failure_on_one_rank_is_shown_and_ends_the_others(self) -> None:
        with pytest.raises(RanksError, match=r"fail_on_rank_one failed on 2 ranks(.|\n)*rank 1: KeyError: 'only here'"):
            on_ranks(fail_on_rank_one)

    def test_a_rank_that_dies_takes_the_others_along(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trl_ext.testing.ranks.GRACE", 0.1)
        assert [rank.code for rank in end_of_ranks(die_on_rank_one)] == [-signal.SIGKILL] * 2

    def test_what_another_process_cannot_import_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"cannot be sent to other ranks: .*; define classes and"):
            on_ranks(lambda: None)
