"""Functions named by text, in configs and on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ext.errors import ConfigurationError


def load_function(reference: str, setting: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names; an attribute of one too.

    Modules are looked for beside the installed ones in the working folder, as `python -m` does.

    Args:
        reference: The text.
        setting: Where it stands, for the message: "--reward".

    Raises:
        ConfigurationError: The text is not of this form, or there is no such module, file or function, or it fails.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise ConfigurationError(f"{setting} {reference!r} is not of the form module:function or file.py:function")
    try:
        value: Any = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source)
        for part in name.split("."):
            value = getattr(value, part)
    except Exception as error:  # the module is the user's, and may raise anything
        said = " ".join(str(error).split())
        raise ConfigurationError(f"{setting} {reference!r} cannot be loaded: {type(error).__name__}: {said}") from None
    if not callable(value):
        raise ConfigurationError(f"{setting} {reference!r} is a {type(value).__name__} and no function")
    return value


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    # A name of its own in `sys.modules`, where dataclasses and pickle look a module up: a file may be called json.py.
    name = f"{path.stem}_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _load_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
