"""Which releases the fast tests ran on: a session of nox adds its row to docs/results/raw/compatibility.json.

python docs/compatibility.py add SESSION JUNIT.xml [ALONE.xml]    # a row, for the environment that runs it
python docs/compatibility.py failed JUNIT.xml                     # the tests to run again alone, as pytest takes them
python docs/compatibility.py                                      # docs/compatibility.md
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import xml.etree.ElementTree as ET
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from generated import DOCS, _table

PAGE = DOCS / "compatibility.md"
ROWS = DOCS / "results" / "raw" / "compatibility.json"
LIBRARIES = ("trl", "transformers", "accelerate", "peft", "torch", "datasets")
INTRODUCTION = """\
# Compatibility

<!-- Written by docs/compatibility.py from docs/results/raw/compatibility.json, which sessions of nox add to. -->

What the fast tests (`make test`) of the core and of all distributions gave on other versions of Python and of the
libraries. A row is one session of `nox` at one commit; `noxfile.py` says what each session installs. What fails runs
once more, alone, since a busy machine makes tests run into their time limits: what passes then counts as passed, and
is named below the table. The session `below` shows why the bound on transformers is where it is: a release earlier, the
trainers' configs have no `activation_checkpointing`, and sharded models train wrongly.

"""


def outcome(junit: Path, alone: Path | None = None) -> dict[str, Any]:
    """Counts of a report of pytest's and the tests that failed; `alone`: a report of those, run again."""
    failed = set(_failed(junit))
    still = failed if alone is None else set(_failed(alone))
    suite = _suite(junit)
    skipped = int(suite.get("skipped", 0))
    counts = {"passed": int(suite.get("tests", 0)) - len(still) - skipped, "skipped": skipped}
    return counts | {"failed": sorted(map(_short, still)), "passed alone": sorted(map(_short, failed - still))}


def _suite(junit: Path) -> ET.Element:
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None, f"{junit} is no report of pytest's"
    return suite


def _failed(junit: Path) -> list[tuple[str, str]]:
    """The tests that failed: the dotted path of the module or class, and the name."""
    return [
        (case.get("classname", ""), case.get("name", ""))
        for case in _suite(junit).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def _short(test: tuple[str, str]) -> str:
    return f"{test[0].rpartition('.')[2]}::{test[1]}"


def node_ids(junit: Path) -> list[str]:
    """What pytest takes to run the failed tests again."""
    tests = []
    for where, name in _failed(junit):
        if not where:  # a module that could not be loaded
            tests.append(f"{name.replace('.', '/')}.py")
            continue
        module, _, rest = where.partition(".Test")
        tests.append(f"{module.replace('.', '/')}.py::{f'Test{rest}::' if rest else ''}{name}")
    return tests


def add(session: str, junit: Path, alone: Path | None) -> None:
    """Put the row of a session, for the environment that runs this, in place of its earlier one."""
    rows = json.loads(ROWS.read_text()) if ROWS.is_file() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=DOCS, check=True
    )
    rows[session] = {
        "date": str(date.today()),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {library: _installed(library) for library in LIBRARIES},
        **outcome(junit, alone),
    }
    ROWS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def _installed(library: str) -> str:
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return "-"


def page() -> str:
    """The page, from the rows."""
    rows = json.loads(ROWS.read_text())
    heads = ("session", "Python", *LIBRARIES, "passed", "failed", "skipped", "date", "commit")
    lines = [
        (
            f"`{session}`",
            row["python"],
            *(row["versions"][library] for library in LIBRARIES),
            *(row["passed"], len(row["failed"]), row["skipped"], row["date"], f"`{row['commit']}`"),
        )
        for session, row in rows.items()
    ]
    failures = _named(rows, "failed", "What failed") + _named(rows, "passed alone", "What passed only alone")
    return f"{INTRODUCTION}{_table(heads, lines)}{failures}\n"


def _named(rows: dict[str, Any], kind: str, heading: str) -> str:
    """A section with the tests of a kind, for the sessions that have any."""
    notes = [f"- `{session}`: {_some(row[kind])}" for session, row in rows.items() if row[kind]]
    return f"\n\n## {heading}\n\n" + "\n".join(notes) if notes else ""


def _some(names: list[str]) -> str:
    """The tests by name, unless they are too many to be read."""
    if len(names) > 20:
        return f"{len(names)} tests of {len({name.partition('::')[0] for name in names})} modules"
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Add a row where one is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add")
    adding.add_argument("session")
    adding.add_argument("junit", type=Path)
    adding.add_argument("alone", type=Path, nargs="?", help="the report of what had failed, run again")
    commands.add_parser("failed").add_argument("junit", type=Path)
    given = parser.parse_args()
    if given.command == "add":
        add(given.session, given.junit, given.alone)
    if given.command == "failed":
        for test in node_ids(given.junit):
            print(test)
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
