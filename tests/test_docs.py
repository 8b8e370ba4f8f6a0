"""The documents are true: every hook has its entry, snippets run, commands and settings that are named exist."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import CodeType
from typing import Any, get_args

import numpy as np
import pytest
import typer
import yaml
from documents import DOCUMENTS, MODEL, ROOT, blocks, commands, name, save_adapter, snippets

from trl_ext.hookspecs import HOOKS, HookSpecs, Kind
from trl_ext.records import TRAINERS, trainer_name

RECIPES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if "model_name_or_path" in yaml.safe_load(path.read_text()) and path.parent.name != "real"  # not a hub's model
)
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def having(*languages: str, but: str = "") -> pytest.MarkDecorator:
    documents = [d for d in DOCUMENTS if any(blocks(d, *languages)) and d.name != but]
    return pytest.mark.parametrize("document", documents, ids=name)


# -- hooks -----------------------------------------------------------------------------------------------------------


def signature(hook: str) -> str:
    """The signature as it is written in `hookspecs.py`, without `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(HookSpecs, hook)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    assert tree.returns is not None
    tree.args.args = tree.args.args[1:]
    return f"{hook}({ast.unparse(tree.args)}) -> {ast.unparse(tree.returns)}"


def trainers_named(hook: str) -> list[str]:
    """The trainers that call a hook, as the documents write them; none where all do."""
    trainers = HOOKS[hook].trainers
    return [] if trainers == TRAINERS else [trainer_name(trainer) for trainer in trainers]


def sections() -> dict[str, str]:
    """The sections of docs/hooks.md that are about a hook, by name."""
    parts = re.split(r"^## `(\w+)`$", (ROOT / "docs" / "hooks.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_documented_with_its_signature_kind_and_an_example(hook: str) -> None:
    entry = sections()[hook].strip()
    first, kind, rest = (part.strip() for part in re.split(r"\n\n|(?<=\*)\. ", entry, maxsplit=2))
    assert first == f"`{signature(hook)}`"
    assert kind == f"*{', '.join([HOOKS[hook].kind, *trainers_named(hook)])}*"
    assert f"def {hook}(self" in rest.partition("```python")[2], "no example that implements the hook"


def test_hooks_have_their_entries_in_the_order_in_which_they_fire() -> None:
    assert list(sections()) == list(HOOKS)


def test_the_table_of_hooks_says_what_their_declarations_say() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs" / "hooks.md").read_text(), re.MULTILINE
    )
    assert rows == [
        (hook, facts.kind, ", ".join(trainers_named(hook)) or "all", facts.moment) for hook, facts in HOOKS.items()
    ]


