"""Saving and resuming: the same bytes as without a break, and nothing resumed from what is not whole or not ours."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import Idle, Plugin, assert_equal_bits, file_digests
from safetensors.torch import load_file

from trl_ext import hookimpl
from trl_ext.checkpoints import newest_complete
from trl_ext.checkpoints.completeness import incompleteness
from trl_ext.errors import CheckpointError
from trl_ext.hookspecs import HOOKS
from trl_ext.records import StreamRequest
from trl_ext.testing.runs import MAKE, additions, logged, make_grpo, make_sft, parameters, start_model, tiny_model


@dataclass(eq=False)
class Mix(Plugin):
    """Adds a share of a stream's gradient."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        gradients.axpy_(0.2, streams["general"].gradients)


@dataclass(eq=False)
class Counter(Plugin):
    """State of every kind: a tensor, views of one buffer, numbers, text, lists."""

    state_version: ClassVar[int] = 1
    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 3, dtype=torch.float64))
    loaded: dict[str, Any] | None = None

    @hookimpl
    def weights_updated(self, weights, step):
        self.count += 1
        self.total += step

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "row": self.total[0], "text": "a", "list": [1, 2.5, None]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        self.count, self.total = state["count"], state["total"]


def build_sft(folder: Path, **config: Any) -> Any:
    """Objective, average, stream and dropout; two micro-batches a step; a checkpoint at every second of six steps."""
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **config}
    return make_sft(
        folder,
        model=tiny_model(attention_dropout=0.1),
        names=["power:alpha=0.5", "ema:decay=0.5"],
        plugins=[Mix(), Counter()],
        streams={"general": additions(7, seed=3)},
        **config,
    )


def build(kind: str, folder: Path, **config: Any) -> Any:
    """The same for every trainer; an objective and a stream only where there is a language model head."""
    if kind == "sft":
        return build_sft(folder, **config)
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **config}
    takes = kind in HOOKS["streams"].trainers
    return MAKE[kind](
        folder,
        model=start_model(kind, attention_dropout=0.1),
        names=["ema:decay=0.5", "gradient-surgery" if takes else "adaptive-lr"],
        plugins=[Counter()],
        streams={"general": additions(7, seed=3)} if takes else None,
        **config,
    )


# -- the same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run, with the checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    build_sft(folder).train()
    return folder


def copy_with(finished: Path, target: Path, *steps: int) -> Path:
    """A run's folder as it is after it was stopped: only the checkpoints of these steps."""
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", target / "run" / f"checkpoint-{step}")
    return target / "run"


@pytest.mark.parametrize("step", [2, 4])
def test_sft_resumes_to_the_same_bytes(finished, tmp_path, step):
    folder = copy_with(finished, tmp_path, step)
    build_sft(folder).train(resume_from_checkpoint=True)
    assert file_digests(folder / "checkpoint-6") == file_digests(finished / "checkpoint-6")


GRPO_CASES: dict[str, dict[str, Any]] = {
    # One generation batch serves 2 optimiser steps: odd steps are in its middle.
    "four micro-batches a generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    # 3 optimiser steps of 2 micro-batches, each used twice: steps 1, 2, 4 and 5 are in the middle.
    "two iterations": {"steps_per_generation": 3, "gradient_accumulation_steps": 1, "num_iterations": 2},
    "kl and policy state": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.1},
    # An epoch is two optimiser steps, and each draws the prompts in another order.
    "three epochs": {"gradient_accumulation_steps": 2, "train": additions(8, "prompt_only")},
    # Generation batches begin amid accumulation windows.
    "three over two": {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo_resumes_to_the_same_bytes_also_amid_a_generation(tmp_path, case):
    def build(folder: Path) -> Any:
        config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **GRPO_CASES[case]}
        streams = {"general": additions(7, seed=3)}
        return make_grpo(
            folder, names=["ema:decay=0.5"], plugins=[Mix(), Counter()], streams=streams, saved=tmp_path / "m", **config
        )

    whole = tmp_path / "whole" / "run"
    trainer = build(whole)
    trainer.train()
    args = trainer.args
    expected = file_digests(whole / "checkpoint-6")
    for step in range(1, 6):
        folder = copy_with(whole, tmp_path / str(step), step)
        build(folder).train(resume_from_checkpoint=True)
        found = file_digests(folder / "checkpoint-6")
        different = {name for name in expected if found.get(name) != expected[name]}
        # The log of the step that generated holds numbers of rewards; one resumed amid it logs them for later steps.
        amid = step * args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)
        assert different <= ({"trainer_state.json"} if amid else set()), (step, different)


