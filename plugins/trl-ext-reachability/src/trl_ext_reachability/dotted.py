"""Functions named by text, in configs and on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(reference: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names; an attribute of one too.

    Modules are looked for beside the installed ones in the working folder, as `python -m` does.

    Raises:
        ValueError: the text is not of this form, or there is no such module, file or function.
    """
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(f"{reference!r} is not of the form package.module:function or path/to/file.py:function")
    module = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source, reference)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise ValueError(f"{reference!r}: {source} has no function {name!r}")
    return value


def _load_file(path: Path) -> Any:
    # A name of its own in `sys.modules`, where dataclasses and pickle look a module up: a file may be called json.py.
    name = f"{path.stem}_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no file {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _load_module(name: str, reference: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing module *inside* the named one is that module's fault, and its traceback says more.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ValueError(f"{reference!r}: there is no module {error.name!r}") from None
