"""What a release of a library changes of the seams that we stand on: the differences of their sources.

    python tests/moved_seams.py transformers                  # from the newest reviewed release to the installed one
    python tests/moved_seams.py transformers 5.22.2 5.23.0    # between any two

pip downloads the wheels; nothing is imported from them, so neither release has to be installed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

from packaging.version import Version
from test_seams import SEAMS

from trl_ext.seams import library, recorded


class Release:
    """The sources of one release of a library.

    Args:
        name: of the library.
        number: of the release.
        folder: where to put its wheel.
    """

    def __init__(self, name: str, number: str, folder: Path) -> None:
        target = folder / number
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(target), f"{name}=={number}"], check=True)
        (wheel,) = target.glob("*.whl")
        self._files = zipfile.ZipFile(wheel)
        self._names = set(self._files.namelist())

    def source(self, seam: str) -> str | None:
        """The source of a seam, `module:name` or `module:class.name`; None where it is not there."""
        module, _, path = seam.partition(":")
        return self._find(module, path.split("."))

    def _find(self, module: str, path: list[str]) -> str | None:
        file = next(
            (f for f in (f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")) if f in self._names),
            None,
        )
        if file is None:
            return None
        text = self._files.read(file).decode()
        tree = ast.parse(text)
        node: ast.AST = tree
        for name in path:
            inner = next((part for part in _parts(node) if _defines(part, name)), None)
            if inner is None:
                return self._imported(tree, module, file.endswith("__init__.py"), path) if node is tree else None
            node = inner
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
        return dedent("\n".join(text.splitlines()[start - 1 : node.end_lineno]))  # type: ignore[attr-defined]

    def _imported(self, tree: ast.Module, module: str, is_package: bool, path: list[str]) -> str | None:
        """The source of what the module takes from another one of the library."""
        for node in ast.walk(tree):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if alias.name != "*" and path[0] != (alias.asname or alias.name):
                    continue
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package] if node.level else []
                theirs = path if alias.name == "*" else [alias.name, *path[1:]]
                found = self._find(".".join([*parents, *filter(None, [node.module])]), theirs)
                if found is not None:
                    return found
        return None


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """What a module or class holds, also under conditions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try):
            yield from _parts(child)


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def differences(name: str, before: str, after: str) -> dict[str, str]:
    """Seam to the difference of its sources, for the seams of a library that two releases have in other forms."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        old, new = (Release(name, number, Path(folder)) for number in (before, after))
        for seam in sorted(seam for seam in SEAMS if library(seam) == name):
            was, now = old.source(seam), new.source(seam)
            if was is None and now is None:
                found[seam] = "in neither release"
            elif was != now:
                lines = ([] if text is None else text.splitlines() for text in (was, now))
                found[seam] = "\n".join(difflib.unified_diff(*lines, before, after, lineterm="", n=2))
    return found


def main() -> None:
    """Print the moved seams, with what each is relied on for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=sorted(recorded()))
    parser.add_argument("before", nargs="?", help="the newest reviewed release where it is left out")
    parser.add_argument("after", nargs="?", help="the installed release where it is left out")
    given = parser.parse_args()
    before = given.before or max(recorded()[given.library], key=Version)
    after = given.after or version(given.library)
    moved = differences(given.library, before, after)
    listed = [seam for seam in SEAMS if library(seam) == given.library]
    for seam, difference in moved.items():
        reasons = "; ".join(f"{package}: {reason}" for package, reason in SEAMS[seam].items())
        print(f"=== {seam}\nrelied on: {reasons}\n{difference}\n")
    print(f"{given.library} {before} -> {after}: {len(moved)} of {len(listed)} seams moved")


if __name__ == "__main__":
    main()
