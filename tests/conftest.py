"""Fixtures shared by the tests of the core."""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `helpers`, which --import-mode=importlib would not find


def pytest_collection_finish() -> None:
    """Keep the bars of data sets out of what failing tests show."""
    import datasets

    datasets.disable_progress_bars()


class FakeSite:
    """A folder like site-packages, into which a test puts distributions of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: set[str] = set()

    def add(
        self,
        distribution: str,
        *,
        plugins: Mapping[str, str] | None = None,
        groups: Mapping[str, Mapping[str, str]] | None = None,
        files: Mapping[str, str] | None = None,
        version: str = "1.2",
        requires: tuple[str, ...] = (),
    ) -> None:
        """Install a distribution: `plugins` are entry points (name to value), `files` are sources (path to text)."""
        for path, source in (files or {}).items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(dedent(source))
            self.modules.add(Path(path).parts[0].removesuffix(".py"))
        info = self.root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}", "Summary: A distribution"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n")
        text = ""
        for group, entries in {"trl_ext": plugins or {}, **(groups or {})}.items():
            text += f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        (info / "entry_points.txt").write_text(text)


@pytest.fixture(scope="session")
def new_site() -> type[FakeSite]:
    """Makes a `FakeSite` of a folder, for commands in processes of their own."""
    return FakeSite


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSite]:
    """An empty `FakeSite` on `sys.path`; what was imported from it is forgotten afterwards."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    fake = FakeSite(root)
    yield fake
    for name in [name for name in sys.modules if name.split(".")[0] in fake.modules]:
        del sys.modules[name]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo afterwards what a command does to its process, so that it can be tried in this one (loading TRL is slow)."""
    from trl_ext.cli.patching import PLACES

    for name, places in PLACES.items():
        for place in places:
            module = import_module(place)
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TRL_EXT_PLUGINS", "")
    monkeypatch.delenv("TRL_EXT_PLUGINS")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone, in which the names that the documents use mean something small."""
    from documents import MODEL, ROOT

    from trl_ext.testing import save_model, tiny_qwen2, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    save_model(tiny_qwen2(), tiny_tokenizer(), tmp_path / MODEL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path
