"""Streams: their order, what happens at their end, and that their passes leave the trainer as it was."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import FIRST, WITH_STREAMS, Nll, Plugin, assert_equal_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trl_ext import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, hookimpl
from trl_ext.engine.streams import Stream
from trl_ext.errors import ConfigurationError, StreamExhaustedError
from trl_ext.gradients import trainable_parameters
from trl_ext.hookspecs import SAMPLING
from trl_ext.records import StreamGradient, StreamRequest
from trl_ext.testing import tiny_moe
from trl_ext.testing.runs import (
    COMMON,
    MAKE,
    additions,
    logged,
    lora,
    make_grpo,
    make_sft,
    moved,
    parameters,
    rows,
    tiny_model,
    tokenizer,
    varied_reward,
)

# -- order -----------------------------------------------------------------------------------------------------------


def stream(size: int, batch: int = 2, seed: int = 3, rank: int = 0, world: int = 1, **request: Any) -> Stream:
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(size)]})
    return Stream(StreamRequest("s", batch_size=batch, **request), rows, lambda rows: rows, seed, rank, world)


def draw(s: Stream, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in s.next_indices()]


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 13),
    batch=st.integers(1, 5),
    seed=st.integers(0, 50),
    drawn=st.integers(0, 8),
    world=st.integers(1, 3),
)
def test_order_is_a_function_of_seed_and_position(size, batch, seed, drawn, world):
    """Continuing from a saved position gives what an uninterrupted stream gives, wherever it was cut."""
    whole = [draw(stream(size, batch, seed, rank, world), drawn + 4) for rank in range(world)]
    for rank in range(world):
        first = stream(size, batch, seed, rank, world)
        head = draw(first, drawn)
        second = stream(size, batch, seed, rank, world)
        second.load_state_dict(first.state_dict())
        assert head + draw(second, 4) == whole[rank]
    # The ranks' parts of a step, one after the other, are the order that one rank with the whole batch sees.
    alone = draw(stream(size, batch * world, seed), drawn + 4)
    together = [
        i for step in range(drawn + 4) for rank in range(world) for i in whole[rank][step * batch : (step + 1) * batch]
    ]
    assert together == alone


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 20), batch=st.integers(1, 25), seed=st.integers(0, 50))
def test_each_pass_has_every_sample_once(size, batch, seed):
    order = draw(stream(size, batch, seed), 3 * size)
    passes = [order[i : i + size] for i in range(0, 3 * size - size + 1, size)]
    assert all(sorted(one) == list(range(size)) for one in passes[:3])


def test_passes_and_seeds_differ_and_shuffle_can_be_off():
    order = draw(stream(20, 20), 2)
    assert order[:20] != order[20:]
    assert order[:20] != list(range(20))
    assert draw(stream(20, 20, seed=4), 1) != order[:20]
    assert draw(stream(5, 2, shuffle=False), 5) == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("change", [{"size": 9}, {"seed": 4}])
def test_a_position_in_other_data_is_refused(change):
    saved = stream(10).state_dict()
    other = stream(**{"size": 10, **change})
    with pytest.raises(ConfigurationError, match=r"stream 's': the checkpoint was written with .*reset_plugin_state"):
        other.load_state_dict(saved)


# -- the end of a stream ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Reads(Plugin):
    """Takes one stream, and keeps what it gets; with a factor, adds that share of its gradient."""

    request: StreamRequest = field(default_factory=lambda: StreamRequest("general", batch_size=2))
    factor: float = 0.0
    seen: list[StreamGradient] = field(default_factory=list)
    flats: list[Tensor] = field(default_factory=list)

    @hookimpl
    def streams(self):
        return [self.request]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        one = streams[self.request.role]
        self.seen.append(one)
        self.flats.append(torch.cat([t.flatten().double() for t in one.gradients.tensors if t is not None]))
        if self.factor:
            gradients.axpy_(self.factor, one.gradients)


def reads(factor: float = 0.0, **request: Any) -> Reads:
    return Reads(StreamRequest(**{"role": "general", "batch_size": 2, **request}), factor)


@pytest.mark.parametrize("kind", FIRST)
def test_a_stream_that_stops_ends_the_training_after_its_last_full_batch(tmp_path, kind):
    plugin = reads(on_exhausted="stop")
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin], streams={"general": additions(7)}, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(plugin.seen) == 3


def test_a_stream_that_may_not_end_raises(tmp_path):
    plugin = reads(on_exhausted="error")
    trainer = make_sft(tmp_path, plugins=[plugin], streams={"general": additions(7)}, max_steps=8)
    with pytest.raises(StreamExhaustedError, match="stream 'general' is exhausted after 6 of 7 samples"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_stream_that_may_not_end_and_lasts_does_not_raise(tmp_path):
    plugin = reads(on_exhausted="error")
    trainer = make_sft(tmp_path, plugins=[plugin], streams={"general": additions(8)}, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_stream_that_cycles_may_be_smaller_than_its_batch(tmp_path):
    plugin = reads(batch_size=4)
    trainer = make_sft(tmp_path, plugins=[plugin], streams={"general": additions(3)}, max_steps=5, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.ext_streams["general"].position == 20
    # 4 draws from 3 samples: the first batch has one of them twice, which is no whole pass.
    single = reads(batch_size=3)
    make_sft(tmp_path, plugins=[single], streams={"general": additions(3)}, max_steps=1, learning_rate=0.0).train()
    assert plugin.seen[0].nll != pytest.approx(single.seen[0].nll, rel=1e-7)


@pytest.mark.parametrize("policy", ["stop", "error"])
def test_a_stream_smaller_than_its_batch_is_refused_where_it_does_not_cycle(tmp_path, policy):
    plugin = reads(batch_size=4, on_exhausted=policy)
    with pytest.raises(
        ConfigurationError, match=r"stream 'general' has 3 usable samples, fewer than one batch of 4 x 1"
    ):
        make_sft(tmp_path, plugins=[plugin], streams={"general": additions(3)})


def test_a_streaming_data_set_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="stream 'general' is a IterableDataset; streams need"):
        make_sft(tmp_path, plugins=[reads()], streams={"general": additions(8).to_iterable_dataset()})


# -- what a stream's gradient is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_the_gradient_is_autograds_of_the_mean_nll(tmp_path, kind, accumulation, when):
    """At every step; also where the trainer's head divides logits by the temperature: the stream's does not."""
    plugin = reads(batch_size=3, when=when)
    config = {"max_steps": 2, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    if kind in SAMPLING:
        config["temperature"] = 0.5
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin], streams={"general": additions(9, seed=4)}, **config)
    trainer.train()
    source = trainer.ext_streams["general"]
    fresh = Stream(source.request, source.dataset, source.collate, source.seed, 0, 1)
    for step in range(2):
        batch = fresh.next_batch()
        model = tiny_model().double()
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])
        torch.testing.assert_close(plugin.flats[step], expected, rtol=0, atol=2e-6)  # fp32 against fp64
        nll = pytest.approx(loss.item(), rel=1e-6)
        assert plugin.seen[step].nll == nll
        assert plugin.seen[step].loss == nll
        assert plugin.seen[step].tokens == int((labels != -100).sum())
        assert logged(trainer)[step]["general_stream/nll"] == nll


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_in_mixed_precision_streams_compute_in_bf16(tmp_path, kind, peft):
    """GRPO exchanges the head beneath accelerate's autocast, which has to apply all the same."""
    plugin = reads(batch_size=3)
    options = {"streams": {"general": additions(9, seed=4)}, "max_steps": 1, "bf16": True}
    options |= {"trainer": {"peft_config": lora()}} if peft else {}
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin], **options)
    base = trainer.ext_base_model()
    dtypes = []
    layer = base.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: dtypes.append((args[0].shape[0], output.dtype)))
    trainer.train()
    assert {dtype for rows, dtype in dtypes if rows == 3} == {torch.bfloat16}
    assert plugin.flats[0].isfinite().all()


