"""Which plugins are found, what makes one BROKEN, and what refusing one says."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from trl_ext import API_VERSION
from trl_ext.cli.listing import list_plugins
from trl_ext.errors import ConfigurationError
from trl_ext.plugins.discovery import PluginInfo, find_distribution, load_plugin

GOOD = dedent('''
    from dataclasses import dataclass

    @dataclass(eq=False)
    class Plugin:
        """One line about it.

        More.
        """
        alpha: float = 1.0
''')
EXPLODES = "raise RuntimeError('imported')\n"


def found(name: str) -> PluginInfo:
    (info,) = [info for info in list_plugins() if info.name == name]
    return info


def error_of(name: str) -> str:
    error = found(name).error
    assert error is not None, "the plugin passes as usable"
    return error


def add_plugin(site, source: str, name: str = "fake", **options) -> None:
    site.add(
        f"trl-ext-{name}", plugins={name: f"{name}_pkg:Plugin"}, files={f"{name}_pkg/__init__.py": source}, **options
    )


def test_a_plugin_is_listed_with_its_distribution_and_first_docstring_line(site):
    add_plugin(site, GOOD)
    assert found("fake") == PluginInfo("fake", "trl-ext-fake", "1.2", "fake_pkg:Plugin", "One line about it.", None)


def test_the_distribution_s_summary_stands_in_where_a_class_has_no_docstring(site):
    add_plugin(site, "from dataclasses import dataclass\n@dataclass\nclass Plugin: pass\n")
    assert found("fake").summary == "A distribution"


def test_plugins_are_listed_by_name(site):
    for name in ("zebra", "aardvark"):
        add_plugin(site, GOOD, name)
    names = [info.name for info in list_plugins()]
    assert names == sorted(names)
    assert {"zebra", "aardvark"} <= set(names)


def test_listing_imports_no_plugin_and_no_torch(site):
    add_plugin(site, "import fake_dependency_pkg\nimport torch\n" + GOOD)
    site.add("dependency", files={"fake_dependency_pkg.py": EXPLODES})
    script = (
        "import sys; from trl_ext.cli.listing import list_plugins\n"
        "assert [i.error for i in list_plugins() if i.name == 'fake'] == [None]\n"
        "print({'fake_pkg', 'fake_dependency_pkg', 'torch', 'trl', 'typer'} & set(sys.modules) or '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(site.root)}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("files", "value", "expected"),
    [
        ({}, "absent_pkg:Plugin", "there is no module 'absent_pkg'"),
        ({"broken_pkg/__init__.py": ""}, "broken_pkg.absent:Plugin", "there is no module 'broken_pkg.absent'"),
        ({"broken_pkg/__init__.py": "x = 1\ndef f(:\n"}, "broken_pkg:Plugin", "__init__.py, line 2"),
        ({"broken_pkg/__init__.py": "x = 1\n"}, "broken_pkg:Plugin", "module 'broken_pkg' does not define 'Plugin'"),
        ({"broken_pkg/__init__.py": EXPLODES}, "broken_pkg:Plugin", "fails at line 1: raise RuntimeError('imported')"),
        (
            {"broken_pkg/__init__.py": "import no_such_thing.at_all"},
            "broken_pkg:Plugin",
            "'no_such_thing.at_all', which",
        ),
        ({"broken_pkg/__init__.py": "from .a import b"}, "broken_pkg:Plugin", "there is no module 'broken_pkg.a'"),
        (
            {"broken_pkg/__init__.py": "from .a import Plugin", "broken_pkg/a.py": "class Other: pass"},
            "broken_pkg:Plugin",
            "module 'broken_pkg.a' does not define 'Plugin'",
        ),
        (
            {"broken_pkg/__init__.py": EXPLODES, "broken_pkg/a.py": "class Plugin: pass"},
            "broken_pkg.a:Plugin",
            "importing 'broken_pkg' fails",
        ),
        ({"broken_pkg/__init__.py": "class Plugin: pass"}, "broken_pkg", "not of the form module:Class"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_import_would_stumble_over_is_found_without_importing(site, files, value, expected):
    site.add("trl-ext-broken", plugins={"broken": value}, files=files)
    assert expected in error_of("broken")
    assert not {"absent_pkg", "broken_pkg"} & set(sys.modules)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import no_such_thing\nexcept ImportError:\n    no_such_thing = None\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_thing\n",
        "def f():\n    raise RuntimeError\n    import no_such_thing\n",
        "if False:\n    raise RuntimeError\n",
    ],
    ids=["try", "type checking", "function", "if"],
)
def test_what_an_import_would_survive_is_not_held_against_a_plugin(site, source):
    add_plugin(site, source + GOOD)
    assert found("fake").error is None
    load_plugin("fake")


@pytest.mark.parametrize(
    "source",
    [
        "from ._b import *\n",
        "def __getattr__(name):\n    from ._b import Plugin\n    return Plugin\n",
        "from ._b import Plugin as Plugin\n",
        "from . import _b\nPlugin = _b.Plugin\n",
        "if True:\n    from ._b import Plugin\n",
    ],
    ids=["star", "getattr", "alias", "assignment", "conditional"],
)
def test_a_class_is_followed_or_trusted_where_it_is_bound_indirectly(site, source):
    site.add(
        "trl-ext-fake",
        plugins={"fake": "fake_pkg:Plugin"},
        files={"fake_pkg/__init__.py": source, "fake_pkg/_b.py": GOOD},
    )
    assert found("fake").error is None
    assert load_plugin("fake")[0].__name__ == "Plugin"


def test_an_editable_install_is_followed_to_its_sources(site, tmp_path):
    elsewhere = tmp_path / "checkout" / "src" / "fake_pkg"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("from .missing import Plugin\n")
    site.add("trl-ext-fake", plugins={"fake": "fake_pkg:Plugin"})
    (site.root / "fake.pth").write_text(f"{elsewhere.parent}\n")
    script = (
        f"import site; site.addsitedir({str(site.root)!r}); from trl_ext.cli.listing import list_plugins\n"
        "print([i.error for i in list_plugins() if i.name == 'fake'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[\"there is no module 'fake_pkg.missing'\"]"


def test_of_two_distributions_with_one_name_a_config_says_which(site):
    for distribution in ("one", "two"):
        add_plugin(site, GOOD, distribution)
        site.add(f"trl-ext-more-{distribution}", plugins={"fake": f"{distribution}_pkg:Plugin"})
    listed = [info for info in list_plugins() if info.name.endswith("fake")]
    assert [(info.name, info.error) for info in listed] == [
        ("trl-ext-more-one/fake", None),
        ("trl-ext-more-two/fake", None),
    ]
    with pytest.raises(ConfigurationError) as raised:
        load_plugin("fake")
    assert str(raised.value) == (
        "trl-ext-more-one 1.2 and trl-ext-more-two 1.2 both provide a plugin named 'fake'. "
        "Write plugins: [trl-ext-more-one/fake] or plugins: [trl-ext-more-two/fake]"
    )
    for info in listed:
        plugin_class, found = load_plugin(info.name)
        assert (plugin_class.__module__, found.distribution) == (info.value.partition(":")[0], info.distribution)


def test_a_distribution_may_be_named_where_it_need_not_be(site):
    add_plugin(site, GOOD)
    for name in ("trl-ext-fake/fake", "trl_ext_fake/fake"):
        assert load_plugin(name)[1].distribution == "trl-ext-fake"
    with pytest.raises(ConfigurationError, match=r"\[trl-ext-other/fake\]: no plugin of .* Did you mean 'fake'"):
        load_plugin("trl-ext-other/fake")


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("pluggy>=999", r"it requires pluggy>=999, but \d.* is installed"),
        ("no-such-distribution", "it requires no-such-distribution, but none is installed"),
        ("pluggy>=1; python_version>='3'", None),
        ("pluggy>=999; python_version<'3'", None),
        ("no-such-distribution; extra == 'gpu'", None),
    ],
)
def test_a_requirement_counts_where_its_marker_applies(site, requirement, expected):
    add_plugin(site, GOOD, requires=(requirement,))
    if expected is None:
        assert found("fake").error is None
        load_plugin("fake")
    else:
        assert re.search(expected, error_of("fake"))
        with pytest.raises(ConfigurationError, match=rf"'fake' \(trl-ext-fake 1\.2\) is broken: {expected}"):
            load_plugin("fake")


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ('requires_api = "1"', None),
        ('requires_api: "ClassVar[str]" = "1"', None),
        ('requires_api = ">=1.0,<3"', None),
        ('requires_api = "2"', f"needs plugin API >=2,<3, but {API_VERSION} is installed"),
        ('requires_api = ">=1.7"', f"needs plugin API >=1.7, but {API_VERSION} is installed"),
        ('requires_api = "one"', "declares the range 'one' of plugin API, which is not a version range"),
        ('requires_trl = ">=1"', None),
        ('requires_trl = "<1"', "needs TRL <1, but "),
    ],
)
def test_the_declared_ranges_are_checked_before_and_after_import(site, declaration, expected):
    add_plugin(site, f"from dataclasses import dataclass\n@dataclass(eq=False)\nclass Plugin:\n    {declaration}\n")
    if expected is None:
        assert found("fake").error is None
        load_plugin("fake")
    else:
        assert expected in error_of("fake")
        with pytest.raises(ConfigurationError) as raised:
            load_plugin("fake")
        assert expected in str(raised.value)
        assert "'fake' (trl-ext-fake 1.2)" in str(raised.value)


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all(site):
    add_plugin(site, GOOD, "powder")
    with pytest.raises(ConfigurationError) as raised:
        load_plugin("powdr")
    assert "no plugin of this name is installed. Did you mean 'powder'" in str(raised.value)
    for info in list_plugins():
        assert info.name in str(raised.value).partition("Installed: ")[2]


def test_a_failing_import_keeps_its_error_as_the_cause(site):
    add_plugin(site, "def f():\n    raise RuntimeError('deep inside')\nf()\n" + GOOD)
    assert found("fake").error is None, "a call cannot be judged from the source"
    with pytest.raises(ConfigurationError, match=r"'fake' \(trl-ext-fake 1.2\).*RuntimeError: deep inside") as raised:
        load_plugin("fake")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_module_that_exits_when_imported_does_not_end_the_run(site):
    add_plugin(site, "import sys\nsys.exit(0)\n" + GOOD)
    with pytest.raises(ConfigurationError, match="SystemExit"):
        load_plugin("fake")


@pytest.mark.parametrize("source", ["class Plugin: pass\n", "def Plugin(): pass\n", "Plugin = 3\n"])
def test_what_is_not_a_dataclass_is_refused(site, source):
    add_plugin(site, source)
    with pytest.raises(ConfigurationError, match=r"'fake' \(trl-ext-fake 1.2\).*'fake_pkg:Plugin' is not a dataclass"):
        load_plugin("fake")


def test_one_broken_plugin_leaves_the_others_usable(site):
    add_plugin(site, EXPLODES, "bad")
    add_plugin(site, GOOD, "fine")
    assert error_of("bad")
    assert found("fine").error is None
    assert load_plugin("fine")[1] == PluginInfo(
        "fine", "trl-ext-fine", "1.2", "fine_pkg:Plugin", "A distribution", None
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\0\n", "null bytes"),
        (f"x = {'-' * 100_000}1\n" + GOOD, None),
        ("if x:\n  " + "+".join("1" * 5000) + "\n" + GOOD, None),
    ],
    ids=["null bytes", "deep", "long"],
)
def test_an_extreme_source_does_not_end_the_list(site, source, expected):
    add_plugin(site, GOOD, "good")
    site.add("trl-ext-fake", plugins={"fake": "fake_pkg:Plugin"})
    (site.root / "fake_pkg.py").write_text(source)
    assert found("good").error is None
    error = found("fake").error
    assert error is None if expected is None else expected in str(error)


def test_a_name_that_no_config_could_hold_is_broken(site):
    site.add("trl-ext-fake", plugins={"fake one": "fake_pkg:Plugin"}, files={"fake_pkg/__init__.py": GOOD})
    assert "cannot be written in a config" in error_of("fake one")


def test_an_instance_s_class_leads_back_to_its_distribution(site):
    add_plugin(site, GOOD)
    plugin_class, _ = load_plugin("fake")
    assert find_distribution(plugin_class).distribution == "trl-ext-fake"
    assert find_distribution(Path) is None


def test_the_plugins_of_this_repository_are_usable():
    broken = {info.name: info.error for info in list_plugins() if info.error}
    assert broken == {}
