"""The process that starts jobs, `python -m trl_ext.jobs.worker MODULE...`: it reads their files' names, a line each.

It has loaded torch and TRL, and a job is a fork of it, so that a training of seconds does not wait for imports as long
again. No torch operation ever runs in this process, so a fork has no threads to miss. Where there is an accelerator,
whose driver a fork cannot use, and where nothing is to be loaded, a job is a fresh interpreter. When its standard input
ends, whoever asked has ended, however that was, and the jobs are ended too: nobody would use what they come to. They
are tied to this process as well, which might be killed itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from trl_ext.jobs.job import FAILED, FINISHED, LOG, SAID, write_json
from trl_ext.jobs.ties import TIED, tie

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What a terminal that closes, Ctrl-C, `timeout` and the like send to whoever asked, and to this process beside it."""
POLL = 0.05
"""Seconds between two looks at the jobs."""


def main(arguments: list[str]) -> int:
    """Start what is asked for, until there is nobody to ask; in a process of a job, do it and give its exit code."""
    if arguments[:1] == ["--job"]:
        return work(Path(arguments[1]))
    for number in ENDING:  # whoever asked decides what it means; where they end, the input does
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no reply
    for module in arguments:
        import_module(module)
    gc.freeze()  # collections of a fork pass over what is loaded here
    fresh = not arguments or _has_accelerator()
    running: dict[int, str] = {}
    rest = b""
    while True:
        readable, _, _ = select.select([0], [], [], POLL if running else None)
        if readable:
            received = os.read(0, 65536)
            if not received:
                _end(running)
                return 0
            *lines, rest = (rest + received).split(b"\n")
            for line in map(bytes.decode, lines):
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    return _become(Path(line), fresh)
                with contextlib.suppress(PermissionError):  # it has done so itself, and is another program by now
                    os.setpgid(child, child)  # or `_end` could miss one that has not come so far
                running[child] = line
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                _end({child: ""})  # whatever it has started and left
                reply = {"job": running.pop(child), "code": os.waitstatus_to_exitcode(status)}
                print(json.dumps(reply), file=replies)


def work(path: Path) -> int:
    """Do a job in this process, and keep what its function gives; its exit code."""
    asked = json.loads(path.read_text())
    os.environ.update(asked["environment"])
    os.environ[TIED] = "1"
    if asked["threads"] is not None:
        import torch

        torch.set_num_threads(asked["threads"])
    module, _, name = asked["function"].partition(":")
    function: Any = import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    started = time.perf_counter()
    try:
        result = function(**asked["arguments"])
    except SystemExit as error:
        return _failed(path, f"{SAID}{error.code}" if isinstance(error.code, str) else error.code)
    except Exception:
        return _failed(path, traceback.format_exc())
    seconds = time.perf_counter() - started
    write_json(path.with_name(FINISHED), {"result": result, "seconds": seconds})
    return 0


def _failed(path: Path, reason: str | int | None) -> int:
    """Note where the log ends for the function; libraries may print more as the process ends. Gives the exit code."""
    if isinstance(reason, str):
        print(reason, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    log = path.with_name(LOG)
    write_json(path.with_name(FAILED), {"log": log.stat().st_size})
    return reason if isinstance(reason, int) else int(reason is not None)


def _become(path: Path, fresh: bool) -> int:
    """Turn the fork into the process of a job, with its output in a file and a group of processes of its own."""
    tie()
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    log = os.open(path.with_name(LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "trl_ext.jobs.worker", "--job", str(path)])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file now; a killed job keeps its lines
    return work(path)


def _has_accelerator() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.accelerator.is_available())


def _end(running: dict[int, str]) -> None:
    """Kill jobs with all that they have started: checkpoints are written to survive it."""
    for child in running:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
