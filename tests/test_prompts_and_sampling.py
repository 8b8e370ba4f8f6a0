"""GRPO's `prompt_order` and `sampling_weights`: what is drawn, with which weights, across epochs, resumes and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import Plugin, assert_equal_bits

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.testing.runs import additions, make_grpo, parameters

ROWS = 10
# A generation batch is 2 completions of 4 prompts, for 4 steps: an epoch of 10 prompts is 8 steps, and leaves 2 out.
EPOCHS = {"max_steps": 24, "steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 1}


def drawn(trainer: Any) -> list[str]:
    """Train, and give the prompts of each generation batch in the order in which they were drawn, without repeats."""
    seen: list[str] = []
    original = trainer._generate

    def noting(prompts: list[str]) -> Any:
        seen.extend(prompts[:: trainer.num_generations])
        return original(prompts)

    trainer._generate = noting
    trainer.train()
    return seen


def prompts() -> Any:
    return additions(ROWS, "prompt_only")


@dataclass(eq=False)
class Order(Plugin):
    """Reverses TRL's order in even epochs, draws row `epoch` alone in odd ones; its state counts what it was asked."""

    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    asked: list[int] = field(default_factory=list)

    @hookimpl
    def prompt_order(self, order, prompts, epoch):
        self.asked.append(epoch)
        return [epoch] * len(prompts) if epoch % 2 else order[::-1]


@dataclass(eq=False)
class Same(Plugin):
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)

    @hookimpl
    def prompt_order(self, order):
        return order


def test_an_order_left_alone_is_trls_own_in_every_epoch(tmp_path):
    plain = make_grpo(tmp_path / "plain", plain=True, train=prompts(), **EPOCHS)
    expected = drawn(plain)
    ours = make_grpo(tmp_path / "ours", plugins=[Same()], train=prompts(), **EPOCHS)
    assert len(set(zip(*[iter(expected)] * 8, strict=True))) == 3  # three epochs, each in another order
    assert drawn(ours) == expected
    assert_equal_bits(parameters(ours), parameters(plain))


def test_what_the_hook_returns_is_what_is_drawn(tmp_path):
    plugin = Order()
    trainer = make_grpo(tmp_path / "run", plugins=[plugin], train=prompts(), **EPOCHS)
    rows = trainer.train_dataset["prompt"]
    permutation = torch.randperm(ROWS, generator=torch.Generator().manual_seed(7)).tolist()
    expected = [rows[i] for i in permutation[::-1][:8]] + [rows[1]] * 8
    assert drawn(trainer)[:16] == expected
    assert plugin.asked == [0, 1, 2]


def test_a_second_training_asks_anew(tmp_path):
    plugin = Order()
    trainer = make_grpo(tmp_path / "run", plugins=[plugin], train=prompts(), **{**EPOCHS, "max_steps": 4})
    trainer.train()
    trainer.train()
    assert plugin.asked == [0, 0]


def test_orders_are_chained(tmp_path):
    first, second = Order(), type("Second", (Order,), {})()
    trainer = make_grpo(tmp_path / "run", plugins=[first, second], train=prompts(), **{**EPOCHS, "max_steps": 8})
    permutation = torch.randperm(ROWS, generator=torch.Generator().manual_seed(7)).tolist()
    assert drawn(trainer) == [trainer.train_dataset["prompt"][i] for i in permutation[:8]]


@dataclass(eq=False)
class Rotates(Plugin):
    """Turns the order by the steps so far, so that an order asked for again after a resume would be another one."""

    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    steps: int = field(default=0, init=False)

    @hookimpl
    def weights_updated(self, step):
        self.steps = step

    @hookimpl
    def prompt_order(self, order):
        return order[self.steps % ROWS :] + order[: self.steps % ROWS]

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("step", [3, 4, 6, 8, 9])
def test_a_resumed_epoch_keeps_its_order_and_the_next_are_chosen_as_without_a_break(tmp_path, step):
    def make(folder: Path) -> Any:
        return make_grpo(
            folder,
            plugins=[Rotates()],
            train=prompts(),
            saved=tmp_path / "model",
            save_strategy="steps",
            save_steps=step,
            **EPOCHS,
        )

    whole = make(tmp_path / "run")
    expected = drawn(whole)
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert len(set(expected)) > 8
    assert_equal_bits(parameters(resumed), parameters(whole))


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ((0, 1, 2), "TypeError: returned tuple; expected a list of int"),
        ([0.5] * ROWS, "TypeError: returned list; expected a list of int"),
        ([0, 1, 2], "ValueError: returned 3 rows; expected 10"),
        ([0] * 9 + [ROWS], "ValueError: returned row 10; rows are 0 to 9"),
        ([0] * 9 + [-1], "ValueError: returned row -1; rows are 0 to 9"),
    ],
)
def test_an_order_that_is_none_is_refused(tmp_path, order, problem):
    @dataclass(eq=False)
    class Wrong(Plugin):
        trainers: ClassVar[tuple[str, ...]] = ("grpo",)

        @hookimpl
        def prompt_order(self):
            return order

    trainer = make_grpo(tmp_path / "run", plugins=[Wrong()], train=prompts())
    with pytest.raises(PluginError, match=f"'Wrong'.*failed in hook 'prompt_order' at step 1: {problem}"):
        trainer.train()


