"""The seams of TRL, transformers and PEFT that trl_ext stands on: all listed, all there, and none changed unseen.

The core lists its seams in `trl_ext/seams.py`, a distribution of plugins its own in a module `seams` of its package.
Run this file to record the fingerprints of the installed versions, after reviewing what moved:

    python tests/test_seams.py
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import trl

import trl_ext.trainers
from trl_ext import seams
from trl_ext.seams import LIBRARIES, RECORD, fingerprint, recorded
from trl_ext.testing.runs import MAKE

ROOT = Path(__file__).parent.parent
PACKAGES = {path.name: path for path in (ROOT / "trl_ext", *sorted(ROOT.glob("plugins/*/src/*")))}
LISTS = {name: import_module(f"{name}.seams") for name, path in PACKAGES.items() if (path / "seams.py").is_file()}
TRAINERS = {name: getattr(trl, name) for name in trl_ext.trainers.__all__}
"""TRL's trainers that are opened, by name."""
DOCUMENTED = {"transformers.utils:logging"}


def overridden(package: str) -> dict[str, str]:
    return getattr(LISTS.get(package), "OVERRIDDEN", {})


def listed(package: str) -> dict[str, str]:
    """The seams of a package, with what each is relied on for."""
    return {**overridden(package), **getattr(LISTS.get(package), "READ", {})}


SEAMS: dict[str, dict[str, str]] = {}
"""Seam -> package that stands on it -> what for."""
for _package in LISTS:
    for _seam, _reason in listed(_package).items():
        SEAMS.setdefault(_seam, {})[_package] = _reason


INSTALLED = {library: version(library) for library in LIBRARIES}


def known(library: str) -> dict[str, str]:
    """The fingerprints that were recorded for the installed release."""
    return recorded().get(library, {}).get(INSTALLED[library], {})


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_installed_release_has_been_reviewed(library):
    assert INSTALLED[library] in recorded()[library], (
        f"no fingerprints for {library} {INSTALLED[library]}. Review what moved (`python tests/moved_seams.py "
        f"{library}`), run the whole suite, record them with `python tests/test_seams.py` and commit {RECORD.name}"
    )


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_is_as_it_was_reviewed(seam):
    library = seams.library(seam)
    assert fingerprint(seam) == known(library).get(seam), (
        f"{seam} is not the one that was reviewed for {library} {INSTALLED[library]}. Relied on: {SEAMS[seam]}. See "
        f"what moved (`python tests/moved_seams.py {library}`), repair it, record it with `python tests/test_seams.py`"
    )


RECORDED = [(library, release) for library, releases in recorded().items() for release in releases]


@pytest.mark.parametrize(("library", "release"), RECORDED)
def test_each_reviewed_release_has_all_seams_on_record_and_no_other(library, release):
    """A seam is new for every release that was reviewed before, not only for the one that is installed."""
    assert set(recorded()[library][release]) == {seam for seam in SEAMS if seams.library(seam) == library}, (
        f"record the seams of {library} {release} too: `python tests/test_seams.py` where it is installed"
    )


def test_a_change_of_source_or_signature_changes_the_fingerprint(monkeypatch):
    before = fingerprint(f"{seams.HF}._get_grad_norm")
    assert before == fingerprint(f"{seams.HF}._get_grad_norm")

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm

    monkeypatch.setattr("transformers.trainer.Trainer._get_grad_norm", _get_grad_norm)
    assert fingerprint(f"{seams.HF}._get_grad_norm") != before


def test_a_kernel_has_the_same_fingerprint_where_triton_compiles_it(monkeypatch):
    class Compiled:
        """What Triton puts in the place of a function; it has no source of its own."""

        def __init__(self, fn):
            self.fn = fn

        def __call__(self):
            raise RuntimeError("cannot be called outside of a kernel")

    kernel = "trl.kernels.chunked_logprob:_forward_kernel"
    before = fingerprint(kernel)
    found = seams.resolve(kernel)
    monkeypatch.setattr(kernel.replace(":", "."), Compiled(getattr(found, "fn", found)))
    assert fingerprint(kernel) == before


