"""Which releases the fast tests ran on: a session of nox adds its row to docs/results/raw/compatibility.json.

python docs/compatibility.py add SESSION JUNIT.xml    # a row, for the environment that runs it
python docs/compatibility.py                          # docs/compatibility.md
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
libraries. A row is one session of `nox` at one commit; `noxfile.py` says what each session installs.

"""


def outcome(junit: Path) -> dict[str, Any]:
    """Counts of a report of pytest's, and the tests that failed."""
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None, f"{junit} is no report of pytest's"
    failed = [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped", 0))
    return {"passed": int(suite.get("tests", 0)) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def add(session: str, junit: Path) -> None:
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
        **outcome(junit),
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
    notes = [
        f"- `{session}`: " + ", ".join(f"`{name}`" for name in row["failed"])
        for session, row in rows.items()
        if row["failed"]
    ]
    failures = "\n\n## What failed\n\n" + "\n".join(notes) if notes else ""
    return f"{INTRODUCTION}{_table(heads, lines)}{failures}\n"


def main() -> None:
    """Add a row where one is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add")
    adding.add_argument("session")
    adding.add_argument("junit", type=Path)
    given = parser.parse_args()
    if given.command == "add":
        add(given.session, given.junit)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