def test_data_without_rows_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'Same' orders the training prompts.*streaming=False"):
        make_grpo(tmp_path / "run", plugins=[Same()], train=prompts().to_iterable_dataset())


def test_rows_drawn_on_one_rank_alone_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'Same' orders the training prompts.*dispatch_batches=True"):
        make_grpo(tmp_path / "run", plugins=[Same()], accelerator_config={"dispatch_batches": True})


# -- sampling --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SamplesWith(Plugin):
    """Samples with fixed weights, whatever the policy has become."""

    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    fixed: list[torch.Tensor] = field(default_factory=list)
    fail: bool = False

    @hookimpl
    @contextmanager
    def sampling_weights(self, weights) -> Iterator[None]:
        raw = [w.clone() for w in weights.local()]
        torch._foreach_copy_(weights.local(), self.fixed)
        try:
            yield
        finally:
            torch._foreach_copy_(weights.local(), raw)


def completions(trainer: Any) -> list[list[int]]:
    """Train, and give every completion of training."""
    seen: list[list[int]] = []
    original = trainer._generate_and_score_completions

    def noting(inputs: Any) -> Any:
        output = original(inputs)
        seen.extend(ids.tolist() for ids in output["completion_ids"])
        return output

    trainer._generate_and_score_completions = noting
    trainer.train()
    return seen


def test_completions_come_from_the_weights_of_the_context_and_the_policy_has_its_own_again(tmp_path):
    """With weights that name one token for sure, every completion repeats it."""
    trainer = make_grpo(tmp_path / "run", plugins=[plugin := SamplesWith()], max_steps=2, beta=0)
    start = parameters(trainer)
    # Equal embeddings of one large value and an output row that alone agrees with it: one token has all probability.
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    for name in names:
        fixed = torch.zeros_like(start[name])
        if "norm" in name:
            fixed += 1
        elif "embed_tokens" in name or "lm_head" in name:
            fixed += 10
            fixed[65] *= 2  # its logit is the largest by far, whatever the input
        plugin.fixed.append(fixed)
    seen = completions(trainer)
    assert seen
    assert all(set(row) == {65} for row in seen)
    assert_equal_bits(parameters(trainer), start)  # equal completions teach nothing


def test_a_hook_that_gives_nothing_leaves_sampling_alone(tmp_path):
    @dataclass(eq=False)
    class Nothing(Plugin):
        trainers: ClassVar[tuple[str, ...]] = ("grpo",)

        @hookimpl
        def sampling_weights(self):
            return None

    plain = make_grpo(tmp_path / "plain", plain=True)
    expected = completions(plain)
    ours = make_grpo(tmp_path / "ours", plugins=[Nothing()])
    assert completions(ours) == expected
    assert_equal_bits(parameters(ours), parameters(plain))


def test_a_failing_generation_gives_the_weights_back(tmp_path):
    trainer = make_grpo(tmp_path / "run", plugins=[plugin := SamplesWith()])
    plugin.fixed = [torch.zeros_like(p) for p in trainer.model.parameters()]
    start = parameters(trainer)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no completions")

    trainer.model.generate = broken
    with pytest.raises(RuntimeError, match="no completions"):
        trainer.train()
    assert_equal_bits(parameters(trainer), start)


def test_a_generation_back_end_is_given_the_weights_on_both_sides(tmp_path):
    trainer = make_grpo(tmp_path / "run", plugins=[plugin := SamplesWith()], max_steps=1)
    plugin.fixed = [torch.zeros_like(p) for p in trainer.model.parameters()]
    trainer._last_loaded_step = 0  # what TRL sets where it uses vLLM
    loaded: list[int] = []
    original = trainer._generate_single_turn

    def noting(*args: Any) -> Any:
        loaded.append(trainer._last_loaded_step)
        trainer._last_loaded_step = 0  # as TRL notes that vLLM has this step's weights
        return original(*args)

    trainer._generate_single_turn = noting
    trainer.train()
    assert loaded == [-1]
    assert trainer._last_loaded_step == -1


def test_an_evaluation_without_other_weights_leaves_a_generation_back_end_alone(tmp_path):
    trainer = make_grpo(tmp_path / "run", plugins=[Same()], max_steps=1)
    trainer.train()
    trainer._last_loaded_step = 1  # what TRL sets where it uses vLLM
    trainer.evaluate(prompts())
    assert trainer._last_loaded_step == 1