# -- all of them are listed ------------------------------------------------------------------------------------------


def overrides(ours: type, theirs: type) -> Iterator[str]:
    """TRL's and transformers' methods that classes of trl_ext redefine, where they are defined."""
    for cls in ours.__mro__:
        if cls.__module__.startswith("trl_ext"):
            yield from redefined(vars(cls), theirs)


def redefined(names: Any, theirs: type) -> Iterator[str]:
    """Those of the names that are methods of TRL or transformers, where they are defined."""
    for name in names:
        owner = next((base for base in theirs.__mro__[:-1] if name in vars(base)), None)
        if owner is not None and inspect.isfunction(vars(owner)[name]):
            yield f"{owner.__module__}:{owner.__qualname__}.{name}"


def test_every_override_is_listed_and_no_other():
    found = {seam for name, theirs in TRAINERS.items() for seam in overrides(getattr(trl_ext.trainers, name), theirs)}
    assert found - set(seams.OVERRIDDEN) == set()
    assert set(seams.OVERRIDDEN) - found == set()


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGES[package].rglob("*.py")):
        yield str(path.relative_to(PACKAGES[package].parent)), ast.parse(path.read_text())


def trainers_of_plugins(package: str) -> Iterator[str]:
    """What a distribution's own subclasses of the trainers redefine, by their sources."""
    for _, tree in sources(package):
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if (kind := ast.unparse(base).split(".")[-1]) in TRAINERS:
                    methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                    yield from redefined(methods, TRAINERS[kind])


@pytest.mark.parametrize("package", sorted(PACKAGES.keys() - {"trl_ext"}))
def test_every_override_of_a_distribution_is_listed_and_no_other(package):
    assert set(trainers_of_plugins(package)) == set(overridden(package))


def inside_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and `module:name` of each import from inside of a library.

    Top-level names of a library are its public interface; what is taken from its modules is not.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names]
        else:
            continue
        for module, name in modules:
            if "." in module and module.split(".")[0] in LIBRARIES:
                yield node.lineno, f"{module}:{name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_from_inside_of_a_library_is_listed(package):
    known = DOCUMENTED | {
        f"{module}:{path.split('.')[0]}" for module, _, path in (s.partition(":") for s in listed(package))
    }
    for file, tree in sources(package):
        for line, name in inside_imports(tree):
            assert name in known, f"{file}:{line} takes {name}, which {package}/seams.py does not list"


def test_every_private_attribute_of_a_trainer_is_listed():
    names = {name for names in seams.ATTRIBUTES.values() for name in names}
    names |= {seam.split(".")[-1] for seam in listed("trl_ext")}
    for file, tree in sources("trl_ext"):
        own = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        } | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        trainers = ("self", "trainer") if file.startswith("trl_ext/trainers/") else ("trainer",)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in trainers
                and node.attr[0] == "_"
                and not node.attr.startswith(("__", "_ext_"))
            ):
                assert node.attr in names or node.attr in own, f"{file}:{node.lineno} {node.attr}"


@pytest.mark.parametrize("kind", seams.ATTRIBUTES)
def test_the_attributes_are_there(tmp_path, kind):
    trainer = MAKE[kind](tmp_path / "run", plain=True)
    missing = [name for name in seams.ATTRIBUTES[kind] if not hasattr(trainer, name)]
    assert not missing


def test_every_seam_says_why():
    reasons = [reason for relied in SEAMS.values() for reason in relied.values()]
    for reason in [*reasons, *(why for names in seams.ATTRIBUTES.values() for why in names.values())]:
        assert len(reason.split()) >= 3
        assert "\n" not in reason


def record() -> None:
    """Write the fingerprints of the installed releases beside those of others."""
    releases = recorded()
    for library, installed in INSTALLED.items():
        mine = {seam: fingerprint(seam) for seam in SEAMS if seams.library(seam) == library}
        releases.setdefault(library, {})[installed] = mine
        print(f"{RECORD.name}: {len(mine)} seams of {library} {installed}")
    RECORD.write_text(json.dumps(releases, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
