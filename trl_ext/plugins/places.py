"""Plugins by their place: a class in a file or module, without an installation. Naming one runs the code there."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ext.errors import ConfigurationError, did_you_mean


def load_place(name: str) -> tuple[Any, str]:
    """Give what a place names, and a version: a digest of the source, which the run's record keeps.

    Args:
        name: `path/file.py:Class`, from the working directory on, or `package.module:Class`. Modules are those that
            Python finds, and then those of the working directory.

    Raises:
        ConfigurationError: It is not there, or its import fails (the original error is the cause).
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _execute(Path(place), place) if place.endswith(".py") else _import(place)
    except (Exception, SystemExit) as error:  # what is imported may raise anything, and the message names the place
        raise ConfigurationError(
            f"plugins: [{name}]: importing {place!r} raised {type(error).__name__}: {error}. Repair or remove it"
        ) from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise ConfigurationError(f"plugins: [{name}]: {place} does not define {attribute!r}. {hint}".rstrip())
    return getattr(module, attribute), _digest(module)


def _execute(file: Path, place: str) -> ModuleType:
    """Run a file as a module of its own, anew each time, so that an edited file counts in a notebook."""
    # The name is of the path as written: a checkpoint keeps it, and other machines have other working directories.
    spec = importlib.util.spec_from_file_location(f"plugin_file_{re.sub(r'[^0-9A-Za-z]', '_', place)}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} in {str(Path.cwd())!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its annotations up there
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as for TRL's reward functions; what is installed comes first
    return importlib.import_module(name)


def _digest(module: ModuleType) -> str:
    source = inspect.getsourcefile(module)
    return f"sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:8]}" if source else "of unknown version"