def test_state_of_every_kind_comes_back(finished, tmp_path):
    folder = copy_with(finished, tmp_path, 4)
    trainer = build_sft(folder)
    counter = trainer.ext_plugins.plugins[-1].instance
    trainer.train(resume_from_checkpoint=True)
    loaded = counter.loaded
    assert loaded["count"] == 4
    assert torch.equal(loaded["row"], torch.full((3,), 1.0 + 2 + 3 + 4, dtype=torch.float64))
    assert loaded["text"] == "a"
    assert loaded["list"] == [1, 2.5, None]
    assert counter.count == 6


# -- not whole -------------------------------------------------------------------------------------------------------


def every_file(finished: Path) -> list[str]:
    checkpoint = finished / "checkpoint-6"
    return [str(p.relative_to(checkpoint)) for p in sorted(checkpoint.rglob("*")) if p.is_file()]


@pytest.mark.parametrize("damage", ["missing", "empty", "one byte short", "half"])
def test_a_checkpoint_with_any_file_damaged_is_incomplete(finished, tmp_path, damage):
    assert incompleteness(finished / "checkpoint-6") is None
    names = every_file(finished)
    assert len(names) > 12
    for name in names:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(finished / "checkpoint-6", folder)
        file = folder / name
        content = file.read_bytes().rstrip(b"\n")  # JSON is whole without its last newline
        if damage == "missing":
            file.unlink()
        elif content:
            keep = {"empty": 0, "one byte short": len(content) - 1, "half": len(content) // 2}[damage]
            file.write_bytes(content[:keep])
        assert incompleteness(folder) is not None or not content, name
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors", "rng_state.pth"]
)
def test_a_checkpoint_without_plugins_is_checked_for_the_parts_that_trl_needs(tmp_path, name):
    make_sft(tmp_path / "run", save_strategy="steps", save_steps=2).train()
    newest, incomplete = newest_complete(tmp_path / "run")
    assert newest == tmp_path / "run" / "checkpoint-4"
    assert incomplete == []
    (newest / name).unlink()
    assert newest_complete(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"


def test_resuming_takes_the_newest_whole_checkpoint_and_sets_the_rest_aside(finished, tmp_path, caplog):
    folder = copy_with(finished, tmp_path, 2, 4)
    optimizer = folder / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    trainer = build_sft(folder)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trainer.train(resume_from_checkpoint=True)
    assert file_digests(folder / "checkpoint-6") == file_digests(finished / "checkpoint-6")
    assert (folder / "incomplete-checkpoint-4" / "optimizer.pt").is_file()
    assert file_digests(folder / "checkpoint-4") == file_digests(finished / "checkpoint-4")
    assert any("optimizer.pt has" in record.getMessage() for record in caplog.records)


def test_an_incomplete_checkpoint_named_outright_is_refused(finished, tmp_path):
    folder = copy_with(finished, tmp_path, 4)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 is incomplete: trainer_state.json.*resume_from_checkpoint=True"
    ):
        build_sft(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*start without resume_from_checkpoint"):
        build_sft(tmp_path / "run").train(resume_from_checkpoint=True)


def test_rotation_keeps_to_its_limit_and_to_whole_ones(finished, tmp_path):
    folder = copy_with(finished, tmp_path, 2, 4)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    build_sft(folder, save_total_limit=1).train(resume_from_checkpoint=True)
    assert sorted(p.name for p in folder.glob("*checkpoint-*")) == ["checkpoint-6", "incomplete-checkpoint-4"]


# -- killed while saving ---------------------------------------------------------------------------------------------


POINTS = ["after the optimiser", "amid the plugins", "before the manifest", "before the trainer's state", "rotation"]
MORE = ["after the model", "before the plugins", "after a plugin", "after the plugins"]


@pytest.mark.parametrize("points", [POINTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["points", "more points"])
def test_killed_while_saving_the_run_ends_the_same(finished, tmp_path, points):
    """Real processes, killed with signal 9 between the steps of saving, with a limit of one checkpoint."""
    report = killed(tmp_path, points)
    expected = file_digests(finished / "checkpoint-6")
    for point in points:
        assert report[point]["killed"], point
        assert report[point]["resumed at"] == (4 if point == "rotation" else 2), point
        assert file_digests(tmp_path / point / "run" / "checkpoint-6") == expected, point


def killed(folder: Path, points: list[str]) -> dict[str, Any]:
    """What became of runs that were killed at these points, each `point` of SFT or `kind: point`."""
    worker = Path(__file__).parent / "workers" / "killed.py"
    command = [sys.executable, str(worker), str(folder), *points]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


OTHERS = {
    "dpo": "amid the plugins",
    "kto": "after the optimiser",
    "rloo": "before the manifest",
    "reward": "before the trainer's state",
    "distillation": "rotation",
}


def test_every_trainer_that_is_killed_while_saving_ends_the_same(tmp_path):
    report = killed(tmp_path, [f"{kind}: {point}" for kind, point in OTHERS.items()])
    for kind, point in OTHERS.items():
        name = f"{kind}: {point}"
        assert report[name]["killed"], name
        assert report[name]["resumed at"] == (4 if point == "rotation" else 2), name
        whole = tmp_path / kind / "run"
        build(kind, whole).train()
        found, expected = (file_digests(at / "checkpoint-6") for at in (tmp_path / name / "run", whole))
        assert {name for name in found | expected if found.get(name) != expected.get(name)} == set(), name


# -- not ours --------------------------------------------------------------------------------------------------------


def resume(folder: Path, *, names: list[str] | None = None, plugins: tuple[Any, ...] = (), **config: Any) -> Any:
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **config}
    trainer = make_sft(folder, names=names, plugins=plugins, **config)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return trainer


def saved(folder: Path, **options: Any) -> Path:
    make_sft(folder, max_steps=2, save_strategy="steps", save_steps=2, **options).train()
    return folder


def test_state_that_is_missing_is_refused(tmp_path):
    folder = saved(tmp_path / "run")
    match = r"written by another run: plugin 'ema' is new. Set .*reset_plugin_state=True"
    with pytest.raises(CheckpointError, match=match):
        resume(folder, names=["ema"])
    assert resume(folder, names=["ema"], reset_plugin_state=True).state.global_step == 4


@pytest.mark.parametrize("names", [None, ["power"]], ids=["no plugins", "others"])
def test_state_of_plugins_that_are_not_active_is_refused(tmp_path, names):
    folder = saved(tmp_path / "run", names=["ema"])
    match = r"written by another run: plugin 'ema' is no longer active.*reset_plugin_state=True"
    with pytest.raises(CheckpointError, match=match):
        resume(folder, names=names)
    assert resume(folder, names=names, reset_plugin_state=True).state.global_step == 4


def test_corrupt_state_of_a_plugin_is_refused_and_can_be_left_out(tmp_path):
    """One byte changed, none lost: sizes agree, checksums do not."""
    folder = saved(tmp_path / "run", plugins=[Counter()])
    path = folder / "checkpoint-2" / "trl_ext" / "Counter" / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(CheckpointError, match=r"trl_ext/Counter/state.json is corrupt.*reset_plugin_state=True"):
        resume(folder, plugins=(Counter(),))
    assert resume(folder, plugins=(Counter(),), reset_plugin_state=True).state.global_step == 4


def test_a_corrupt_manifest_does_not_keep_older_checkpoints_from_being_found(finished, tmp_path):
    folder = copy_with(finished, tmp_path, 2, 4)
    (folder / "checkpoint-4" / "trl_ext" / "manifest.json").write_text("{")
    build_sft(folder).train(resume_from_checkpoint=True)
    assert file_digests(folder / "checkpoint-6") == file_digests(finished / "checkpoint-6")


def test_state_of_a_later_version_is_refused_and_of_an_earlier_one_is_the_plugins_affair(tmp_path):
    folder = saved(tmp_path / "run", plugins=[Counter()])

    def counter(version: int) -> Counter:
        return type("Counter", (Counter,), {"state_version": version})()

    with pytest.raises(CheckpointError, match=r"'Counter' has version 1, plugin .* reads up to 0; upgrade"):
        resume(folder, plugins=(counter(0),))
    newer = counter(2)
    resume(folder, plugins=(newer,))
    assert newer.loaded["count"] == 2


def test_a_reset_starts_plugins_and_streams_afresh_from_the_same_weights(tmp_path):
    streams = {"streams": {"general": additions(7, seed=3)}}
    folder = saved(tmp_path / "run", plugins=[Counter(), Mix()], **streams)
    raw = load_file(folder / "checkpoint-2" / "model.safetensors")
    counter = Counter()

    @dataclass(eq=False)
    class First(Plugin):
        weights: list[torch.Tensor] = field(default_factory=list)

        @hookimpl
        def setup(self, context):
            self.weights = [w.clone() for w in context.weights.local()]

    first = First()
    trainer = make_sft(folder, plugins=[counter, Mix(), first], max_steps=4, reset_plugin_state=True, **streams)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert counter.loaded is None
    assert counter.count == 2  # steps 3 and 4
    assert trainer.ext_streams["general"].position == 4
    names = list(parameters(trainer))
    assert all(torch.equal(w, raw[name]) for name, w in zip(names, first.weights, strict=True))


def test_a_stream_of_other_data_is_refused(tmp_path):
    folder = saved(tmp_path / "run", plugins=[Mix()], streams={"general": additions(7)})
    trainer = make_sft(folder, plugins=[Mix()], streams={"general": additions(8)}, max_steps=4)
    match = "stream 'general' has rows=8 .checkpoint: 7.*reset_plugin_state=True"
    with pytest.raises(CheckpointError, match=match):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_plain_trl_resumes_from_our_checkpoints(finished, tmp_path):
    folder = copy_with(finished, tmp_path, 4)
    trainer = make_sft(folder, plain=True, max_steps=6, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.state.global_step == 6


# -- the best model --------------------------------------------------------------------------------------------------


BEST: dict[str, Any] = {
    "learning_rate": 3.0,  # far too large: the first checkpoint is the best
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "nll",
    "greater_is_better": False,
}


def test_the_best_model_comes_back_with_the_plugins_state_of_that_time(tmp_path):
    held_out = {"trainer": {"eval_dataset": additions(4, seed=5)}}
    counter = Counter()
    trainer = make_sft(
        tmp_path / "run",
        names=["ema:decay=0.5"],
        plugins=[counter],
        max_steps=6,
        **BEST,
        **held_out,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    step = int(best.name.removeprefix("checkpoint-"))
    stored = load_file(best / "model.safetensors")
    assert_equal_bits(parameters(trainer), {name: stored[name] for name in parameters(trainer)})
    assert counter.count == step
    shadows = load_file(best / "trl_ext" / "ema" / "state.safetensors")
    ema = trainer.ext_plugins.plugins[0].instance.state_dict()
    assert all(torch.equal(ema[name], value) for name, value in shadows.items())
    losses = [entry["eval_nll"] for entry in logged(trainer) if "eval_nll" in entry]
    assert min(losses) == losses[step // 2 - 1]
    # What is saved at the end is the average of the best checkpoint.
    trainer.save_model(str(tmp_path / "final"))
    evaluated = make_sft(tmp_path / "b", plain=True, model=str(tmp_path / "final"), **held_out).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(min(losses), rel=1e-3)


def test_a_plugin_that_joined_after_the_best_checkpoint_keeps_what_it_has(tmp_path):
    def trainer(steps: int, *plugins: Any) -> Any:
        return make_sft(
            tmp_path / "run",
            names=["ema:decay=0.5"],
            plugins=plugins,
            max_steps=steps,
            **BEST,
            resume_changes="warn",
            trainer={"eval_dataset": additions(4, seed=5)},
        )

    trainer(4).train()
    counter = Counter()
    second = trainer(6, counter)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    best = Path(second.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert counter.count == 2
    shadows = load_file(best / "trl_ext" / "ema" / "state.safetensors")
    ema = second.ext_plugins.plugins[0].instance.state_dict()
    assert all(torch.equal(ema[name], value) for name, value in shadows.items())


def test_without_an_order_of_a_plugin_grpo_trains_in_trls_over_epochs(tmp_path):
    runs = {}
    for name in ("plain", "idle"):
        options = {"plain": True} if name == "plain" else {"plugins": [Idle()]}
        trainer = make_grpo(tmp_path / name / "run", max_steps=6, train=additions(4, "prompt_only"), **options)
        trainer.train()
        runs[name] = parameters(trainer)
    assert_equal_bits(runs["idle"], runs["plain"])
