"""The seams of TRL and transformers that trl_ext stands on: all listed, all there, and none changed unseen.

Run this file to record the fingerprints of the installed versions, after reviewing what moved:

    python tests/test_seams.py
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import trl
from helpers import MAKE

import trl_ext
from trl_ext import seams
from trl_ext.trainers import GRPOTrainer, SFTTrainer

RECORD = Path(__file__).parent / "seams.json"
SEAMS = {**seams.OVERRIDDEN, **seams.READ}
DOCUMENTED = {("transformers.utils", "logging")}
PACKAGE = Path(trl_ext.__file__).parent


def versions() -> str:
    return f"trl {version('trl')}, transformers {version('transformers')}, accelerate {version('accelerate')}"


def fingerprint(seam: str) -> str:
    """sha256 of a seam's signature and source, or of its value where it is a constant."""
    found = seams.resolve(seam)
    if callable(found):
        found = inspect.unwrap(found)  # TRL times some methods with a decorator
        text = f"{_signature(found)}\n{dedent(inspect.getsource(found))}"
    else:
        text = repr(found)
    return hashlib.sha256(text.encode()).hexdigest()


def _signature(found: Any) -> str:
    return ", ".join(f"{p.kind.name} {p.name}" for p in inspect.signature(found).parameters.values())


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def test_the_installed_versions_have_been_reviewed():
    assert versions() in recorded(), (
        f"no fingerprints for {versions()}. Review each seam of trl_ext/seams.py in the installed sources against "
        f"its reason, run the whole suite, then record them with `python tests/test_seams.py` and commit {RECORD.name}"
    )


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_is_as_it_was_reviewed(seam):
    known = recorded().get(versions(), {})
    assert fingerprint(seam) == known.get(seam), (
        f"{seam} is not the one that was reviewed for {versions()}. trl_ext relies on it: {SEAMS[seam]}. Compare it "
        "with the version reviewed, repair what moved, then record it with `python tests/test_seams.py`"
    )


def test_the_record_has_no_seam_that_is_not_listed():
    assert set(recorded().get(versions(), {})) == set(SEAMS)


def test_a_change_of_source_or_signature_changes_the_fingerprint(monkeypatch):
    before = fingerprint(f"{seams.HF}._get_grad_norm")
    assert before == fingerprint(f"{seams.HF}._get_grad_norm")

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm

    monkeypatch.setattr("transformers.trainer.Trainer._get_grad_norm", _get_grad_norm)
    assert fingerprint(f"{seams.HF}._get_grad_norm") != before


# -- all of them are listed ------------------------------------------------------------------------------------------


def overrides(ours: type, theirs: type) -> Iterator[str]:
    """TRL's and transformers' methods that classes of trl_ext redefine, where they are defined."""
    for cls in ours.__mro__:
        if cls.__module__.startswith("trl_ext"):
            for name in vars(cls):
                owner = next((base for base in theirs.__mro__[:-1] if name in vars(base)), None)
                if owner is not None and inspect.isfunction(vars(owner)[name]):
                    yield f"{owner.__module__}:{owner.__qualname__}.{name}"


def test_every_override_is_listed_and_no_other():
    found = {*overrides(SFTTrainer, trl.SFTTrainer), *overrides(GRPOTrainer, trl.GRPOTrainer)}
    assert found - set(seams.OVERRIDDEN) == set()
    assert set(seams.OVERRIDDEN) - found == set()


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def test_every_import_from_inside_of_trl_is_listed():
    """Top-level names of a library are its public interface; what is taken from its modules is not."""
    names = {seam.partition(":")[2].split(".")[0] for seam in SEAMS}
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and "." in node.module:
                library = node.module.split(".")[0]
                if library in ("trl", "transformers", "accelerate"):
                    for alias in node.names:
                        known = alias.name in names or (node.module, alias.name) in DOCUMENTED
                        assert known, f"{path.name}: {node.module}.{alias.name}"


def test_every_private_attribute_of_a_trainer_is_listed():
    listed = {name for names in seams.ATTRIBUTES.values() for name in names}
    methods = {seam.split(".")[-1] for seam in SEAMS}
    for path, tree in sources():
        if path.parent.name != "trainers":
            continue
        own = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        } | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if (
                node.value.id in ("self", "trainer")
                and node.attr[0] == "_"
                and not node.attr.startswith(("__", "_ext_"))
            ):
                assert node.attr in listed | methods or node.attr in own, f"{path.name}:{node.lineno} {node.attr}"


@pytest.mark.parametrize("kind", seams.ATTRIBUTES)
def test_the_attributes_are_there(tmp_path, kind):
    trainer = MAKE[kind](tmp_path / "run", plain=True)
    missing = [name for name in seams.ATTRIBUTES[kind] if not hasattr(trainer, name)]
    assert not missing


def test_every_seam_says_why():
    for reason in [*SEAMS.values(), *(why for names in seams.ATTRIBUTES.values() for why in names.values())]:
        assert len(reason.split()) >= 3
        assert "\n" not in reason


def record() -> None:
    """Write the fingerprints of the installed versions beside those of others."""
    known = recorded() | {versions(): {seam: fingerprint(seam) for seam in sorted(SEAMS)}}
    RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    print(f"{RECORD.name}: {len(SEAMS)} seams of {versions()}")


if __name__ == "__main__":
    record()
