"""What can be known of a plugin from its source alone: nothing here imports a plugin or a package it belongs to.

`trl-ext plugins list` needs it: it shows within half a second what each plugin is and whether it can be used, where
importing all of them takes many seconds and may run anything. Training has no use for it: it imports what it was asked
for.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Literals read from the source of a class or function; None where the source does not say."""

    summary: str | None = None
    """First line of the docstring."""
    requires_api: Any = None
    requires_trl: Any = None


class StaticError(Exception):
    """Importing the plugin would fail."""


class SourceInspector:
    """Follows entry points to what they name through the sources; each source is read once per inspector."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}
        self._trees: dict[str, ast.Module | None] = {}
        self._bindings: dict[str, dict[str, ast.stmt]] = {}
        self._checked: set[str] = set()

    def inspect(self, module: str, attribute: str) -> Facts:
        """Check that `from module import attribute` can work, and read the literals of what it gives.

        Read are the module, the packages around it, and those that hand the attribute on. Of what they import only
        the existence is checked: reading the whole of each distribution would take most of the time of a listing. A
        source that is nested too deeply to be parsed is taken to be importable.

        Args:
            module, attribute: what an entry point names.

        Raises:
            StaticError: A module is missing or has a syntax error, a top-level import or `raise` would fail, or the
                module does not define the attribute.
        """
        try:
            parts = module.split(".")
            for end in range(1, len(parts)):
                self._check_imports(".".join(parts[:end]))
            return self._find_definition(module, attribute, set())
        except (RecursionError, MemoryError):  # the parser runs out of its own stack with a MemoryError
            return Facts()

    def _find_module(self, name: str) -> ModuleSpec | None:
        """Find a module's spec without importing its parents, as `importlib.util.find_spec` would."""
        if name not in self._specs:
            parent, _, _ = name.rpartition(".")
            if parent:
                package = self._find_module(parent)
                where = package.submodule_search_locations if package else None
                self._specs[name] = PathFinder.find_spec(name, list(where)) if where is not None else None
            else:
                try:
                    self._specs[name] = importlib.util.find_spec(name)
                except ValueError:  # a module that was put into sys.modules by hand
                    self._specs[name] = None
        return self._specs[name]

    def _parse(self, name: str) -> ast.Module | None:
        """A module's syntax tree; None where there is no Python source (namespace packages, extension modules)."""
        spec = self._find_module(name)
        if spec is None:
            raise StaticError(f"there is no module {name!r}")
        if spec.origin is None or not spec.origin.endswith(".py"):
            return None
        if name not in self._trees:
            try:
                self._trees[name] = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
            except OSError as error:
                raise StaticError(f"module {name!r} cannot be read: {error}") from error
            except SyntaxError as error:
                raise StaticError(f"syntax error in {spec.origin}, line {error.lineno}: {error.msg}") from error
            except ValueError as error:  # null bytes
                raise StaticError(f"{spec.origin} is no Python source: {error}") from error
        return self._trees[name]

    def _check_imports(self, module: str) -> None:
        """Look at what importing `module` itself runs: its top-level statements."""
        if module in self._checked:
            return
        tree = self._parse(module)
        for statement in tree.body if tree else ():
            if isinstance(statement, ast.Raise):
                what = ast.unparse(statement)
                raise StaticError(f"importing {module!r} fails at line {statement.lineno}: {what}")
            for wanted in self._imports(statement, module):
                self._check_exists(wanted, module)
        self._checked.add(module)

    def _check_exists(self, wanted: str, importing: str) -> None:
        package = wanted.split(".")[0]
        if package == importing.split(".")[0]:
            if self._find_module(wanted) is None:
                raise StaticError(f"there is no module {wanted!r}")
        elif self._find_module(package) is None:
            raise StaticError(f"{importing!r} imports {wanted!r}, which is not installed")

    def _imports(self, statement: ast.stmt, module: str) -> list[str]:
        """The modules that an import statement names."""
        if isinstance(statement, ast.Import):
            return [alias.name for alias in statement.names]
        return [self._absolute(statement, module)] if isinstance(statement, ast.ImportFrom) else []

    def _absolute(self, statement: ast.ImportFrom, module: str) -> str:
        """The absolute name of what `from ... import` names."""
        if not statement.level:
            return statement.module or ""
        spec = self._find_module(module)
        is_package = spec is not None and spec.submodule_search_locations is not None
        parts = module.split(".")
        base = parts[: len(parts) - statement.level + is_package]
        return ".".join([*base, *([statement.module] if statement.module else [])])

    def _find_definition(self, module: str, name: str, seen: set[tuple[str, str]]) -> Facts:
        """Find what a module binds to a name, through imports within its package; no facts about a plain value."""
        self._check_imports(module)
        tree = self._parse(module)
        if tree is None or (module, name) in seen:
            return Facts()
        seen.add((module, name))
        if module not in self._bindings:
            self._bindings[module] = _bindings(tree)
        bindings = self._bindings[module]
        statement = bindings.get(name)
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            return _facts(statement)
        if isinstance(statement, ast.ImportFrom):
            source = self._absolute(statement, module)
            original = next(alias.name for alias in statement.names if name in (alias.asname, alias.name))
            if source.split(".")[0] == module.split(".")[0] and not self._find_module(f"{source}.{original}"):
                return self._find_definition(source, original, seen)
        elif statement is None and not {"*", "__getattr__"} & bindings.keys():
            raise StaticError(f"module {module!r} does not define {name!r}")
        return Facts()


def _bindings(tree: ast.Module) -> dict[str, ast.stmt]:
    """The names that a module binds, each with the statement that does ("*" for a star import)."""
    bindings: dict[str, ast.stmt] = {}
    for statement in _top_level(tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            bindings[statement.name] = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            bindings |= {alias.asname or alias.name.split(".")[0]: statement for alias in statement.names}
        else:
            targets = [*getattr(statement, "targets", ()), getattr(statement, "target", None)]
            targets += [item.optional_vars for item in getattr(statement, "items", ())]
            for target in filter(None, targets):
                bindings |= {node.id: statement for node in ast.walk(target) if isinstance(node, ast.Name)}
    return bindings


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run in a module's own scope, with the insides of `if`, `try`, `with` and loops."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _top_level(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _top_level(handler.body)


def _facts(definition: ast.ClassDef | ast.FunctionDef) -> Facts:
    literals: dict[str, Any] = {}
    for statement in definition.body if isinstance(definition, ast.ClassDef) else ():
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Constant):
            literals |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    summary = (ast.get_docstring(definition) or "").strip().partition("\n")[0]
    return Facts(summary or None, literals.get("requires_api"), literals.get("requires_trl"))
