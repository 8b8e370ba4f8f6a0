"""The shape of the code: no import circle in the core or in a distribution, and no file too long for one story.

Circles count wherever an import stands: at the top of a module, in a function, under TYPE_CHECKING. The order of the
layers, and what distributions may import, are contracts in pyproject.toml that `make lint` checks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted([ROOT / "trl_ext", *(path.parent for path in ROOT.glob("plugins/*/src/*/__init__.py"))])
LONGEST = 300


def modules(package: Path) -> dict[str, Path]:
    """Name of each module of a package, as it is imported, to its file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules among `known` that a module imports anywhere in its text."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, [above if node.level else "", node.module or ""]))
            submodules = {f"{source}.{alias.name}" for alias in node.names}
            yield from submodules & known.keys()
            if source in known and not submodules <= known.keys():
                yield source


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first module repeated at the end; empty where there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows[module]):
            if found := search(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := search(module, []))), [])


def arrows_of(package: Path) -> dict[str, set[str]]:
    known = modules(package)
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_there_is_no_import_circle(package):
    found = circle(arrows_of(package))
    assert not found, " imports ".join(found)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_file_tells_one_story(package):
    lengths = {path: len(path.read_text().splitlines()) for path in modules(package).values()}
    long = [f"{path.relative_to(ROOT)} has {lines} lines" for path, lines in lengths.items() if lines > LONGEST]
    assert not long, f"over {LONGEST}: {'; '.join(long)}"


@pytest.mark.parametrize(
    "back",
    [
        "from made_up.low import thing",
        "from made_up import low",
        "from . import low",
        "from .low import thing",
        "import made_up.low",
        "def late():\n    from made_up.low import thing",
        "if TYPE_CHECKING:\n    from made_up.low import thing",
        "from made_up.inner.deep import thing",
    ],
)
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path, back):
    package = tmp_path / "made_up"
    (package / "inner").mkdir(parents=True)
    for file in ("__init__.py", "inner/__init__.py"):
        (package / file).write_text("")
    (package / "low.py").write_text("from made_up.high import thing")
    (package / "high.py").write_text(back)
    (package / "inner" / "deep.py").write_text("from ..low import thing")
    found = circle(arrows_of(package))
    assert found[0] == found[-1]
    assert {"made_up.low", "made_up.high"} <= set(found)


def test_a_diamond_is_no_circle(tmp_path):
    package = tmp_path / "made_up"
    package.mkdir()
    texts = {"__init__": "from made_up.a import x", "a": "from made_up import b, c", "b": "import made_up.d"}
    for name, text in {**texts, "c": "from .d import x", "d": "x = 1"}.items():
        (package / f"{name}.py").write_text(text)
    assert circle(arrows_of(package)) == []


def test_the_walk_through_the_code_names_files_and_functions_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)(?::(\w+))?`", text)
    assert len(named) > 40
    for file, name in named:
        path = next((at for at in (ROOT / "trl_ext" / file, ROOT / file) if at.is_file()), None)
        assert path is not None, file
        if name:
            kinds = (ast.FunctionDef, ast.ClassDef)
            defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}
            assert name in defined, f"{file}:{name}"
