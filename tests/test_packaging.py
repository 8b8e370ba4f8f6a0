"""What the distributions say of themselves, what their archives hold, and that each of them installs alone."""

from __future__ import annotations

import email
import re
import tarfile
import tomllib
import zipfile
from typing import Any

import pytest
from fresh_environment import ROOT, FreshEnvironment
from packaging.requirements import Requirement

from trl_ext import API_VERSION, __version__

PROJECTS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))} | {"trl-ext": ROOT}
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)[^)]+\)")
each_project = pytest.mark.parametrize("name", PROJECTS)


def settings(name: str) -> dict[str, Any]:
    return tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text())


@each_project
def test_a_distribution_says_who_made_it_where_it_lives_and_what_it_is_for(name):
    project, core = settings(name)["project"], settings("trl-ext")["project"]
    assert project["name"] == name
    for field in ("license", "license-files", "authors", "classifiers", "requires-python"):
        assert project[field] == core[field]
    assert len(project["keywords"]) > 2
    assert {**project["urls"], "Documentation": ""} == {**core["urls"], "Documentation": ""}
    replacements = re.findall(r"https://[^\\]+", str(settings(name)["tool"]["hatch"]["metadata"]))
    assert replacements
    assert all(text.startswith(core["urls"]["Repository"]) for text in replacements)


@each_project
def test_a_distribution_brings_the_licence(name):
    assert (PROJECTS[name] / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@each_project
def test_a_distribution_takes_every_core_that_keeps_the_contract(name):
    if name == "trl-ext":
        return
    (core,) = [r for r in map(Requirement, settings(name)["project"]["dependencies"]) if r.name == "trl-ext"]
    major = int(API_VERSION.partition(".")[0])
    assert core.specifier.contains(__version__)
    assert core.specifier.contains(f"{major}.999")
    assert not core.specifier.contains(f"{major + 1}.0")


def readme(metadata: str) -> str:
    payload = email.message_from_string(metadata).get_payload()
    assert isinstance(payload, str)
    return payload


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """A fresh environment with all wheels at hand."""
    fresh = FreshEnvironment(tmp_path_factory.mktemp("packaging"))
    for project in PROJECTS.values():
        fresh.build(project)
    return fresh


@pytest.mark.slow
@each_project
def test_a_wheel_holds_one_package_with_its_licence_and_links_that_lead_somewhere(environment, name):
    module = name.replace("-", "_")
    (wheel,) = environment.dist.glob(f"{module}-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(f"{module}-{__version__}.dist-info/METADATA").decode()
    assert {path.split("/")[0] for path in names} == {module, f"{module}-{__version__}.dist-info"}
    assert f"{module}/py.typed" in names
    assert f"{module}-{__version__}.dist-info/licenses/LICENSE" in names
    relative = RELATIVE_LINK.findall((PROJECTS[name] / "README.md").read_text())
    assert readme(text).count(settings(name)["project"]["urls"]["Repository"]) == len(relative)
    assert not RELATIVE_LINK.findall(readme(text))


@pytest.mark.slow
def test_the_source_archive_of_the_core_holds_the_core_alone_and_builds_the_same_wheel(environment, tmp_path):
    source = environment.build(ROOT, "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    source.unlink()
    assert {path.name for path in unpacked.iterdir()} == {
        *("trl_ext", "pyproject.toml", "PKG-INFO"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", ".gitignore"),
    }
    (wheel,) = environment.dist.glob(f"trl_ext-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {path for path in archive.namelist() if path.startswith("trl_ext/")}
    assert held == {str(path.relative_to(unpacked)) for path in (unpacked / "trl_ext").rglob("*") if path.is_file()}


@pytest.mark.slow
@each_project
def test_a_distribution_installs_alone_and_its_plugins_are_usable(name, environment, tmp_path):
    alone = FreshEnvironment(tmp_path)
    for wheel in environment.dist.glob("*.whl"):
        (alone.dist / wheel.name).symlink_to(wheel)
    alone.install(name)
    assert alone.run("trl-ext", "--version", HF_HUB_OFFLINE="1").startswith(f"trl-ext {__version__}")
    plugins = settings(name)["project"].get("entry-points", {}).get("trl_ext", {})
    assert alone.run("trl-ext", "plugins", "check").splitlines() == [f"ok      {plugin}" for plugin in sorted(plugins)]
