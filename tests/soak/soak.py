"""Kills runs at random times, resumes them, and compares every byte at the end with runs that were left alone.

    make soak ARGS="--kills 60 --seed 1"

A trial starts an SFT or GRPO run on one or two ranks (gloo, CPU), kills a rank with signal 9 at a random time, starts
the run again, which may be killed too, and lets it end. A checkpoint is saved at every step, the last one and those
amid GRPO's generation included, with a limit of two, so that about half of all kills hit a save or a rotation.
Processes are forks of this one, which has imported everything and computed nothing: a trial takes seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import file_digests
from test_resume import Counter, Mix

from trl_ext.checkpoints import newest_complete
from trl_ext.testing.runs import additions, make_grpo, make_sft, tiny_model

STEPS = 6
LIMIT = 1800  # seconds; a run takes a few, and minutes on two ranks of a busy machine


def build(kind: str, folder: Path) -> Any:
    """Objective or rollouts, an average, a stream, a counter and dropout; two micro-batches a step."""
    common: dict[str, Any] = {
        "plugins": [Mix(), Counter()],
        "streams": {"general": additions(7, seed=3)},
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "gradient_accumulation_steps": 2,
        "ddp_timeout": 60,
        "model": tiny_model(attention_dropout=0.1),
    }
    if kind == "sft":
        return make_sft(folder, names=["power:alpha=0.5", "ema:decay=0.5"], **common)
    return make_grpo(folder, names=["ema:decay=0.5"], steps_per_generation=4, num_iterations=2, **common)


def train(kind: str, folder: Path) -> None:
    """Start the run, or go on with it; then save what it deploys."""
    trainer = build(kind, folder)
    resume = newest_complete(folder)[0] is not None
    (folder.parent / "ready").touch()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder.parent / "final"))


# -- processes -------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Run some work in a child; its output goes to a file. Gives its process id."""
    child = os.fork()
    if child:
        return child
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Run:
    """The ranks of a run, each a process."""

    def __init__(self, kind: str, ranks: int, folder: Path) -> None:
        self.folder = folder
        self.statuses: dict[int, int] = {}
        """Of the ranks that have ended, by process id."""
        folder.mkdir(parents=True, exist_ok=True)
        self.ready.unlink(missing_ok=True)
        port = free_port()
        logs = [folder.parent / f"rank{rank}.log" for rank in range(ranks)]
        self.children = [fork(partial(work, kind, folder, rank, ranks, port), log) for rank, log in enumerate(logs)]

    @property
    def ready(self) -> Path:
        """A file that is there once the trainer is built."""
        return self.folder.parent / "ready"

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        for child in set(self.children) - set(self.statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.statuses[child] = status
        return [child for child in self.children if child not in self.statuses]

    def wait(self, seconds: float) -> None:
        """Until all ranks have ended, or for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.running:
            time.sleep(0.002)

    def wait_until_ready(self) -> None:
        while self.running and not self.ready.exists():
            time.sleep(0.002)

    def kill(self, children: list[int]) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)
            self.statuses[child] = os.waitpid(child, 0)[1]


def work(kind: str, folder: Path, rank: int, ranks: int, port: int) -> None:
    """What one rank does."""
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})
    train(kind, folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


# -- trials ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened to the runs of one kind."""

    seconds: float = 0.0
    """Of an uninterrupted run, from its first step on."""
    expected: dict[str, str] = field(default_factory=dict)
    trials: int = 0
    kills: int = 0
    amid_save: int = 0
    """Kills after which the newest folder was not complete."""
    too_late: int = 0
    """Times at which the run had already ended."""
    different: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def result(kind: str, folder: Path) -> dict[str, str]:
    """The digests of the last checkpoint and of the final model."""
    parts = (folder / f"checkpoint-{STEPS}", folder.parent / "final")
    found = {f"{part.name}/{name}": digest for part in parts for name, digest in file_digests(part).items()}
    if kind == "grpo":  # a run resumed amid a generation logs the numbers of its rewards at another step
        del found[f"checkpoint-{STEPS}/trainer_state.json"]
        found = {name: digest for name, digest in found.items() if not name.startswith("final/README")}
    return found


def to_the_end(kind: str, ranks: int, folder: Path) -> float:
    """Let a run end; gives the seconds from its readiness on.

    Raises:
        RuntimeError: it failed or did not end.
    """
    run = Run(kind, ranks, folder)
    run.wait_until_ready()
    begun = time.monotonic()
    run.wait(LIMIT)
    stuck = run.running
    run.kill(stuck)
    if stuck or any(run.statuses.values()):
        raise RuntimeError((folder.parent / "rank0.log").read_text()[-3000:])
    return time.monotonic() - begun


def interrupt(kind: str, ranks: int, folder: Path, chance: random.Random, tally: Tally) -> None:
    """Start a run, or go on with it, and kill one of its ranks at a random time; the others follow."""
    run = Run(kind, ranks, folder)
    run.wait_until_ready()
    run.wait(chance.uniform(0, tally.seconds))
    if not run.running:
        tally.too_late += 1
        return
    run.kill([chance.choice(run.running)])
    run.wait(chance.uniform(0, 0.2))  # a rank that is alone may get on with saving
    run.kill(run.running)
    tally.kills += 1
    tally.amid_save += bool(newest_complete(folder)[1])


def trial(kind: str, ranks: int, root: Path, chance: random.Random, tally: Tally, kills: int) -> None:
    folder = root / "run"
    for _ in range(kills):
        interrupt(kind, ranks, folder, chance, tally)
    tally.trials += 1
    try:
        to_the_end(kind, ranks, folder)
    except RuntimeError as error:
        tally.failed.append(str(error))
        return
    found = result(kind, folder)
    names = sorted(name for name in {*found, *tally.expected} if found.get(name) != tally.expected.get(name))
    tally.different += [f"{root.name}: {name}" for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which runs are killed")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to run on")
    parser.add_argument("--minutes", type=float, default=60, help="when to stop with fewer")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    chance, root = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    tallies = {(kind, ranks): Tally() for ranks in options.ranks for kind in ("sft", "grpo")}
    for (kind, ranks), tally in tallies.items():
        folder = root / f"{kind}-{ranks}" / "run"
        tally.seconds = to_the_end(kind, ranks, folder)
        tally.expected = result(kind, folder)
    number = 0
    while sum(tally.kills for tally in tallies.values()) < options.kills and time.monotonic() < until:
        (kind, ranks), tally = list(tallies.items())[number % len(tallies)]
        folder = root / f"trial-{number}"
        trial(kind, ranks, folder, chance, tally, kills=chance.choice([1, 2, 4, 6]))
        if not tally.failed and not tally.different:
            shutil.rmtree(folder)
        number += 1
        kills = sum(tally.kills for tally in tallies.values())
        print(f"trial {number} ({kind}, {ranks} ranks) is over, {kills} kills so far", flush=True)
    return report(tallies, root)


def report(tallies: dict[tuple[str, int], Tally], root: Path) -> int:
    """Print the table; 1 if any run ended differently."""
    print(f"{'run':<16}{'trials':>8}{'kills':>8}{'amid a save':>14}{'too late':>10}{'other bytes':>13}{'failed':>8}")
    for (kind, ranks), t in tallies.items():
        name = f"{kind}, {ranks} rank{'s'[: ranks - 1]}"
        numbers = f"{t.trials:>8}{t.kills:>8}{t.amid_save:>14}{t.too_late:>10}{len(t.different):>13}{len(t.failed):>8}"
        print(name.ljust(16) + numbers)
    bad = [line for t in tallies.values() for line in (*t.different, *t.failed)]
    print("\n".join(bad) or "Every run ended with the bytes of the run that was left alone.")
    if not bad:
        shutil.rmtree(root)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
