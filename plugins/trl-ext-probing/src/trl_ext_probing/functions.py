"""Functions named by text, in configs and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.plugins import load_module


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
        value: Any = load_module(source)
        for part in name.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # the module is the user's, and may raise anything
        said = " ".join(str(error).split())
        raise ConfigurationError(f"{setting} {reference!r} cannot be loaded: {type(error).__name__}: {said}") from None
    if not callable(value):
        raise ConfigurationError(f"{setting} {reference!r} is a {type(value).__name__} and no function")
    return value
