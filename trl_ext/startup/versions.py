"""Whether the seams that the core stands on were reviewed in the installed releases of TRL and the rest."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from trl_ext import seams
from trl_ext.errors import ConfigurationError

logger = logging.getLogger(__name__)


def check_versions(strict: bool, main_process: bool) -> None:
    """Warn of releases that were not reviewed, once a process; with `strict` refuse them.

    Raises:
        ConfigurationError: with `strict`, naming each release and the seams that it moves.
    """
    found = unreviewed()
    if found and strict:
        raise ConfigurationError(
            f"strict_versions: {'; '.join(found)}. Install a reviewed release, or set strict_versions=False"
        )
    if main_process:
        for text in found:
            _warn_once(f"{text}. Look for a newer trl_ext, or set strict_versions=True to refuse such releases")


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def unreviewed() -> list[str]:
    """One text for each installed library whose release was not reviewed: which it is, and which seams it moves."""
    texts = []
    for library, releases in seams.recorded().items():
        try:
            installed = version(library)
        except PackageNotFoundError:  # PEFT is optional
            continue
        if installed not in releases:
            texts.append(_difference(library, installed, releases))
    return texts


def _difference(library: str, installed: str, releases: dict[str, dict[str, str]]) -> str:
    reviewed = sorted(releases, key=Version)
    before = releases[reviewed[-1]]
    listed = [seam for seam in (*seams.OVERRIDDEN, *seams.READ) if seams.library(seam) == library]
    moved = [seam for seam in listed if _fingerprint(seam) != before.get(seam, "new")]
    return (
        f"trl_ext was not reviewed with {library} {installed} (but with {', '.join(reviewed)}); of the {len(listed)} "
        f"places in it that trl_ext relies on, {len(moved)} changed since {reviewed[-1]}"
        + (f": {', '.join(moved)}" if moved else "")
    )


def _fingerprint(seam: str) -> str | None:
    """None where the seam is not there any more."""
    try:
        return seams.fingerprint(seam)
    except (AttributeError, ImportError):
        return None
