"""Jobs: what is run, at the same time, again or not, and what becomes of the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trl_ext.errors import ConfigurationError
from trl_ext.jobs import Job, Outcome, Pool
from trl_ext.jobs.job import LOG

WORKS = '''
import atexit, json, os, signal, subprocess, sys, time, traceback
from pathlib import Path

def double(number, note=None):
    print("doubling", number)
    if note:
        with open(note, "a") as file:
            file.write(f"{number}\\n")
    return {"double": 2 * number, "device": os.environ.get("CUDA_VISIBLE_DEVICES")}

def meet(own, other):
    """Ends when the other one has begun too, and gives its device."""
    Path(own).touch()
    for _ in range(600):
        if Path(other).exists():
            return os.environ["CUDA_VISIBLE_DEVICES"]
        time.sleep(0.05)
    raise TimeoutError(f"{other} never began")

def fail():
    raise ValueError("no such luck")

def leave(code):
    sys.exit(code)

def fail_noisily(last):
    """As an interpreter does whose libraries have something to say at its end."""
    atexit.register(print, "nanobind: leaked 4 instances!\\nSee https://nanobind.readthedocs.io", file=sys.stderr)
    if last == "a launcher's":
        print("out of memory")
        sys.exit(3)
    print("trl-ext: 3 of 8, 2.1/s", file=sys.stderr)
    if last == "killed":
        print("step 7", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        raise KeyError("first")
    except KeyError as error:
        if last == "error":
            raise ValueError("then\\nand more") from error
        if last == "rank":
            for line in ("Traceback (most recent call last):", "  File x", "OSError: full"):
                print("[rank1]:", line, file=sys.stderr)
        if last == "exit":
            sys.exit("no model")
        if last == "command":
            traceback.print_exc()
            print("trl-ext: no file x.yaml", file=sys.stderr)
        sys.exit(2)

def linger(mark):
    tied = "from trl_ext.jobs import tie_where_asked as tie; import time; tie(); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    rank = subprocess.Popen([sys.executable, "-c", tied], start_new_session=True, stdout=subprocess.PIPE)
    rank.stdout.readline()
    Path(mark).write_text(f"{os.getpid()} {rank.pid} {child.pid}")
    time.sleep(600)
'''


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "works_of_jobs.py").write_text(WORKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    import works_of_jobs

    yield works_of_jobs
    del sys.modules["works_of_jobs"]


def run_jobs(chains: Any, **options: Any) -> list[Outcome]:
    """No job here needs torch, whose import takes seconds."""
    with Pool(preload=("json",)) as pool:
        return list(pool.run(chains, **options))


def job(folder: Path, function: Any, depends_on: Any = (), **arguments: Any) -> Job:
    return Job(folder.name, folder, function, arguments, {"on": depends_on})


def test_results_come_back_and_what_is_finished_is_not_run_again(tmp_path: Path, works: Any) -> None:
    note = tmp_path / "note"
    chains = [[job(tmp_path / f"j{n}", works.double, number=n, note=note)] for n in (1, 2)]
    for _ in range(2):
        outcomes = run_jobs(chains)
        assert [outcome.result["double"] for outcome in outcomes] == [2, 4]
    assert note.read_text() == "1\n2\n"
    assert "doubling 1" in (tmp_path / "j1" / LOG).read_text()


def test_other_dependencies_are_refused_by_name_before_anything_runs(tmp_path: Path, works: Any) -> None:
    run_jobs([[job(tmp_path / "old", works.double, depends_on=(1, tmp_path), number=1)]])
    chains = [[job(tmp_path / "new", works.double, number=2)], [job(tmp_path / "old", works.double, 2, number=1)]]
    with pytest.raises(ConfigurationError, match=r"old was made with other settings \(on\); move it away"):
        run_jobs(chains)
    assert not (tmp_path / "new").exists()
    # As JSON reads it back, it is the same.
    (again,) = run_jobs([[job(tmp_path / "old", works.double, (1, tmp_path), number=1)]])
    assert again.result


def test_what_no_job_has_made_is_not_removed(tmp_path: Path, works: Any) -> None:
    """`trl-ext demo --output-dir .`, where the folder `base` holds a model of the user's."""
    own = job(tmp_path / "base", works.double, number=1)
    own.forget()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    with pytest.raises(ConfigurationError, match="no job has made it; choose another output"):
        own.forget()
    assert (tmp_path / "base" / "config.json").exists()
    run_jobs([[job(tmp_path / "made", works.double, number=1)]])
    job(tmp_path / "made", works.double, number=1).forget()
    assert not (tmp_path / "made").exists()


