"""Sessions on the versions that the metadata allows: `nox -s tests lowest`, `nox -s below canary`, `nox -s lint types`.

A session that runs the tests adds its row to docs/compatibility.md.
"""

import re
import tomllib
from functools import partial
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
EDITABLE = [argument for path in PLUGINS for argument in ("-e", str(path))]
FAST = ("-m", "not slow and not gpu", "-n", "2", "--dist", "worksteal")
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # as in the Makefile

nox.options.sessions = ["tests", "lowest", "lint", "types"]
nox.options.default_venv_backend = "venv"


def lower_bounds() -> list[str]:
    """Give `name==lowest` for every dependency of the core and of the plugins that states a lower bound."""
    projects = [tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in (ROOT, *PLUGINS)]
    requirements = [Requirement(text) for project in projects for text in project["dependencies"]]
    requirements += map(Requirement, projects[0]["optional-dependencies"]["peft"])
    lowest: dict[str, str] = {}
    for requirement in requirements:
        for bound in requirement.specifier:
            if bound.operator == ">=" and not requirement.name.startswith("trl-ext"):
                lowest[requirement.name] = max(lowest.get(requirement.name, ""), bound.version, key=_version)
    return [f"{name}=={version}" for name, version in lowest.items()]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")) if text else ()


def pinned_torch() -> str:
    """The torch of constraints.txt: a free one may be several GB of CUDA libraries."""
    return next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def run_tests(session: nox.Session, *pins: str, forced: tuple[str, ...] = (), go_on: bool = False) -> None:
    """Run the fast tests on what resolves with the pins, what fails once more alone, and note the outcome.

    More than 50 failures are not run again: no busy machine accounts for so many.
    """
    session.install("-e", ".[dev]", *EDITABLE, *pins)
    if forced:
        session.install("--no-deps", *forced)
    folder = Path(session.create_tmp())
    report, alone = folder / "junit.xml", folder / "alone.xml"
    pytest = partial(session.run, "python", "-m", "pytest", env=OFFLINE, success_codes=[0, 1])  # 1: tests failed
    pytest(*FAST, f"--junitxml={report}", *session.posargs)
    reports = [report]
    failed = str(session.run("python", "docs/compatibility.py", "failed", str(report), silent=True) or "").splitlines()
    if 0 < len(failed) <= 50:
        pytest(*failed, f"--junitxml={alone}")
        reports.append(alone)
    session.run("python", "docs/compatibility.py", "add", session.name, *map(str, reports))
    if failed and not go_on and re.search(r'(failures|errors)="[1-9]', reports[-1].read_text()):
        session.error(f"tests failed; see {reports[-1]}")


@nox.session
@nox.parametrize(
    "python,torch",
    [("3.11", pinned_torch()), ("3.12", "torch==2.14.1"), ("3.13", "torch==2.15.0")],
    ids=["pinned-torch", "torch-2.14", "torch-2.15"],
)
def tests(session: nox.Session, torch: str) -> None:
    """Run the fast tests on each Python with a torch of its own, all else as new as it resolves."""
    run_tests(session, torch)


@nox.session(python="3.11", venv_backend="uv|venv")
def lowest(session: nox.Session) -> None:
    """Run the fast tests with every direct dependency at its lower bound.

    pip tries hundreds of releases of openai and others before it comes to those that go with the bounds; where uv is
    on the path, it takes a minute.
    """
    run_tests(session, *lower_bounds(), pinned_torch())


@nox.session(python="3.11")
def below(session: nox.Session) -> None:
    """Run the fast tests on the last transformers below its bound, which shows what the bound keeps out."""
    run_tests(session, pinned_torch(), forced=("transformers==5.22.2",), go_on=True)


@nox.session(python="3.13")
def canary(session: nox.Session) -> None:
    """Run the fast tests on the newest of everything, pre-releases too, and show which seams moved."""
    run_tests(session, "--pre", "--upgrade", go_on=True)
    for library in ("trl", "transformers", "accelerate", "peft"):
        session.run("python", "tests/moved_seams.py", library)


@nox.session(python="3.11")
def deepspeed(session: nox.Session) -> None:
    """Run ZeRO on two CPU ranks; DeepSpeed is in no other environment, and is built without its compiled operators."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", *EDITABLE)
    session.install("deepspeed>=0.19,<0.20", env={"DS_BUILD_OPS": "0"})  # what is read of it is none of its interface
    env = {"DS_ACCELERATOR": "cpu", **OFFLINE}
    session.run("python", "-m", "pytest", "tests/test_deepspeed.py", *session.posargs, env=env)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, formatting, and which module imports which."""
    session.install("-c", "constraints.txt", "ruff", "import-linter")
    session.install("--no-deps", "-e", ".", *EDITABLE)  # import-linter reads the sources; nothing is imported
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session(python="3.11")
def types(session: nox.Session) -> None:
    """Check the types of the core and of every plugin."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", *EDITABLE)
    session.run("mypy", "trl_ext", *(str(source) for path in PLUGINS for source in (path / "src").iterdir()))