@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_an_objective_applies_to_streams_too(tmp_path, kind):
    plugin = reads()
    options = {"streams": {"general": additions(9)}, "max_steps": 1, "names": ["power:alpha=1"]}
    MAKE[kind](tmp_path / "run", plugins=[plugin], **options).train()
    assert 0 < plugin.seen[0].loss <= 1 < plugin.seen[0].nll


def test_a_stream_of_the_training_data_has_its_gradient(tmp_path):
    """One full batch: the stream's gradient is the main one, and the mean of the two is no change."""

    @dataclass(eq=False)
    class Mean(Plugin):
        @hookimpl
        def streams(self):
            return [StreamRequest("same", batch_size=8)]

        @hookimpl
        def gradients_ready(self, gradients, streams):
            assert float(gradients.cosine(streams["same"].gradients)) == pytest.approx(1, abs=1e-5)
            gradients.mul_(0.5).axpy_(0.5, streams["same"].gradients)

    samples = additions(8)
    config = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.5, "train": samples}
    plain = make_sft(tmp_path / "a", plain=True, **config)
    mixed = make_sft(tmp_path / "b", plugins=[Mean()], streams={"same": samples}, **config)
    start = parameters(plain)
    plain.train()
    mixed.train()
    assert moved(plain, start) > 1e-3
    for name, p in parameters(mixed).items():
        torch.testing.assert_close(p, parameters(plain)[name], rtol=0, atol=2e-6)  # another order of samples


