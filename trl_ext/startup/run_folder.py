"""A run folder belongs to one run at a time: two would mix their checkpoints, and rotation would delete the other's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout

from trl_ext.errors import ConfigurationError
from trl_ext.startup.agreement import agreed

LOCK = "_trl_ext.lock"
"""Holds the owner's process id and host. transformers uploads no file that starts with an underscore."""


@contextmanager
def owned_run_folder(folder: Path, main_process: bool) -> Iterator[None]:
    """Keep other runs out of the folder inside the block. Collective.

    The lock of a process that is gone is taken over, where it ran on the same host: of another one nobody can tell.

    Args:
        folder: the run folder; it is made where it is missing.
        main_process: whether this rank is the one that holds the lock for all.

    Raises:
        ConfigurationError: on every rank, where another run has the folder.
    """
    lock = SoftFileLock(folder / LOCK, timeout=1)  # seconds: a stale lock may take a second try
    with agreed():
        if main_process:
            _acquire(lock, folder)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: SoftFileLock, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        pid, host, *_ = [*Path(lock.lock_file).read_text().split(), "unknown", "unknown"]
        raise ConfigurationError(
            f"output_dir: another run trains in {folder}, as process {pid} on host {host}; give this one another "
            f"output_dir. If that process is gone, remove {lock.lock_file}"
        ) from error
