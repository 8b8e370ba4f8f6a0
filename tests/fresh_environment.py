"""An environment with the third-party packages of this one and nothing of the repository, made without a download."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("trl_ext", "_editable_impl_trl_ext", "__editable__")


class FreshEnvironment:
    """A virtual environment in a folder; `dist` holds the wheels that `install` may choose from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dist = folder, folder / "dist"
        self.dist.mkdir(parents=True)
        venv.create(folder / "env", with_pip=False)
        self.bin = folder / "env" / "bin"
        third_party = folder / "third_party" / "site-packages"  # dill takes a library by this name for one
        _link_third_party(third_party)
        (packages,) = (folder / "env").glob("lib/python*/site-packages")
        (packages / "third_party.pth").write_text(f"{third_party}\n")

    def build(self, project: Path, target: str = "wheel") -> Path:
        """Build a project's wheel or sdist into `dist`, with the build back end of this environment."""
        before = set(self.dist.iterdir())
        run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(self.dist)], cwd=project)
        (built,) = set(self.dist.iterdir()) - before
        return built

    def install(self, *wanted: str) -> None:
        """Install distributions by name or path, with what they require of `dist`."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--disable-pip-version-check"]
        run([*pip, "install", "--quiet", "--no-index", "--find-links", str(self.dist), *wanted], cwd=self.folder)

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of the environment, and give what it prints.

        Raises:
            AssertionError: It fails; the message is its output.
        """
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return run([*command], cwd=cwd or self.folder, PATH=path, **variables)


def run(command: list[str], cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _link_third_party(folder: Path) -> None:
    """Link all that is installed here but the repository's own distributions; `.pth` files would bring them back."""
    folder.mkdir(parents=True)
    for packages in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for entry in packages.iterdir():
            target = folder / entry.name
            if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not target.exists():
                target.symlink_to(entry)
