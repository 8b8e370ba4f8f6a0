"""`trl-ext probe passk` on GSM8K: one process, two, killed in the middle, and behind a real server that is killed.

The data is the folder that TRL_EXT_GSM8K names, or shared/data/gsm8k beside the repository: test.jsonl of
github.com/openai/grade-school-math. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interruption import lines_of, results_of
from real_server import NEEDS_SERVING, Served

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

BESIDE = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k"
DATA = Path(os.environ.get("TRL_EXT_GSM8K", BESIDE)) / "test.jsonl"
PROBLEMS, SAMPLES = 20, 4
LONGEST = 500  # seconds of a run, on a machine with much else to do

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * LONGEST),
    pytest.mark.skipif(not DATA.is_file(), reason="GSM8K is not here"),
]


class Run:
    """A command `trl-ext probe passk`, in one process or several, with its output in `folder`."""

    def __init__(self, folder: Path, processes: int, *options: str) -> None:
        self.folder = folder
        program = ["-m", "trl_ext"]
        if processes > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "--"]
            program.append("trl_ext")
        columns = ["--columns", "question=prompt", "--reward", "trl_ext_probing.answers:exact_answer"]
        counts = ["--limit", str(PROBLEMS), "--n", str(SAMPLES), "--k", "1,4", "--max-completion-length", "12"]
        data = ["--dataset", str(DATA), *columns, *counts, "--output", str(folder)]
        self.command = [sys.executable, *program, "probe", "passk", *data, *options]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(self.command, env=environment, stderr=subprocess.PIPE, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes] | None = None) -> None:
        process = process or self.start()
        _, errors = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, errors.decode()[-3000:]

    def until_begun(self, process: subprocess.Popen[bytes]) -> None:
        """Until a tenth of the samples is on disk."""
        end = time.monotonic() + LONGEST
        while self.written() < PROBLEMS * SAMPLES // 10:
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < end
            time.sleep(0.01)

    def kill(self) -> None:
        """Start it, and end all its processes amid the work."""
        process = self.start()
        self.until_begun(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert self.written() < PROBLEMS * SAMPLES, "finished before it could be killed"

    def written(self) -> int:
        return sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in self.folder.glob("journal*"))

    def journal(self) -> list[str]:
        """Its lines, sorted, since the order in which samples finish is nobody's."""
        (path,) = self.folder.glob("journal*")
        lines = lines_of(path)
        assert len({(line["row"], line["sample"]) for line in lines}) == len(lines) == PROBLEMS * SAMPLES
        return sorted(map(json.dumps, lines))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tiny_llama(hidden=64), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"), 1, "--model", model, "--batch-size", "2")
    run.finish()
    return run


@pytest.mark.parametrize(("processes", "killed"), [(1, True), (2, False), (2, True)])
def test_journals_are_those_of_one_process_that_nothing_interrupts(
    model: str, whole: Run, tmp_path: Path, processes: int, killed: bool
) -> None:
    run = Run(tmp_path, processes, "--model", model, "--batch-size", "1" if processes > 1 else "2")
    if killed:
        run.kill()
    run.finish()
    assert run.journal() == whole.journal()
    assert results_of(run.folder)["models"] == results_of(whole.folder)["models"]
    assert (run.folder / "rows.csv").read_bytes() == (whole.folder / "rows.csv").read_bytes()


@NEEDS_SERVING
def test_a_run_behind_a_server_survives_the_death_of_the_server(served: Served, tmp_path: Path) -> None:
    """One request at a time: the server has one random state for all."""
    options = ("--engine", "server", "--base-url", served.url, "--model", served.model, "--batch-size", "1")
    run, expected = (Run(tmp_path / name, 1, *options) for name in ("run", "expected"))
    expected.finish()
    process = run.start()
    run.until_begun(process)
    served.kill()
    assert run.written() < PROBLEMS * SAMPLES, "finished before the server could be killed"
    served.start()
    run.finish(process)
    assert run.journal() == expected.journal()
    assert results_of(run.folder)["models"] == results_of(expected.folder)["models"]
