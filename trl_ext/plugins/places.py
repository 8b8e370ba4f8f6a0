"""Python code by its place, `path/file.py` or `package.module`: naming one runs it.

Plugins are named so without an installation, and so are the reward functions and metrics of the probes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
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
        module = load_module(place)
    except (Exception, SystemExit) as error:  # what is imported may raise anything, and the message names the place
        raise ConfigurationError(
            f"plugins: [{name}]: importing {place!r} raised {type(error).__name__}: {error}. Repair or remove it"
        ) from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise ConfigurationError(f"plugins: [{name}]: {place} does not define {attribute!r}. {hint}".rstrip())
    return getattr(module, attribute), _digest(module)


def load_module(place: str) -> ModuleType:
    """Run a file as a module of its own, or import a module.

    A file runs anew each time, so that an edited one counts in a notebook. Its module's name is made of the path as
    written: a checkpoint keeps it, and other machines have other working directories. Modules are those that Python
    finds, and then those of the working directory, as for TRL's reward functions.

    Args:
        place: `path/file.py`, from the working directory on, or `package.module`.

    Raises:
        FileNotFoundError: There is no such file. What the code raises passes through, and leaves no module behind.
    """
    if place.endswith(".py"):
        return _execute(Path(place).expanduser(), place)
    if not {str(Path.cwd()), ""} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(place)


class _FromSource(SourceFileLoader):
    """Never takes the byte code of an earlier run, which Python tells from an edited file by second and size alone."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(file: Path, place: str) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} in {str(Path.cwd())!r}")
    # The digest keeps apart what differs in signs that a name cannot have: a-b.py and a_b.py.
    name = f"file_{re.sub(r'[^0-9A-Za-z]', '_', file.stem)}_{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    loader = _FromSource(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module  # where dataclasses look annotations up, and pickle looks for classes
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _digest(module: ModuleType) -> str:
    source = inspect.getsourcefile(module)
    return f"sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:8]}" if source else "of unknown version"