@pytest.mark.parametrize("format", ["text", "messages", "prompt and completion", "conversational prompt"])
@pytest.mark.parametrize("kind", FIRST)
def test_streams_take_every_format_that_sft_takes(tmp_path, kind, format):
    data = {
        "text": additions(6, "language_modeling"),
        "messages": additions(6, "language_modeling", conversational=True),
        "prompt and completion": additions(6),
        "conversational prompt": additions(6, conversational=True),
    }[format]
    plugin = reads(batch_size=6)
    MAKE[kind](tmp_path / "run", plugins=[plugin], streams={"general": data}, max_steps=1, learning_rate=0.0).train()
    # Plain SFT on the same data at the same weights.
    plain = make_sft(tmp_path / "plain", plain=True, train=data, max_steps=1, per_device_train_batch_size=6)
    plain.train()
    assert plugin.seen[0].nll == pytest.approx(logged(plain)[0]["loss"], rel=1e-6)


# -- leaving no trace ------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "lora": {"peft": True},
    "moe": {"moe": True, "gradient_accumulation_steps": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize(
    ("kind", "case", "when"),
    [(kind, case, "after") for kind in WITH_STREAMS for case in CASES if kind not in SAMPLING or case != "moe"]
    + [(kind, "accumulation", "before") for kind in WITH_STREAMS],
)  # with router logits in the model's config generation fails, in plain TRL too
def test_a_stream_whose_gradient_is_ignored_changes_nothing(tmp_path, kind, case, when):
    """Parameters bit for bit, with dropout, and every logged number: counters, metrics and random state stay."""
    finals = []
    for name in ("plain", "ours"):
        config = {"max_steps": 4, **CASES[case]}
        options = {"moe": tiny_moe, "llama": tiny_model}["moe" if config.pop("moe", False) else "llama"]
        extra = {"output_router_logits": True} if options is tiny_moe else {}
        model = options(hidden=16, layers=1, attention_dropout=0.2, **extra)
        trainer = {"peft_config": lora()} if config.pop("peft", False) else {}
        if "eval_steps" in config:
            trainer["eval_dataset"] = rows(kind, 4, seed=5)
        ours = {"plugins": [reads(when=when)], "streams": {"general": additions(9)}} if name == "ours" else {}
        one = MAKE[kind](tmp_path / name / "run", plain=name == "plain", model=model, trainer=trainer, **ours, **config)
        start = parameters(one)
        one.train()
        assert moved(one, start) > 1e-3
        finals.append((parameters(one), torch.get_rng_state(), one))
    assert_equal_bits(finals[1][0], finals[0][0])
    assert torch.equal(finals[1][1], finals[0][1])
    # A before-stream runs under dropout of its own, an evaluated log has the NLL of its own.
    assert logged(finals[1][2], "nll", "eval_nll", "general_stream/nll") == logged(finals[0][2])
    assert finals[1][2]._total_train_tokens == finals[0][2]._total_train_tokens


def test_the_same_rows_meet_other_noise_at_each_step(tmp_path):
    """Rows that a plugin selects have no position to take the noise of dropout from."""

    @dataclass(eq=False)
    class Selects(Plugin):
        seen: list[float] = field(default_factory=list)

        @hookimpl
        def streams(self):
            return [StreamRequest("general", batch_size=2, select=lambda: [0, 1])]

        @hookimpl
        def gradients_ready(self, streams):
            self.seen.append(streams["general"].nll)

    def seen(name: str) -> list[float]:
        plugin = Selects()
        model = tiny_model(attention_dropout=0.5)
        config = {"model": model, "streams": {"general": additions(4)}, "learning_rate": 0.0}
        make_sft(tmp_path / name, plugins=[plugin], **config).train()
        return plugin.seen

    first = seen("a")
    assert len(set(first)) == 4
    assert seen("b") == first


def test_the_main_gradient_comes_back_after_the_streams(tmp_path):
    """`gradients_ready` sees the window's own gradient beside the stream's: bitwise that of a run without streams."""

    @dataclass(eq=False)
    class Keep(Reads):
        kept: list[Tensor] = field(default_factory=list)

        @hookimpl
        def gradients_ready(self, gradients, streams):
            self.kept.append(torch.cat([t.flatten().clone() for t in gradients.tensors]))

    @dataclass(eq=False)
    class KeepAlone(Plugin):
        kept: list[Tensor] = field(default_factory=list)

        @hookimpl
        def gradients_ready(self, gradients):
            self.kept.append(torch.cat([t.flatten().clone() for t in gradients.tensors]))

    both, alone = Keep(), KeepAlone()
    make_sft(tmp_path, plugins=[both], streams={"general": additions(6)}, gradient_accumulation_steps=2).train()
    make_sft(tmp_path, plugins=[alone], gradient_accumulation_steps=2).train()
    assert all(torch.equal(a, b) for a, b in zip(both.kept, alone.kept, strict=True))


@pytest.mark.parametrize("kind", WITH_STREAMS)
def test_streams_continue_at_their_position_after_a_resume(tmp_path, kind):
    def build(plugin: Plugin) -> Any:
        config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        streams = {"general": additions(9), "late": additions(7, seed=2)}
        return MAKE[kind](tmp_path / "run", plugins=[plugin, Nll()], streams=streams, **config)

    @dataclass(eq=False)
    class Two(Plugin):
        nll: list[tuple[float, float]] = field(default_factory=list)

        @hookimpl
        def streams(self):
            return [StreamRequest("general", batch_size=2, when="before"), StreamRequest("late", batch_size=4, seed=5)]

        @hookimpl
        def gradients_ready(self, gradients, streams):
            self.nll.append((streams["general"].nll, streams["late"].nll))
            gradients.axpy_(0.3, streams["general"].gradients).axpy_(0.3, streams["late"].gradients)

    whole, rest = Two(), Two()
    uninterrupted = build(whole)
    uninterrupted.train()
    resumed = build(rest)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert rest.nll == whole.nll[3:]
    assert_equal_bits(parameters(resumed), parameters(uninterrupted))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", FIRST)
def test_a_gradient_that_is_not_kept_is_gone_in_the_windows_own_passes(tmp_path, kind, keep):
    """Seen by weak references to its tensors, in the window's own backward pass and in `gradients_ready`."""

    @dataclass(eq=False)
    class Early(Plugin):
        there: list[bool] = field(default_factory=list)
        roles: list[set[str]] = field(default_factory=list)

        @hookimpl
        def setup(self, context):
            self.tensors: list[Any] = []
            for parameter in context.weights.parameters:
                parameter.register_post_accumulate_grad_hook(self.look)

        def look(self, parameter):
            if self.tensors:  # not in the stream's own backward pass
                self.there.append(any(tensor() is not None for tensor in self.tensors))

        @hookimpl
        def streams(self):
            return [StreamRequest("general", batch_size=2, when="before", keep=keep)]

        @hookimpl
        def gradients_ready(self, gradients, streams):
            self.roles.append(set(streams))
            self.tensors.clear()

    plugin = Early()
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin], streams={"general": additions(9)}, max_steps=2)
    original = trainer.ext_step._stream_gradients

    def noted(model: Any, when: str) -> Any:
        found = original(model, when)
        for one in found.values():
            plugin.tensors.extend(weakref.ref(tensor) for tensor in one.gradients._tensors)
        return found

    trainer.ext_step._stream_gradients = noted
    trainer.train()
    assert set(plugin.there) == {keep}
    assert plugin.roles == [{"general"} if keep else set()] * 2


