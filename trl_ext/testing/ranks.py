"""Several real ranks in a test: processes on the CPU, connected by gloo.

Importing TRL takes longer than a tiny training, so ranks are forks of one server, which has imported it once for the
whole session. A rank is a new process each time: what one test leaves behind, no other meets.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch.distributed as dist

GRACE = 10.0
"""Seconds that the other ranks have to end by themselves once one has failed."""
_ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def why_not() -> str | None:
    """Why this machine cannot run several ranks; None where it can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "this system has no server of forks"
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this PyTorch was built without gloo"
    return None


class RanksError(AssertionError):
    """A rank failed, or did not end in time; the message holds what each of them printed.

    Its cause is the exception of the first rank that raised one, where that can be sent to another process.
    """


@dataclass(frozen=True)
class Ended:
    """How one rank has ended."""

    code: int
    """The exit code, negative for a signal."""
    output: str
    """What it wrote to stdout and stderr."""
    result: Any = None
    """What the function returned, or the exception that it raised."""

    def __str__(self) -> str:
        error = f"{type(self.result).__name__}: {self.result}\n" if isinstance(self.result, Exception) else ""
        return f"{error}exit code {self.code}\n{self.output[-4000:]}"


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2, **limits: Any) -> list[Any]:
    """Call a function on each of several ranks at once, and give what each returned, in the order of the ranks.

    Args:
        function: one that pickle can send: of a module, not inside of another function.
        *arguments: what to call it with on every rank; pickle has to be able to send them too.
        ranks: how many.
        **limits: as for `end_of_ranks`.

    Raises:
        RanksError: a rank raised, was killed, or did not end in time.
    """
    ended = end_of_ranks(function, *arguments, ranks=ranks, **limits)
    if any(rank.code for rank in ended):
        said = "\n".join(f"-- rank {i}: {rank}" for i, rank in enumerate(ended))
        cause = next((rank.result for rank in ended if isinstance(rank.result, Exception)), None)
        raise RanksError(f"{getattr(function, '__name__', function)} failed on {ranks} ranks\n{said}") from cause
    return [rank.result for rank in ended]


def end_of_ranks(
    function: Callable[..., Any], *arguments: Any, ranks: int = 2, limit: float = 420.0, patience: float = 60.0
) -> list[Ended]:
    """Call a function on each of several ranks at once, and give how each has ended.

    Args:
        function: as for `on_ranks`.
        *arguments: as for `on_ranks`.
        ranks: how many.
        limit: seconds after which ranks are killed.
        patience: seconds that a rank waits for another one in a collective before it raises.
    """
    payload, modules = _packed((function, arguments))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = _Call(Path(folder), payload, modules, dict(os.environ), ranks, patience)
        processes = [_context().Process(target=call.run, args=(rank,), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        return [call.ended(rank, code) for rank, code in enumerate(_wait(processes, limit))]


@dataclass(frozen=True)
class _Call:
    """What a rank is started with."""

    folder: Path
    payload: bytes
    modules: Mapping[str, str]
    environment: Mapping[str, str]
    """That of the test; the server has the one of when it was started."""
    ranks: int
    patience: float

    def run(self, rank: int) -> None:
        """Be this rank; its process ends with it."""
        self._redirect(rank)
        tempfile.tempdir = str(self.folder)  # goes with the folder, since this process ends without cleaning up
        os.environ.clear()
        os.environ.update(self.environment)
        os.environ.update(_ALONE, RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{self.ranks}")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks for them, and uses neither
        try:
            result, code = self._call(rank), 0
        except Exception as error:
            traceback.print_exc()
            result, code = error, 1
        with suppress(Exception):  # an exception that pickle cannot send, either way, has been printed
            sent = pickle.dumps(result)
            pickle.loads(sent)
            (self.folder / f"{rank}.pickle").write_bytes(sent)
        if code == 0 and dist.is_initialized():  # the function may have taken it down
            with suppress(RuntimeError):  # another rank has failed, which is reported there
                dist.barrier()
        sys.exit(code)

    def _call(self, rank: int) -> Any:
        store = f"file://{self.folder / 'store'}"
        patience = timedelta(seconds=self.patience)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self.ranks, timeout=patience)
        _import(self.modules)
        function, arguments = pickle.loads(self.payload)
        result = function(*arguments)
        pickle.dumps(result)  # what cannot be sent back fails here, with the traceback of this rank
        return result

    def _redirect(self, rank: int) -> None:
        log = os.open(self.folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)

    def ended(self, rank: int, code: int) -> Ended:
        """What a rank has left behind."""
        log, result = self.folder / f"{rank}.log", self.folder / f"{rank}.pickle"
        output = log.read_text(errors="replace") if log.exists() else ""
        return Ended(code, output, pickle.loads(result.read_bytes()) if result.exists() else None)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "trl_ext.trainers", "trl_ext.testing.runs", "peft"])
    with _environment(_ALONE):  # a fork cannot use a GPU that its parent has looked at
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait(processes: Sequence[Any], limit: float) -> list[int]:
    """The exit codes once all have ended; those that outlive the limit, or a failure by the grace, are killed."""
    deadline = time.monotonic() + limit
    while running := [process for process in processes if process.is_alive()]:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE)
        if not connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
            for process in running:
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


class _Pickler(pickle.Pickler):
    """Notes which modules the functions and classes of an object come from."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | FunctionType):
            self.modules.add(thing.__module__)
        return NotImplemented


def _packed(thing: Any) -> tuple[bytes, dict[str, str]]:
    """An object as bytes, and the files of the modules that it needs: pytest imports tests from where they lie."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(thing)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"cannot be sent to other ranks: {error}; define classes and functions at the top of a module, and make "
            "what cannot be pickled inside of them"
        ) from error
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in pickler.modules}
    return file.getvalue(), {name: path for name, path in files.items() if path}


def _import(modules: Mapping[str, str]) -> None:
    """Import modules under their names from their files, where the name alone would not find them."""
    for name, path in modules.items():
        if name in sys.modules:
            continue
        with suppress(ImportError, ValueError):
            found = importlib.util.find_spec(name)
            if found is not None and found.origin == path:
                continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python module")
        for place in [i for i, letter in enumerate(name) if letter == "."]:  # pickle imports what it lies in first
            sys.modules.setdefault(name[:place], ModuleType(name[:place]))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
