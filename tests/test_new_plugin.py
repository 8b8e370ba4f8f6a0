"""`trl-ext new-plugin`: every kind of project lints, type-checks, builds, installs and passes its own tests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from fresh_environment import ROOT, FreshEnvironment

from trl_ext.cli import run
from trl_ext.cli.new_plugin import TEMPLATE, Kind, new_plugin
from trl_ext.errors import ConfigurationError

pytest.importorskip("copier", reason="the optional extra trl-ext[new-plugin]")
KINDS = get_args(Kind)
PUBLISH = ROOT / "docs" / "publish.md"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
AUTHOR = 'Ada "Countess" O\'Lovelace'
each_kind = pytest.mark.parametrize("kind", KINDS)


def write(folder: Path, kind: str, name: str = "my-method", licence: str = "MIT") -> Path:
    new_plugin(name, kind=kind, output=folder / "project", author=AUTHOR, licence=licence)
    return folder / "project"


@each_kind
def test_a_project_is_written_whole_and_clean(kind, tmp_path):
    project = write(tmp_path, kind)
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert files == {
        *("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/tests.yml"),
        *(f"src/trl_ext_my_method/{name}" for name in ("__init__.py", "my_method.py", "py.typed")),
        "tests/test_my_method.py",
    }
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert metadata["authors"] == [{"name": AUTHOR}]
    left = [path for path in files if re.search(r"\{\{ |\{%", (project / path).read_text().replace("${{ ", ""))]
    assert not left, "what copier should have filled in"
    for check in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("licence", "expected"), [("MIT", "MIT License"), ("BSD-3-Clause", "BSD 3"), ("Apache-2.0", "Apache")]
)
def test_a_licence_is_the_one_chosen_and_names_the_author(licence, expected, tmp_path):
    text = (write(tmp_path, "objective", licence=licence) / "LICENSE").read_text()
    assert text.strip().startswith(expected)
    assert (f"Copyright (c) {AUTHOR}" in text) == (licence != "Apache-2.0")


def test_the_template_s_apache_licence_is_the_repository_s():
    assert (TEMPLATE / "licences" / "Apache-2.0.txt").read_text() == (ROOT / "LICENSE").read_text()


def test_copier_alone_writes_the_same_project(tmp_path):
    ours, copiers = write(tmp_path, "gradient"), tmp_path / "copiers"
    answers = ("name=my-method", "kind=gradient", f"author={AUTHOR}", "licence=MIT")
    data = [word for answer in answers for word in ("--data", answer)]
    command = [sys.executable, "-m", "copier", "copy", "--defaults", "--quiet", *data, str(TEMPLATE), str(copiers)]
    subprocess.run(command, check=True)
    texts = [
        {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
        for folder in (ours, copiers)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["My-Method", "my_method", "2nd", "my method", "a/b", "class", "none", "-x", "x-", ""])
def test_a_name_that_no_module_or_class_could_have_is_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match="write it as my-plugin"):
        write(tmp_path, "objective", name=name)
    assert not (tmp_path / "project").exists()


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.txt").touch()
    with pytest.raises(ConfigurationError, match="is there already"):
        write(tmp_path, "objective")
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["mine.txt"]


def test_without_copier_the_command_to_install_it_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "copier", None)
    assert run(["new-plugin", "my-method", "--kind", "probe", "--output", str(tmp_path / "project")]) == 2
    said = capsys.readouterr().err
    assert (
        said == "trl-ext: new-plugin writes its project with copier. copier is not installed: pip install 'copier>=9'\n"
    )


def test_without_a_terminal_what_has_a_default_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_plugin("my-method", kind="probe")
    text = (tmp_path / "trl-ext-my-method" / "pyproject.toml").read_text()
    assert 'license = "Apache-2.0"' in text
    assert 'name = "The trl-ext-my-method authors"' in text
    with pytest.raises(ConfigurationError, match="--kind is not given; name one of objective, grpo"):
        new_plugin("other")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the core."""
    return FreshEnvironment(tmp_path_factory.mktemp("core")).build(ROOT)


@pytest.fixture
def environment(tmp_path: Path, core: Path) -> FreshEnvironment:
    """A fresh environment with the core installed from its wheel."""
    fresh = FreshEnvironment(tmp_path / "fresh")
    fresh.install(str(core))
    return fresh


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each_kind
def test_a_project_installs_from_its_wheel_and_passes_its_own_checks(kind, tmp_path, environment):
    project = write(tmp_path, kind)
    environment.install(str(environment.build(project)))
    environment.run("python", "-m", "mypy", "--strict", cwd=project)
    environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project, **OFFLINE)
    if kind == "probe":
        assert "--model" in environment.run("trl-ext", "probe", "my-method", "--help")
    else:
        assert environment.run("trl-ext", "plugins", "check", "my-method") == "ok      my-method\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_transcript_of_the_publishing_page_runs(workplace, environment):
    text = PUBLISH.read_text().partition("## The template")[0]
    (workplace / "run.yaml").write_text(
        re.findall(r"^:caption: run.yaml\n\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    )
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    # pip takes the back end and all requirements from what is there.
    environment.run("bash", "-ec", commands, cwd=workplace, **OFFLINE, PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0")
    assert "trl-ext-my-loss 0.1.0" in (workplace / "runs" / "my-loss" / "trl_ext_run.json").read_text()