def test_a_gradient_taken_after_the_backward_is_kept():
    with pytest.raises(ValueError, match="keep=False: a gradient taken after"):
        StreamRequest("general", keep=False)


def test_streams_named_in_the_config_are_loaded(tmp_path):
    data = additions(9)
    data.to_json(tmp_path / "general.jsonl")
    named, given_directly = reads(), reads()
    config = SFTConfig(str(tmp_path), **COMMON, max_steps=2, streams={"general": str(tmp_path / "general.jsonl")})
    torch.manual_seed(0)
    SFTTrainer(tiny_model(), config, train_dataset=additions(), processing_class=tokenizer(), plugins=[named]).train()
    make_sft(tmp_path, plugins=[given_directly], streams={"general": data}, max_steps=2).train()
    assert [one.nll for one in named.seen] == [one.nll for one in given_directly.seen]


def test_grpo_streams_use_their_own_length_limit(tmp_path):
    plugin = reads(batch_size=4, max_length=6)
    data = additions(4, "language_modeling")
    make_grpo(tmp_path / "run", plugins=[plugin], streams={"general": data}, max_steps=1).train()
    # Text of at least 7 tokens with its EOS, cut to 6: five labels a row after the shift.
    assert plugin.seen[0].tokens <= 4 * 5


@pytest.mark.parametrize("column", [False, True])
def test_messages_of_a_grpo_stream_go_through_the_template_as_the_prompts_do(tmp_path, column):
    class Counts(Plugin):
        @hookimpl
        def streams(self):
            return [StreamRequest("general")]

    quiet = tokenizer()
    quiet.chat_template = (
        "{% if quiet %}Q{% endif %}{% if loud %}L{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    data = additions(4, "language_modeling", conversational=True)
    if column:
        data = data.add_column("chat_template_kwargs", [{"loud": True}] * 4)
    trainer = GRPOTrainer(
        tiny_model(),
        reward_funcs=varied_reward,
        args=GRPOConfig(str(tmp_path), **COMMON, num_generations=2, chat_template_kwargs={"quiet": True}),
        train_dataset=additions(8, "prompt_only"),
        processing_class=quiet,
        plugins=[Counts()],
        streams={"general": data},
    )
    for row, prepared in zip(data, trainer.ext_streams["general"].dataset, strict=True):
        assert quiet.decode(prepared["input_ids"]) == ("QL" if column else "Q") + "".join(
            m["content"] for m in row["messages"]
        )