def test_jobs_run_at_the_same_time_and_take_devices_in_turn(tmp_path: Path, works: Any) -> None:
    marks = [tmp_path / "a", tmp_path / "b"]
    chains = [
        [job(tmp_path / f"meet{i}", works.meet, own=marks[i], other=marks[1 - i]),
         job(tmp_path / f"then{i}", works.double, number=i)]
        for i in range(2)
    ]  # fmt: skip
    outcomes = run_jobs(chains, at_once=2, devices=("5", "7"))
    assert [outcome.error for outcome in outcomes] == [""] * 4
    assert sorted(o.result for o in outcomes if o.job.name.startswith("meet")) == ["5", "7"]
    assert {o.result["device"] for o in outcomes if o.job.name.startswith("then")} <= {"5", "7"}


def test_a_failure_ends_its_chain_alone_and_says_why_in_one_line(tmp_path: Path, works: Any) -> None:
    chains = [
        [job(tmp_path / "bad", works.fail), job(tmp_path / "after", works.double, number=1)],
        [job(tmp_path / "left", works.leave, code=3)],
        [job(tmp_path / "good", works.double, number=2)],
    ]
    outcomes = {outcome.job.name: outcome for outcome in run_jobs(chains)}
    assert list(outcomes) == ["bad", "left", "good"]
    assert outcomes["bad"].error == (f"bad ended with exit code 1: ValueError: no such luck ({tmp_path / 'bad' / LOG})")
    assert "exit code 3: it printed nothing" in outcomes["left"].error
    assert outcomes["good"].result["double"] == 4
    # A failed job is started again.
    assert [outcome.job.name for outcome in run_jobs(chains[:1])] == ["bad"]


REASONS = {
    "error": "error ended with exit code 1: ValueError: then",
    "exit": "exit ended with exit code 1: no model",
    "a launcher's": "a launcher's ended with exit code 3: out of memory",
    "rank": "rank ended with exit code 2: OSError: full",
    "command": "command ended with exit code 2: no file x.yaml",
    "killed": "killed was killed by signal 9: step 7",
}


def test_the_reason_is_the_error_and_not_what_libraries_print_at_the_end(tmp_path: Path, works: Any) -> None:
    chains = [[job(tmp_path / last, works.fail_noisily, last=last)] for last in REASONS]
    found = {outcome.job.name: outcome.error for outcome in run_jobs(chains)}
    assert {last: error.partition(f" ({tmp_path}")[0] for last, error in found.items()} == REASONS


def test_the_reason_is_that_of_the_last_attempt(tmp_path: Path, works: Any) -> None:
    run_jobs([[job(tmp_path / "again", works.fail)]])
    (outcome,) = run_jobs([[job(tmp_path / "again", works.leave, code=3)]])
    assert "exit code 3: it printed nothing" in outcome.error


def test_after_the_time_is_up_no_job_starts_and_finished_ones_are_still_told(tmp_path: Path, works: Any) -> None:
    chains = [[job(tmp_path / f"j{n}", works.double, number=n)] for n in range(2)]
    run_jobs(chains[1:])
    outcomes = run_jobs(chains, until=time.monotonic() - 1)
    assert [outcome.result["double"] for outcome in outcomes] == [2]
    assert not (tmp_path / "j0").exists()


@pytest.mark.parametrize("preload", ["json", ""], ids=["forked", "fresh"])
@pytest.mark.parametrize("how", ["asker killed", "SIGTERM", "SIGHUP", "worker killed"])
def test_a_killed_asker_takes_its_jobs_along(tmp_path: Path, works: Any, preload: str, how: str) -> None:
    """With whatever they have started: a training that nobody waits for would hold the memory of its device.

    `timeout` and a terminal that closes send their signal to the asker's whole group, the process that starts jobs
    included. A launcher gives its ranks sessions of their own.
    """
    script = f"""
import works_of_jobs
from pathlib import Path
from trl_ext.jobs import Job, Outcome, Pool
job = Job("x", Path({str(tmp_path)!r}) / "job", works_of_jobs.linger, {{"mark": {str(tmp_path / "mark")!r}}})
with Pool({tuple(filter(None, [preload]))!r}) as pool:
    list(pool.run([[job]]))
"""
    asker = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=subprocess.DEVNULL)
    mark = tmp_path / "mark"
    while not mark.exists() or len(mark.read_text().split()) < 3:
        assert asker.poll() is None
        time.sleep(0.05)
    job, rank, child = map(int, mark.read_text().split())
    if how.startswith("SIG"):
        os.killpg(asker.pid, getattr(signal, how))
    elif how == "worker killed":
        if sys.platform != "linux":
            pytest.skip("no other system ends processes with their parents")
        os.kill(_parent(job), signal.SIGKILL)
    else:
        asker.send_signal(signal.SIGKILL)
    left = {job, rank, child}
    if (
        how == "worker killed"
    ):  # nobody ends the groups of jobs; what a job has started is tied to it, or its own affair
        left.remove(child)
    deadline = time.monotonic() + 60
    while any(map(_is_alive, left)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    asker.wait(60)
    if _is_alive(child):
        os.kill(child, signal.SIGKILL)
    assert json.loads((tmp_path / "job" / "job.json").read_text())["function"] == "works_of_jobs:linger"


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(") ")[2][0] != "Z"
