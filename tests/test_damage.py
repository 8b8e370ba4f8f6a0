"""Damaged checkpoints: nothing is trained on silently, and every refusal names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Idle, Plugin
from test_resume import Counter, Mix

from trl_ext.checkpoints import newest_complete
from trl_ext.checkpoints.completeness import corruption, incompleteness
from trl_ext.errors import CheckpointError
from trl_ext.testing.runs import additions, make_grpo, make_sft

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def build(kind: str, folder: Path, **config: Any) -> Any:
    make = {"sft": make_sft, "grpo": make_grpo}[kind]
    streams = {"general": additions(7, seed=3)}
    config = SAVING | ({"gradient_accumulation_steps": 2} if kind == "grpo" else {}) | config
    return make(folder, names=["ema:decay=0.5"], plugins=[Mix(), Counter()], streams=streams, **config)


@pytest.fixture(scope="module", params=["sft", "grpo"])
def saved(request, tmp_path_factory) -> Path:
    """The folder of a finished run, with the checkpoints of steps 1, 2 and 3 (amid a generation for GRPO)."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    build(request.param, folder).train()
    return folder


def files_of(checkpoint: Path) -> list[str]:
    return [str(path.relative_to(checkpoint)) for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def reason_for(checkpoint: Path) -> str | None:
    return incompleteness(checkpoint) or corruption(checkpoint)


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def write(text: str) -> Callable[[Path, random.Random], None]:
    return lambda path, chance: path.write_text(text) and None


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flip": flip_a_bit,
    "truncation": truncate,
    "emptiness": lambda path, chance: path.write_bytes(b"") and None,
    "removal": lambda path, chance: path.unlink(),
    "empty list": write("[]"),
    "null": write("null"),
    "number": write("3"),
    "empty object": write("{}"),
    "no keys but these": write('{"format": 2, "global_step": 3}'),
    "deep nesting": write("[" * 200_000),
    "not UTF-8": lambda path, chance: path.write_bytes(b'{"a": "\xff"}') and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found_and_the_file_named(saved, tmp_path, damage):
    chance = random.Random(damage)
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(saved / "checkpoint-3", checkpoint)
    names = files_of(checkpoint)
    assert len(names) > 12
    for name in names:
        whole = (saved / "checkpoint-3" / name).read_bytes()
        for _ in range(20 if damage in ("bit flip", "truncation") else 1):
            DAMAGES[damage](checkpoint / name, chance)
            reason = reason_for(checkpoint)
            assert reason is not None, name
            assert name in reason
            (checkpoint / name).write_bytes(whole)
    assert reason_for(checkpoint) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_one_flipped_bit_is_refused_by_name_and_an_older_checkpoint_taken_otherwise(saved, tmp_path, name, caplog):
    kind = "grpo" if "grpo" in saved.parent.name else "sft"
    folder = tmp_path / "run"
    for step in (2, 3):
        shutil.copytree(saved / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    content = bytearray((folder / "checkpoint-3" / name).read_bytes())
    middle = content.index(b'"total_flos": ') + 14 if name == "trainer_state.json" else len(content) // 2
    content[middle] ^= 1
    (folder / "checkpoint-3" / name).write_bytes(bytes(content))
    trainer = build(kind, folder, save_strategy="no")
    trainer._inner_training_loop = lambda *args, resume_from_checkpoint, **kwargs: resume_from_checkpoint
    with pytest.raises(CheckpointError, match=rf"checkpoint-3 is incomplete: {name}"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert trainer.train(resume_from_checkpoint=True) == str(folder / "checkpoint-2")
    assert (folder / "incomplete-checkpoint-3").is_dir()
    assert any(name in record.getMessage() for record in caplog.records)


def test_verification_can_be_switched_off(saved, tmp_path):
    kind = "grpo" if "grpo" in saved.parent.name else "sft"
    folder = tmp_path / "run"
    shutil.copytree(saved / "checkpoint-2", folder / "checkpoint-2")
    path = folder / "checkpoint-2" / "training_args.bin"  # which resuming does not read
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    trainer = build(kind, folder, save_strategy="no", verify_checkpoint=False)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("content", ["[]", "null", "{}", "[" * 200_000, '{"global_step": 2, "max_steps": 4, "x": 1}'])
def test_the_state_of_a_run_without_plugins_has_the_right_shape_too(tmp_path, content):
    make_sft(tmp_path / "run", save_strategy="steps", save_steps=2).train()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text(content)
    newest, [(bad, reason)] = newest_complete(tmp_path / "run")
    assert newest.name == "checkpoint-2"
    assert bad.name == "checkpoint-4"
    assert "trainer_state.json is corrupt" in reason


def test_folders_that_only_look_like_checkpoints_are_left_alone(saved, tmp_path):
    for name in ("checkpoint-2", "checkpoint-²", "checkpoint-٣", "checkpoint-x", "checkpoint-"):
        shutil.copytree(saved / "checkpoint-2", tmp_path / name)
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-2", [])


# -- states that cannot be saved -------------------------------------------------------------------------------------


def with_state(state: Any) -> Plugin:
    class Odd(Idle):
        def state_dict(self) -> Any:
            return state() if callable(state) else state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    return Odd()


def fail() -> None:
    raise RuntimeError("no state today")


UNSAVED: dict[str, tuple[Any, str]] = {
    "reserved name": ({"__metadata__": torch.zeros(1)}, "'__metadata__': safetensors reserves it"),
    "number as name": ({3: 1}, "name 3: names in a state are texts"),
    "no dictionary": ([1], "is a list instead of a dictionary"),
    "no JSON": ({"x": object()}, "holds what is neither tensor nor JSON"),
    "sparse tensor": ({"x": torch.eye(2).to_sparse()}, "holds a tensor that cannot be saved"),
    "failure": (fail, r"failed in state_dict\(\): RuntimeError: no state today"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_a_state_that_cannot_be_saved_is_refused_with_the_plugins_name(tmp_path, case):
    state, message = UNSAVED[case]
    trainer = make_sft(tmp_path / "run", plugins=[with_state(state)], **SAVING)
    with pytest.raises(CheckpointError, match=f"'Odd'.*{message}"):
        trainer.train()
    assert newest_complete(tmp_path / "run")[0] is None


@pytest.mark.parametrize("file", ["rank-00000.json", "rank-00000.safetensors", "Counter/state.json"])
def test_without_checksums_what_cannot_be_read_is_refused_by_name(saved, tmp_path, file):
    kind = "grpo" if "grpo" in saved.parent.name else "sft"
    folder = tmp_path / "run"
    shutil.copytree(saved / "checkpoint-2", folder / "checkpoint-2")
    path = folder / "checkpoint-2" / "trl_ext" / file
    path.write_bytes(b"x" * path.stat().st_size)
    trainer = build(kind, folder, save_strategy="no", verify_checkpoint=False)
    with pytest.raises(Exception, match=f"{file} is"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_manifest_lists_every_other_file_with_its_size(saved):
    checkpoint = saved / "checkpoint-3"
    listed = json.loads((checkpoint / "trl_ext" / "manifest.json").read_text())["files"]
    assert set(listed) == set(files_of(checkpoint)) - {"trl_ext/manifest.json"}
    assert all((checkpoint / name).stat().st_size == entry["size"] for name, entry in listed.items())
