"""Plugins that a config names by their place: a class in a file, or in a module that Python finds."""

import os
import sys
from pathlib import Path
from textwrap import dedent
from typing import get_type_hints

import pytest
from helpers import assert_close

from trl_ext.errors import ConfigurationError
from trl_ext.plugins import activate
from trl_ext.plugins.discovery import load_plugin
from trl_ext.testing.runs import make_sft, parameters

SOURCE = dedent("""
    from __future__ import annotations

    from dataclasses import dataclass

    from trl_ext import hookimpl


    @dataclass(eq=False)
    class Focal:
        gamma: float = 2.0

        @hookimpl
        def per_token_loss(self, tokens):
            return -((1 - tokens.log_probs.exp()) ** self.gamma) * tokens.log_probs
""")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "focal.py").write_text(SOURCE)
    return tmp_path


def message_of(name: str) -> str:
    with pytest.raises(ConfigurationError) as raised:
        load_plugin(name)
    return str(raised.value)


@pytest.mark.parametrize("folder", [".", "..", "absolute"])
def test_a_class_of_a_file_is_a_plugin_with_options_and_a_name(workplace, monkeypatch, folder):
    (workplace / "below").mkdir()
    if folder == "..":
        monkeypatch.chdir(workplace / "below")
    place = workplace if folder == "absolute" else folder
    (plugin,) = activate(f"{place}/focal.py:Focal:gamma=1", trainer="sft").plugins
    assert (plugin.name, plugin.options, plugin.distribution) == ("Focal", {"gamma": 1.0}, f"{place}/focal.py")
    assert plugin.line == f"plugins: [{place}/focal.py:Focal:gamma=1]"


def test_a_class_of_a_module_is_found_where_python_finds_it_and_in_the_working_directory(workplace, site):
    site.add("other", files={"installed_pkg/deep.py": SOURCE, "installed_pkg/__init__.py": ""})
    site.modules.add("focal")
    assert load_plugin("installed_pkg.deep:Focal")[0].__module__ == "installed_pkg.deep"
    assert load_plugin("focal:Focal")[1].distribution == "focal"


def test_the_version_follows_the_source_and_the_identity_does_not(workplace):
    file = workplace / "focal.py"
    before, info = load_plugin("./focal.py:Focal")
    written = file.stat().st_mtime
    file.write_text(SOURCE.replace("2.0", "3.0"))
    os.utime(file, (written, written))  # edited within the second, and of the same size
    after, changed = load_plugin("./focal.py:Focal")
    assert (before().gamma, after().gamma) == (2.0, 3.0)
    assert info.version != changed.version
    assert after.__module__ == before.__module__, "a resumed run would take it for another plugin"


@pytest.mark.parametrize("folders", [(".", "below"), ("b.c", "b_c")])
def test_two_files_of_one_name_keep_apart(workplace, folders):
    """Also where their paths differ in signs that the name of a module cannot have."""
    other = SOURCE.replace("gamma: float", "gamma: Own") + "\n\nOwn = int\n"  # the other file has no such name
    for folder, source in zip(folders, (other, SOURCE), strict=True):
        (workplace / folder).mkdir(exist_ok=True)
        (workplace / folder / "focal.py").write_text(source)
    first, second = (load_plugin(f"./{folder}/focal.py:Focal")[0] for folder in folders)
    assert get_type_hints(first)["gamma"] is int
    assert get_type_hints(second)["gamma"] is float


def test_a_file_that_fails_leaves_the_module_that_it_was_before(workplace):
    first = load_plugin("./focal.py:Focal")[0]
    (workplace / "focal.py").write_text(SOURCE + "\nraise LookupError")
    before = dict(sys.modules)
    assert "LookupError" in message_of("./focal.py:Focal")
    assert sys.modules == before
    assert sys.modules[first.__module__].Focal is first


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("./absent.py:Focal", "", "importing './absent.py' raised FileNotFoundError: there is no file 'absent.py' in"),
        ("absent_module:Focal", "", "importing 'absent_module' raised ModuleNotFoundError"),
        ("./broken.py:Focal", "def f(:", "importing './broken.py' raised SyntaxError"),
        ("./broken.py:Focal", "raise SystemExit(0)", "importing './broken.py' raised SystemExit"),
        ("./broken.py:Focl", SOURCE, "./broken.py does not define 'Focl'. Did you mean 'Focal'"),
        ("./broken.py:dataclass", SOURCE, "'./broken.py:dataclass' is not a dataclass"),
        ("./broken.py:Focal", SOURCE.replace("gamma:", "requires_api = '7'; gamma:"), "needs plugin API >=7,<8"),
    ],
)
def test_what_is_not_there_or_no_plugin_is_said_with_its_place(workplace, name, source, expected):
    (workplace / "broken.py").write_text(source)
    assert expected in message_of(name)


def test_a_run_from_a_config_trains_with_the_file_and_records_it(workplace):
    runs = {
        name: make_sft(workplace / name, names=[spec], max_steps=1)
        for name, spec in {
            "place": "./focal.py:Focal:gamma=0",
            "plain": "nll",
        }.items()
    }
    for trainer in runs.values():
        trainer.train()
    assert_close(parameters(runs["place"]), parameters(runs["plain"]), rtol=1e-5, atol=1e-7)
    assert "./focal.py sha256:" in (workplace / "place" / "trl_ext_run.json").read_text()
