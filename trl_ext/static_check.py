"""What can be known of a plugin from its source alone: nothing here imports a plugin or a package it belongs to."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


@dataclass(frozen=True)
class ClassFacts:
    """Literals read from a plugin class's source; None where the source does not say."""

    summary: str | None = None
    requires_api: str | None = None
    requires_trl: str | None = None


class StaticError(Exception):
    """Importing the plugin would fail."""


def inspect_entry_point(module: str, attribute: str) -> ClassFacts:
    """Follow an entry point to its class through the sources.

    Args:
        module: Dotted module name.
        attribute: Name of the class in it.

    Raises:
        StaticError: A module is missing or has a syntax error, a top-level import or `raise` would fail, or the module does
            not define the attribute.
    """
    _check_imports(module, set())
    return _find_class(module, attribute, set())


@cache
def _find_module(name: str) -> ModuleSpec | None:
    """Find a module's spec without importing its parents, as `importlib.util.find_spec` would."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was put into sys.modules by hand
        return None
    qualified = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        qualified = f"{qualified}.{part}"
        spec = PathFinder.find_spec(qualified, list(spec.submodule_search_locations))
    return spec


@cache
def _parse(name: str) -> ast.Module | None:
    """A module's syntax tree; None where there is no Python source (namespace packages, extension modules)."""
    spec = _find_module(name)
    if spec is None:
        raise StaticError(f"there is no module {name!r}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except OSError as error:
        raise StaticError(f"module {name!r} cannot be read: {error}") from error
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise StaticError(f"syntax error in {spec.origin}{line}: {error}") from error


def _check_imports(module: str, seen: set[str]) -> None:
    """Walk what importing `module` would run: its parents, itself, and its top-level imports within the same package."""
    for name in _with_parents(module):
        if name in seen:
            continue
        seen.add(name)
        tree = _parse(name)
        for statement in tree.body if tree else ():
            if isinstance(statement, ast.Raise):
                what = ast.unparse(statement)
                raise StaticError(f"importing {name!r} fails, line {statement.lineno}: {what}")
            for wanted in _imported_modules(statement, name):
                if wanted.split(".")[0] == module.split(".")[0]:
                    _check_imports(wanted, seen)
                elif _find_module(wanted.split(".")[0]) is None:
                    raise StaticError(f"{name!r} imports {wanted!r}, which is not installed")


def _imported_modules(statement: ast.stmt, module: str) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        yield _absolute(statement, module)


def _absolute(statement: ast.ImportFrom, module: str) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".")
    found = _find_module(module)
    up = statement.level - (found is not None and found.submodule_search_locations is not None)
    base = package[: len(package) - up]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _find_class(module: str, attribute: str, seen: set[tuple[str, str]]) -> ClassFacts:
    tree = _parse(module)
    if tree is None or (module, attribute) in seen:
        return ClassFacts()
    seen.add((module, attribute))
    certain = True
    for statement in _top_level(tree.body):
        if isinstance(statement, ast.ClassDef) and statement.name == attribute:
            return _facts(statement)
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == attribute:
                    source = _absolute(statement, module)
                    if source.split(".")[0] != module.split(".")[0] or _find_module(f"{source}.{alias.name}"):
                        return ClassFacts()
                    return _find_class(source, alias.name, seen)
                certain = certain and alias.name != "*"
        if attribute in _bound_names(statement):
            return ClassFacts()
        certain = certain and "__getattr__" not in _bound_names(statement)
    if certain:
        raise StaticError(f"module {module!r} does not define {attribute!r}")
    return ClassFacts()


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module's top level, with the insides of `if`, `try`, `with` and loops."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _top_level(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _top_level(handler.body)


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _facts(definition: ast.ClassDef) -> ClassFacts:
    literals: dict[str, str] = {}
    for statement in definition.body:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            literals |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    docstring = ast.get_docstring(definition)
    return ClassFacts(
        summary=docstring.strip().splitlines()[0] if docstring and docstring.strip() else None,
        requires_api=literals.get("requires_api"),
        requires_trl=literals.get("requires_trl"),
    )
