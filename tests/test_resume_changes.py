"""Resuming by a run that differs: what changes its course is refused or reported, and nothing goes wrong unseen."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import Plugin, assert_equal_bits, file_digests
from test_resume import Counter, Mix

from trl_ext import hookimpl
from trl_ext.checkpoints.fingerprints import SAMPLE, data_fingerprint
from trl_ext.checkpoints.manifest import read_manifest, write_manifest
from trl_ext.engine.streams import Stream
from trl_ext.errors import CheckpointError
from trl_ext.records import StreamRequest
from trl_ext.testing.runs import additions, logged, make_grpo, make_sft, parameters

SAVING = {"save_strategy": "steps", "save_steps": 2}


def log_of(caplog: Any) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("trl_ext"))


# -- a run that is another -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Secretive(Plugin):
    """Has three options that no checkpoint may hold, and one whose `repr` is another in every process."""

    rule: Any = field(default_factory=object)
    api_key: str = "k-123"
    hidden: str = field(default="h-123", repr=False)
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": "Bearer hf_0123456789"})
    max_tokens: int = 7

    @hookimpl
    def weights_updated(self) -> None: ...


def build(folder: Path, **changes: Any) -> Any:
    """An SFT run with two plugins of a distribution, an instance, and a stream."""
    options = {
        "names": ["power:alpha=0.5", "ema:decay=0.9"],
        "plugins": [Mix(), Secretive()],
        "streams": {"general": additions(7, seed=3)},
        "max_steps": 4,
        **changes,
    }
    return make_sft(folder, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    build(folder, max_steps=2, **SAVING).train()
    return folder / "checkpoint-2"


@dataclass(eq=False)
class Other(Mix):
    """Takes the stream in another order."""

    label: str = "Mix"

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2, seed=5)]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "removed": ({"names": ["ema:decay=0.9"]}, "plugin 'power' is no longer active"),
    "added": ({"plugins": [Mix(), Secretive(), Counter()]}, "plugin 'Counter' is new"),
    "replaced": (
        {"names": ["dft", "ema:decay=0.9"]},
        "plugin 'power' is no longer active; plugin 'dft' is new",
    ),
    "replaced under its label": (
        {"names": [{"name": "dft", "label": "power"}, "ema:decay=0.9"]},
        r"plugin 'power' is DFT of trl-ext-objectives \(checkpoint: Power of trl-ext-objectives\)",
    ),
    "option": ({"names": ["power:alpha=5", "ema:decay=0.9"]}, r"plugin 'power' has alpha=5.0 \(checkpoint: 0.5\)"),
    "option of one with state": (
        {"names": ["power:alpha=0.5", "ema:decay=0.5"]},
        r"plugin 'ema' has decay=.*0.5.* \(checkpoint: .*0.9.*\)",
    ),
    "order": (
        {"names": ["ema:decay=0.9", "power:alpha=0.5"]},
        r"the order of plugins is ema, power, Mix, Secretive \(checkpoint: power, ema, Mix, Secretive\)",
    ),
    "rows of a stream": ({"streams": {"general": additions(7, seed=4)}}, "stream 'general' has other rows"),
    "size of a stream": ({"streams": {"general": additions(8, seed=3)}}, r"'general' has rows=8 \(checkpoint: 7\)"),
    "training data": ({"train": additions(64, seed=9)}, "the training data has other rows"),
    "seed of the order": ({"data_seed": 9}, r"the training data has seed=9 \(checkpoint: 7\)"),
    "a secret": ({"plugins": [Mix(), Secretive(api_key="k-9")]}, "plugin 'Secretive' has api_key=xxh3:"),
    "a secret inside of a value": (
        {"plugins": [Mix(), Secretive(headers={"Authorization": "Bearer hf_9876543210"})]},
        "plugin 'Secretive' has headers=xxh3:",
    ),
    "what only sounds like a secret": (
        {"plugins": [Mix(), Secretive(max_tokens=8)]},
        r"plugin 'Secretive' has max_tokens=8 \(checkpoint: 7\)",
    ),
}


def run_of(checkpoint: Path, tmp_path: Path, **changes: Any) -> Any:
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-2")
    trainer = build(tmp_path / "run", **changes)
    trainer._inner_training_loop = lambda *args, **kwargs: "trained"
    return trainer, str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_the_run_is_refused_or_reported(checkpoint, tmp_path, case, caplog):
    changes, message = CHANGES[case]
    trainer, path = run_of(checkpoint, tmp_path, **changes)
    with pytest.raises(
        CheckpointError, match=rf'written by another run: .*{message}.*resume_changes="warn"'
    ) as refusal:
        trainer.train(path)
    assert "\n" not in str(refusal.value)
    trainer.args.resume_changes = "warn"
    assert trainer.train(path) == "trained"
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    assert re.search(message, log_of(caplog))


@pytest.mark.parametrize("case", ["removed", "option", "order", "rows of a stream"])
def test_a_reset_of_plugin_state_allows_what_changes_the_plugins(checkpoint, tmp_path, case):
    trainer, path = run_of(checkpoint, tmp_path, reset_plugin_state=True, **CHANGES[case][0])
    assert trainer.train(path) == "trained"


def test_a_reset_of_plugin_state_does_not_allow_other_training_data(checkpoint, tmp_path):
    trainer, path = run_of(checkpoint, tmp_path, reset_plugin_state=True, train=additions(64, seed=9))
    with pytest.raises(CheckpointError, match="the training data has other rows"):
        trainer.train(path)


def test_everyday_settings_are_only_reported(checkpoint, tmp_path, caplog):
    trainer, path = run_of(checkpoint, tmp_path, learning_rate=1e-3, gradient_accumulation_steps=2)
    assert trainer.train(path) == "trained"
    assert "learning_rate=0.001 (checkpoint: 0.01)" in log_of(caplog)
    assert "gradient_accumulation_steps=2 (checkpoint: 1)" in log_of(caplog)


def test_the_same_run_says_nothing(checkpoint, tmp_path, caplog):
    trainer, path = run_of(checkpoint, tmp_path, max_steps=2)
    assert trainer.train(path) == "trained"
    assert log_of(caplog) == ""


def test_a_plugin_that_plain_trl_did_not_have_is_new(tmp_path):
    make_sft(tmp_path / "run", max_steps=2, **SAVING).train()
    with pytest.raises(CheckpointError, match="plugin 'power' is new"):
        make_sft(tmp_path / "run", names=["power"]).train(str(tmp_path / "run" / "checkpoint-2"))


def test_secrets_are_not_in_the_manifest(checkpoint):
    text = (checkpoint / "trl_ext" / "manifest.json").read_text()
    assert "k-123" not in text
    assert "h-123" not in text
    assert "hf_0123456789" not in text
    assert '"decay"' in text


def test_with_warn_states_go_on_where_they_fit_and_start_afresh_where_not(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-2")
    counter = Counter()
    changes = {"plugins": [Mix(), counter], "streams": {"general": additions(7, seed=4)}}
    trainer = build(tmp_path / "run", resume_changes="warn", **changes)
    trainer.train(str(tmp_path / "run" / "checkpoint-2"))
    assert counter.loaded is None
    assert counter.count == 2  # steps 3 and 4
    assert trainer.ext_streams["general"].position == 4  # two batches of two, of the new rows


def test_the_fingerprint_of_data_is_the_same_in_another_process():
    code = "from trl_ext.testing.runs import additions; from trl_ext.checkpoints.fingerprints import data_fingerprint; "
    code += "print(data_fingerprint(additions(9)))"
    here = Path(__file__).parent
    other = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert other.stdout.strip().splitlines()[-1] == str(data_fingerprint(additions(9)))


def test_the_fingerprint_reads_a_bounded_number_of_rows_the_first_and_the_last_among_them():
    from datasets import Dataset

    values = list(range(SAMPLE * 3))
    whole = data_fingerprint(Dataset.from_dict({"x": values}))
    for place in (0, -1):
        changed = list(values)
        changed[place] = -5
        assert data_fingerprint(Dataset.from_dict({"x": changed}))["hash"] != whole["hash"]
    assert data_fingerprint(Dataset.from_dict({"x": values}).select(range(SAMPLE * 3)))["hash"] == whole["hash"]


# -- another schedule of GRPO ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Prompts(Plugin):
    """Notes the prompts of each generation batch and the step at which it was drawn."""

    drawn: list[tuple[int, list[str]]] = field(default_factory=list)

    @hookimpl
    def advantages(self, advantages, rollouts):
        self.drawn.append((rollouts.step, list(rollouts.prompts)))
        return advantages


SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "half the batch, twice the accumulation": (
        {"per_device_train_batch_size": 8, "steps_per_generation": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    ),
    "fewer rollouts a generation": ({"steps_per_generation": 4}, {"steps_per_generation": 2}),
    "more rollouts a generation": ({"steps_per_generation": 2}, {"steps_per_generation": 4}),
    "used twice": ({"steps_per_generation": 2}, {"steps_per_generation": 2, "num_iterations": 2}),
    "larger groups": ({"steps_per_generation": 2}, {"steps_per_generation": 2, "num_generations": 4}),
    "a KL term": ({"steps_per_generation": 2}, {"steps_per_generation": 2, "beta": 0.1}),
}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("case", SCHEDULES)
def test_another_schedule_drops_the_rollouts_and_goes_on_as_trl_does(tmp_path, case, reset, caplog):
    before, after = SCHEDULES[case]
    folder, plugin = tmp_path / "run", Prompts()
    make_grpo(folder, plugins=[Prompts()], max_steps=3, save_strategy="steps", save_steps=1, **before).train()
    path = str(folder / "checkpoint-3")  # amid a generation
    ours = make_grpo(folder, plugins=[plugin], max_steps=6, reset_plugin_state=reset, **after)
    ours.train(path)
    assert ours.state.global_step == 6
    assert plugin.drawn[0][0] == 3, "no used rollout is trained on"
    assert log_of(caplog).count("rollouts of the checkpoint are dropped") == 1
    plain = make_grpo(folder, plain=True, max_steps=6, **after)
    plain.train(path)
    assert_equal_bits(parameters(ours), parameters(plain))


def test_the_same_schedule_keeps_the_rollouts(tmp_path, caplog):
    folder, plugin = tmp_path / "run", Prompts()
    settings = {"steps_per_generation": 4, "save_strategy": "steps", "save_steps": 1}
    make_grpo(folder, plugins=[Prompts()], max_steps=3, **settings).train()
    make_grpo(folder, plugins=[plugin], max_steps=6, **settings).train(str(folder / "checkpoint-3"))
    assert [step for step, _ in plugin.drawn] == [4]
    assert "dropped" not in log_of(caplog)


# -- already at the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("last", [3, 2])
def test_a_checkpoint_at_the_last_step_or_beyond_is_the_final_model(tmp_path, kind, last):
    def build() -> Any:
        streams = {"general": additions(7, seed=3)}
        make = make_sft if kind == "sft" else make_grpo
        config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
        return make(tmp_path / "run", names=["ema:decay=0.5"], plugins=[Mix()], streams=streams, **config)

    whole = build()
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    digests = file_digests(tmp_path / "run" / "checkpoint-3")
    resumed = build()
    resumed.args.max_steps = last
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_equal_bits(parameters(resumed), parameters(whole))
    resumed.save_model(str(tmp_path / "resumed"))
    assert file_digests(tmp_path / "resumed") == file_digests(tmp_path / "whole")
    assert file_digests(tmp_path / "run" / "checkpoint-3") == digests
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3"]


def test_a_run_that_a_stream_had_ended_does_not_go_on(tmp_path):
    @dataclass(eq=False)
    class Once(Mix):
        @hookimpl
        def streams(self):
            return [StreamRequest("general", batch_size=2, on_exhausted="stop")]

    def run(**options: Any) -> Any:
        streams = {"general": additions(6, seed=3)}
        config = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1}
        trainer = make_sft(tmp_path / "run", plugins=[Once()], streams=streams, **config)
        trainer.train(**options)
        return trainer

    whole = run()
    assert whole.state.global_step == 3
    resumed = run(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_equal_bits(parameters(resumed), parameters(whole))


# -- a streaming data set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_streaming_data_set_goes_on_at_its_row_after_its_first_pass(tmp_path, accumulation):
    def build(folder: Path) -> Any:
        rows = additions(10).to_iterable_dataset().shuffle(seed=3, buffer_size=4)
        config = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
        config |= {"gradient_accumulation_steps": accumulation}
        return make_sft(folder, train=rows, names=["ema:decay=0.5"], **config)

    whole = tmp_path / "whole" / "run"
    build(whole).train()
    expected = file_digests(whole / "checkpoint-8")
    for step in (1, 3, 4, 6):  # a pass has three batches
        folder = tmp_path / str(step) / "run"
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        build(folder).train(resume_from_checkpoint=True)
        found = file_digests(folder / "checkpoint-8")
        assert {name for name in expected if found.get(name) != expected[name]} == set(), step


# -- another number of ranks -----------------------------------------------------------------------------------------


def as_by_two_ranks(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint of one rank, and let it say that it was written by two."""
    shutil.copytree(checkpoint, target)
    write_manifest(target, {**read_manifest(target), "world_size": 2})


