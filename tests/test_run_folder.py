"""A run folder has one run at a time, and nothing of a run is written beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from filelock import SoftFileLock
from helpers import Idle, Plugin

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.startup.run_folder import LOCK
from trl_ext.testing.runs import make_sft


@dataclass(eq=False)
class Keeps(Plugin):
    label: str = ""

    @hookimpl
    def weights_updated(self):
        pass

    def state_dict(self):
        return {"x": 1}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("label", ["../..", "/tmp/elsewhere", "a/b", "..", "a\\b"])
def test_a_label_that_leaves_the_run_folder_is_refused(tmp_path, label):
    with pytest.raises(ConfigurationError, match=r"label=.* is not a name"):
        make_sft(tmp_path / "run", plugins=[Keeps(label)])


def test_the_second_run_in_a_folder_is_refused_with_the_owner_and_the_first_goes_on(tmp_path):
    folder = tmp_path / "run"
    found = []

    class Second(Plugin):
        @hookimpl
        def weights_updated(self, step):
            if step == 1:
                with pytest.raises(ConfigurationError, match=f"another run trains in .*as process {os.getpid()} on"):
                    make_sft(folder, plugins=[Idle()]).train()
                found.append((folder / LOCK).is_file())

    first = make_sft(folder, plugins=[Second()], max_steps=2)
    first.train()
    assert found == [True]
    assert first.state.global_step == 2
    assert not (folder / LOCK).exists()


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    script = "import filelock, os, sys; lock = filelock.SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(9)"
    done = subprocess.run([sys.executable, "-c", script, str(folder / LOCK)], check=False)
    assert done.returncode == 9
    assert (folder / LOCK).is_file()
    trainer = make_sft(folder, plugins=[Idle()], max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_run_without_plugins_takes_no_lock(tmp_path):
    with SoftFileLock(tmp_path / LOCK):
        make_sft(tmp_path, max_steps=1).train()
