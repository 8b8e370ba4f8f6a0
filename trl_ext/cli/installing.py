"""How to install a package that is missing, from what the installed distributions say of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def how_to_install(package: str) -> str:
    """The command that installs a missing package in the version that a distribution of ours asks for.

    Args:
        package: Its import name.

    Returns:
        A sentence; the command works in a clone too, where our distributions are on no index.
    """
    wanted = next(_requirements(package), package)
    return f"{package} is not installed: pip install {shlex.quote(wanted)}"


def _requirements(package: str) -> Iterator[str]:
    for distribution in metadata.distributions():
        if not canonicalize_name(distribution.metadata["Name"] or "").startswith("trl"):
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) == canonicalize_name(package):
                requirement.marker = None
                yield str(requirement)