def test_every_kind_is_explained() -> None:
    explained = re.findall(r"^- \*([\w ]+)\*: ", (ROOT / "docs" / "hooks.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(get_args(Kind))


# -- snippets --------------------------------------------------------------------------------------------------------


def python_snippets() -> list[Any]:
    """The Python blocks of the documents but hooks.md, whose blocks share their imports; slow but for the README's."""
    return [
        pytest.param(
            snippet,
            id=f"{name(document)}:{snippet.co_firstlineno}",
            marks=[] if document == ROOT / "README.md" else pytest.mark.slow,
        )
        for document in DOCUMENTS
        if document.name != "hooks.md"
        for snippet in snippets(document)
    ]


@pytest.mark.parametrize("snippet", python_snippets())
def test_a_python_snippet_runs_alone(snippet: CodeType, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if "adapters.md" in snippet.co_filename:
        save_adapter(workplace / "runs" / "adapter")
    exec(snippet, {"__name__": "__main__"})


def test_each_hook_s_snippet_runs_alone_and_the_last_trains_with_all(workplace: Path) -> None:
    imports, *plugins, run = snippets(ROOT / "docs" / "hooks.md")
    shared: dict[str, Any] = {"__name__": "__main__"}
    exec(imports, shared)
    together = dict(shared)
    for snippet in plugins:
        alone = dict(shared)  # the methods keep this namespace: a name of another snippet's fails in the run too
        exec(snippet, alone)
        together |= alone
    exec(run, together)


# -- output ----------------------------------------------------------------------------------------------------------


def test_the_header_of_the_first_run_is_what_that_run_prints() -> None:
    from trl_ext.plugins import activate
    from trl_ext.startup.report import header, run_facts

    ((_, shown),) = blocks(ROOT / "docs" / "start" / "first_run.md", "text")
    printed = header(run_facts("sft", activate(["power:alpha=1", "ema:decay=0.99"], trainer="sft"), {}))
    assert without_versions(shown) == without_versions(printed)


def without_versions(text: str) -> list[str]:
    return re.sub(r"\d+(\.\d+)+(\+\w+)?", "0", text).split()


# -- notebooks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes to what its text says: `power` and `ema` keep more of the task than the plain run."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    shared: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec", dont_inherit=True), shared)
    assert len(plt.get_fignums()) == 1
    plt.close("all")
    scores = {name: float(np.mean(values)) for name, values in shared["scores"].items()}
    plain = scores.pop("nll")
    assert all(score > plain for score in scores.values())


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_lead_to_files_of_the_repository() -> None:
    broken = [
        f"{name(document)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text())
        if not (document.parent / target).exists() and document.parent.name != "methods"
    ]
    assert not broken


# -- commands --------------------------------------------------------------------------------------------------------


def arguments_of_trl_ext(words: list[str]) -> list[str] | None:
    for start in (["trl-ext"], ["-m", "trl_ext"]):
        for i in range(len(words)):
            if words[i : i + len(start)] == start:
                return words[i + len(start) :]
    return None


def known_settings(trainer: str) -> set[str]:
    """Every flag of a training command, and so every key of its YAML, without dashes."""
    from importlib import import_module

    from trl_ext.cli.launching import launch_flags
    from trl_ext.cli.patching import PLACES

    with pytest.MonkeyPatch.context() as patch:
        import trl_ext

        for name, places in PLACES.items():
            ours = getattr(trl_ext, name)
            for place in places:
                patch.setattr(import_module(place), name, ours)
        parser = import_module(f"trl.scripts.{trainer}").make_parser()
    flags = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    return flags | {"config"} | launch_flags()


@having("sh", "bash")
def test_commands_and_flags_exist(document: Path) -> None:
    from trl_ext.cli.app import app

    for line, words in commands(document):
        where = f"{document.name}, block at line {line}: {' '.join(words)}"
        rest = arguments_of_trl_ext(words)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), where
        if rest is None:
            continue
        command: Any = typer.main.get_command(app)
        path = []
        while rest and hasattr(command, "get_command"):
            path.append(rest.pop(0))
            command = command.get_command(typer.Context(command), path[-1])
            assert command is not None, f"{where}: there is no command {' '.join(path)!r}"
        flags = {word.partition("=")[0] for word in _own_arguments(path, rest) if word.startswith("--")}
        if path and path[0] in (*TRAINERS, "validate"):
            kinds = TRAINERS if path == ["validate"] else path[:1]
            known = {f"--{name}" for kind in kinds for name in known_settings(kind)}
        else:
            loaded = command.make_context(path[-1], [], resilient_parsing=True).command  # not a plugin's stand-in
            known = {option for parameter in loaded.params for option in parameter.opts}
        assert flags <= known, f"{where}: no such flag {sorted(flags - known)}"


def _own_arguments(path: list[str], arguments: list[str]) -> list[str]:
    """Without those of the script that `trl-ext run` hands on."""
    if path[:1] != ["run"]:
        return arguments
    script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
    return arguments[:script]


@having("yaml")
def test_yaml_keys_are_settings_of_a_trainer(document: Path) -> None:
    known = set().union(*map(known_settings, TRAINERS)) | {"tune"}  # a part of a comparison
    for line, text in blocks(document, "yaml"):
        unknown = set(yaml.safe_load(text)) - known
        assert not unknown, f"{document.name}, block at line {line}: no such setting {sorted(unknown)}"


def refuse_wrong_options(plugins: Any) -> int:
    """The number of plugins; ConfigurationError for an unknown one, or for an option that it could not have."""
    from trl_ext.plugins.coercion import build_options
    from trl_ext.plugins.discovery import load_plugin
    from trl_ext.specs import parse_specs

    specs = parse_specs(plugins)
    for spec in specs:  # not called: some look for files that the text speaks of
        plugin, info = load_plugin(spec["name"])
        build_options(plugin, spec, str(info))
    return len(specs)


def test_yaml_snippets_name_plugins_and_options_that_exist() -> None:
    settings = [yaml.safe_load(text) for document in DOCUMENTS for _, text in blocks(document, "yaml")]
    assert sum(refuse_wrong_options(setting.get("plugins")) for setting in settings) > 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_recipes_hold_settings_and_plugins_that_exist(recipe: Path) -> None:
    settings = yaml.safe_load(recipe.read_text())
    assert set(settings) <= known_settings("sft") | known_settings("grpo")
    assert settings["model_name_or_path"] == MODEL
    assert (ROOT / settings["dataset_name"]).is_file()
    refuse_wrong_options(settings.get("plugins"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_recipes_pass_a_dry_run(recipe: Path, workplace: Path, process: None) -> None:
    from trl_ext.cli.validate import validate_command

    small = "--use_cpu --bf16 false --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --report_to none"
    settings = yaml.safe_load(recipe.read_text())
    if settings.get("load_in_4bit"):
        pytest.skip("4-bit models need a CUDA device; the settings are checked above")
    if settings.get("use_peft"):
        pytest.importorskip("peft")
    short = ["--max_completion_length", "4"] if "reward_funcs" in settings else []
    validate_command(["--config", str(recipe), *small.split(), *short])


@pytest.mark.slow
def test_the_tutorial_ends_with_a_plugin_that_passes_its_tests(site: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "write" / "tutorial.md").read_text()
    files = dict(re.findall(r"^```{code-block} \w+\n:caption: (\S+)\n\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert set(files) == {"pyproject.toml", "src/my_focal/__init__.py", "tests/test_focal.py"}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    plugins = project["entry-points"]["trl_ext"]
    site.add(project["name"], plugins=plugins, files={"my_focal/__init__.py": files["src/my_focal/__init__.py"]})
    tests = tmp_path / "test_focal.py"
    tests.write_text(files["tests/test_focal.py"])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "PYTHONPATH": str(site.root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "4 passed" in result.stdout


def entry_points() -> dict[str, dict[str, dict[str, str]]]:
    """The entry points of each distribution of the repository: group to name to value."""
    projects = (tomllib.loads(path.read_text())["project"] for path in sorted(ROOT.glob("plugins/*/pyproject.toml")))
    return {project["name"]: project.get("entry-points", {}) for project in projects}


def test_every_method_has_advice_and_every_card_is_short() -> None:
    """The site's tables are made from entry points; this is what would leave a row empty or a card too long."""
    advice = yaml.safe_load((ROOT / "docs" / "methods" / "methods.yaml").read_text())
    plugins = {distribution: set(groups.get("trl_ext", {})) for distribution, groups in entry_points().items()}
    advised = {distribution: set(about["plugins"]) for distribution, about in advice.items()}
    assert advised == {distribution: names for distribution, names in plugins.items() if names}
    assert all(row["when"] and row["when not"] for about in advice.values() for row in about["plugins"].values())
    for distribution in plugins:
        card = ROOT / "plugins" / distribution / "README.md"
        assert len(card.read_text().split()) < 700, card


@pytest.mark.parametrize("name", [name for groups in entry_points().values() for name in groups.get("trl_ext", {})])
def test_a_plugin_says_what_it_costs(name: str) -> None:
    """The run's header, `plugins info` and the table of methods show it."""
    from trl_ext.plugins.discovery import load_plugin

    plugin: Any = load_plugin(name)[0]
    assert re.fullmatch(r"[a-z0-9][^\n]+[^.]", plugin.cost)


def test_readme_names_every_plugin_and_command_of_the_repository() -> None:
    text = (ROOT / "README.md").read_text()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| \[([\w-]+)\]\(plugins/\1\) \|.*$", text, re.MULTILINE)}
    assert set(rows) == set(entry_points())
    for distribution, groups in entry_points().items():
        wanted = {f"`{name}`" for name in groups.get("trl_ext", {})}
        wanted |= {f"`trl-ext {name}`" for name in groups.get("trl_ext.commands", {})}
        wanted |= {f"`trl-ext probe {name}`" for name in groups.get("trl_ext.probes", {})}
        assert set(re.findall(r"`[^`]+`", rows[distribution])) == wanted