def test_streams_counters_and_replicated_state_go_on_with_another_number_of_ranks(checkpoint, tmp_path):
    finals = []
    for name, copy in {"one": shutil.copytree, "two": as_by_two_ranks}.items():
        target = tmp_path / name / "run" / "checkpoint-2"
        copy(checkpoint, target)
        trainer = build(target.parent)
        trainer.train(str(target))
        finals.append((parameters(trainer), trainer.ext_streams["general"].position, logged(trainer)))
    assert_equal_bits(finals[1][0], finals[0][0])
    assert finals[1][1] == finals[0][1] == 8  # four steps of two rows
    assert finals[1][2] == finals[0][2]


def test_state_in_shards_is_refused_with_another_number_of_ranks(tmp_path):
    def sharded() -> Counter:
        return type("Counter", (Counter,), {"state_per_rank": True})()

    make_sft(tmp_path / "run", plugins=[sharded()], max_steps=2, **SAVING).train()
    target = tmp_path / "two" / "checkpoint-2"
    as_by_two_ranks(tmp_path / "run" / "checkpoint-2", target)
    with pytest.raises(CheckpointError, match=r"'Counter' was saved in shards by 2 ranks, and this run has 1"):
        make_sft(tmp_path / "two", plugins=[sharded()]).train(str(target))


def test_a_stream_goes_on_where_two_ranks_left_it(tmp_path):
    """The rows that one rank draws next follow those that two ranks have drawn together."""
    rows = additions(11).map(lambda row, i: {"input_ids": [i], "labels": [i]}, with_indices=True)

    def stream(rank: int, world: int) -> Stream:
        return Stream(StreamRequest("general", batch_size=2), rows, lambda batch: batch, 5, rank, world)

    pair, alone = [stream(rank, 2) for rank in range(2)], stream(0, 1)
    drawn = [row for _ in range(3) for part in pair for row in part.next_indices()]
    expected = [row for _ in range(8) for row in alone.next_indices()]
    one = stream(0, 1)
    one.load_state_dict(pair[1].state_dict())
    assert drawn + [row for _ in range(2) for row in one.next_indices()] == expected
