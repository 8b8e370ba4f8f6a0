"""The command line up to training: what it shows, how fast, and what it refuses."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_ext.cli import parse, run
from trl_ext.cli.train import how_to_resume, run_script, train
from trl_ext.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("process")  # some commands run in this one, and put our classes in TRL's place

HEADER = "from dataclasses import dataclass\nfrom trl_ext import hookimpl\n"
GOOD = (
    HEADER
    + '''
@dataclass
class Plugin:
    """One line about it."""
    path: str
    alpha: float = 1.0
    citation = "A paper, arXiv:0000.00000"
    trainers = ("sft",)
    cost = "an extra forward"
    requires_api = "1"

    @hookimpl
    def metrics(self, mode): return {}

    @hookimpl
    def setup(self): pass
'''
)
MISSPELT = HEADER + "\n@dataclass\nclass Plugin:\n    @hookimpl\n    def setpu(self): pass\n"
EXPLODES = "raise RuntimeError('imported')\n"
COMMAND = '''
from typing import Annotated
import typer

def greet(name: Annotated[str, typer.Argument(help="Whom to greet.")], loud: bool = False) -> None:
    """Greet someone."""
    print(name.upper() if loud else name)
'''
HEAVY = ("torch", "trl", "transformers", "datasets", "accelerate")


def trl_ext(*arguments, site=None, **options) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, with a fake site on its path."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRL_EXT_PLUGINS", None)
    if site:
        environment["PYTHONPATH"] = str(site.root)
    return subprocess.run(
        [sys.executable, "-m", "trl_ext", *map(str, arguments)],
        **{"env": environment, "capture_output": True, "text": True, **options},
    )


def add_plugin(site, name: str, source: str) -> None:
    package = f"{name.replace('-', '_')}_pkg"
    site.add(f"trl-ext-{name}", plugins={name: f"{package}:Plugin"}, files={f"{package}/__init__.py": source})


def listed(site) -> dict[str, dict]:
    done = trl_ext("plugins", "list", "--json", site=site, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)}


# plugins


def test_list_shows_usable_and_broken_plugins(site):
    add_plugin(site, "good", GOOD)
    add_plugin(site, "bad", EXPLODES)
    done = trl_ext("plugins", "list", site=site)
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "trl-ext-good 1.2" in lines["good"]
    assert "One line about it." in lines["good"]
    assert "BROKEN: importing 'bad_pkg' fails at line 1" in lines["bad"]


def test_list_gives_the_same_as_json(site):
    add_plugin(site, "good", GOOD)
    add_plugin(site, "bad", EXPLODES)
    rows = listed(site)
    assert rows["good"] == {
        "name": "good",
        "distribution": "trl-ext-good",
        "version": "1.2",
        "value": "good_pkg:Plugin",
        "summary": "One line about it.",
        "error": None,
    }
    assert "RuntimeError" in rows["bad"]["error"]


def test_info_shows_what_a_user_needs_to_configure_a_plugin(site):
    add_plugin(site, "good", GOOD)
    done = trl_ext("plugins", "info", "good", site=site, check=True)
    for shown in (
        "good (trl-ext-good 1.2), good_pkg:Plugin",
        "One line about it.",
        "Trainers: sft",
        "Cost: an extra forward",
        "Hooks: setup, metrics",
        "Needs: plugin API 1",
        "Citation: A paper, arXiv:0000.00000",
    ):
        assert shown in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["path", "str", "required"] in rows
    assert ["alpha", "float", "1.0"] in rows


def test_info_with_options_shows_their_values(site):
    add_plugin(site, "good", GOOD)
    done = trl_ext("plugins", "info", "good:path=here,alpha=3", site=site, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["path", "str", "required", "'here'"] in rows
    assert ["alpha", "float", "1.0", "3.0"] in rows


def test_info_draws_where_a_plugin_can(site, tmp_path):
    draws = GOOD + "\n    def draw(self, path): open(path, 'w').write(f'alpha is {self.alpha}')\n"
    add_plugin(site, "good", draws)
    picture = tmp_path / "picture.svg"
    done = trl_ext("plugins", "info", "good:path=here,alpha=3", "--draw", str(picture), site=site, check=True)
    assert done.stdout == f"wrote {picture}\n"
    assert picture.read_text() == "alpha is 3.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good:path=here", "--draw", "x.png"], "plugin 'good' (trl-ext-good 1.2) has nothing to draw"),
        (["good,other"], "'good,other' names 2 plugins; give one"),
        (["good:alpha=x,path=y"], "plugins: [good:alpha=<float>,path=y]"),
    ],
)
def test_info_refuses_what_it_cannot_show(site, arguments, message):
    add_plugin(site, "good", GOOD)
    done = trl_ext("plugins", "info", *arguments, site=site)
    assert done.returncode == 2
    assert message in done.stderr


def test_info_about_an_unknown_plugin_names_the_nearest(site):
    add_plugin(site, "good", GOOD)
    done = trl_ext("plugins", "info", "goodd", site=site)
    assert done.returncode == 2
    assert done.stderr.startswith("trl-ext: plugins: [goodd]: no plugin of this name is installed. Did you mean 'good'")


def test_check_passes_usable_plugins_whatever_their_options(site):
    add_plugin(site, "good", GOOD)
    done = trl_ext("plugins", "check", "good", site=site)
    assert (done.returncode, done.stdout) == (0, "ok      good\n")


BROKEN = {
    "import": (EXPLODES, "RuntimeError: imported"),
    "hook": (MISSPELT, "Did you mean 'setup'"),
    "class": ("class Plugin: pass", "is not a dataclass"),
    "type": (GOOD.replace("path: str", "path: 'Absent'"), "the type of option 'path' is not imported"),
    "reserved": (GOOD.replace("path: str", "label: str"), "has an option 'label', a name that configs reserve"),
    "unwritable": (
        GOOD.replace("path: str", "path: 'set[str]'"),
        "option 'path' has the type set[str], which cannot be written",
    ),
    "default": (
        "from typing import Annotated\nfrom trl_ext.options import Range\n"
        + GOOD.replace("alpha: float", "alpha: Annotated[float, Range(gt=1)]"),
        "the default alpha=1.0 is not > 1",
    ),
    "range": (GOOD.replace('"1"', "1"), "declares the range 1 of plugin API, which is not a text; write"),
    "trainers": (
        GOOD.replace('("sft",)', '"sft"'),
        "declares trainers = 'sft', a bare text; write trainers = ('sft',)",
    ),
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory, new_site) -> subprocess.CompletedProcess:
    """`plugins check` where all of them are installed, and a good one."""
    site = new_site(tmp_path_factory.mktemp("site"))
    add_plugin(site, "good", GOOD)
    for name, (source, _) in BROKEN.items():
        add_plugin(site, f"bad-{name}", source)
    return trl_ext("plugins", "check", site=site)


def test_check_fails_where_a_plugin_is_broken_and_passes_the_others(checked):
    assert checked.returncode == 1
    assert "ok      good\n" in checked.stdout


@pytest.mark.parametrize("name", BROKEN)
def test_check_says_what_a_run_would_refuse(checked, name):
    (line,) = [line for line in checked.stdout.splitlines() if line.startswith(f"BROKEN  bad-{name}: ")]
    assert BROKEN[name][1] in line
    assert f"trl-ext-bad-{name} 1.2" in line


# Speed


def modules_after(*arguments, site=None) -> set[str]:
    """The top-level modules that a command has imported."""
    script = (
        "import sys\nfrom trl_ext.cli import main\n"
        "try:\n    main()\nfinally:\n    print('\\n@', *{m.split('.')[0] for m in sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": str(site.root) if site else ""}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    return set(done.stdout.rpartition("@")[2].split())


HELPS = [
    ["--help"],
    ["-h"],
    *([*command.split(), "--help"] for command in ("plugins", "probe", "run", "demo", "doctor", "validate")),
]
PROBES = ("capability", "drift", "excursions", "from-scratch", "passk", "reachability")
COMMANDS = ["average", *(f"probe {name}" for name in PROBES)]


@pytest.mark.parametrize(
    "arguments", [*HELPS, ["plugins", "list"], ["plugins", "list", "--json"], ["--version"]], ids=" ".join
)
def test_listings_and_help_import_nothing_heavy_and_no_plugin(site, arguments):
    add_plugin(site, "good", GOOD)
    site.add("trl-ext-tool", groups={"trl_ext.commands": {"greet": "tool_pkg:greet"}}, files={"tool_pkg.py": COMMAND})
    modules = modules_after(*arguments, site=site)
    assert "typer" in modules
    assert modules & {*HEAVY, "good_pkg", "tool_pkg"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_contributed_commands_imports_nothing_heavy(command):
    modules = modules_after(*command.split(), "--help")
    assert "typer" in modules
    assert modules & {*HEAVY, "scipy", "pydantic"} == set()


def seconds(*arguments) -> float:
    """The least of five runs, of what the process itself used: what else the machine does hardly counts."""
    used = []
    for _ in range(5):
        before = os.times()
        trl_ext(*arguments, check=True)
        after = os.times()
        used.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(used)


@pytest.mark.slow  # a busy machine fails it: run it on an idle one
@pytest.mark.parametrize(
    "arguments", [*HELPS, ["plugins", "list"], *([*command.split(), "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_and_listings_answer_within_half_a_second(arguments):
    assert seconds(*arguments) < 0.5


# Commands of other distributions


def add_command(
    site, source: str = COMMAND, group: str = "trl_ext.commands", name: str = "greet", module: str = "tool_pkg"
) -> None:
    site.add(f"trl-ext-{module}", groups={group: {name: f"{module}:greet"}}, files={f"{module}.py": source})


@pytest.mark.parametrize(("group", "prefix"), [("trl_ext.commands", []), ("trl_ext.probes", ["probe"])])
def test_a_distribution_may_bring_commands(site, group, prefix):
    add_command(site, group=group)
    assert "Greet someone (trl-ext-tool_pkg 1.2)" in trl_ext(*prefix, "--help", site=site, check=True).stdout
    assert trl_ext(*prefix, "greet", "you", "--loud", site=site, check=True).stdout == "YOU\n"
    assert "Whom to greet." in trl_ext(*prefix, "greet", "--help", site=site, check=True).stdout


def test_a_broken_command_breaks_only_itself(site):
    add_command(site)
    add_command(site, EXPLODES, name="bad", module="bad_pkg")
    for arguments in (["plugins", "list"], ["greet", "you"]):
        assert trl_ext(*arguments, site=site).returncode == 0
    help_text = trl_ext("--help", site=site, check=True).stdout
    assert "Greet someone (trl-ext-tool_pkg 1.2)" in help_text
    assert "BROKEN: importing 'bad_pkg' fails at line 1" in help_text
    done = trl_ext("bad", site=site)
    assert done.returncode != 0
    assert "command 'bad' of trl-ext-bad_pkg 1.2 cannot be loaded: RuntimeError: imported" in done.stderr


def test_a_command_claimed_twice_is_refused(site):
    add_command(site, module="one_pkg")
    add_command(site, module="two_pkg")
    done = trl_ext("greet", "you", site=site)
    assert done.returncode == 2
    assert "trl-ext-one_pkg 1.2 and trl-ext-two_pkg 1.2 both provide a command 'greet'" in done.stderr


def test_a_built_in_command_cannot_be_replaced(site):
    add_command(site, EXPLODES, name="plugins", module="bad_pkg")
    assert trl_ext("plugins", "list", site=site).returncode == 0


def test_an_unknown_command_is_refused():
    done = trl_ext("trian")
    assert done.returncode == 2
    assert done.stderr == "trl-ext: there is no command 'trian'. See trl-ext --help\n"


# run


SHOW = """
import json, os, sys
import trl, trl.trainer
from trl.trainer import grpo_config, grpo_trainer, sft_config, sft_trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
import beside

places = [trl, trl.trainer, grpo_config, grpo_trainer, sft_config, sft_trainer]
names = ["SFTConfig", "SFTTrainer", "GRPOConfig", "GRPOTrainer"]
found = {getattr(place, name) for place in places for name in names if hasattr(place, name)}
config = SFTConfig("out", use_cpu=True, bf16=False, report_to="none")
print("@" + json.dumps({
    "classes": sorted(f"{c.__module__}.{c.__name__}" for c in found),
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "plugins": config.plugins, "beside": beside.here,
}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("here = True\n")
    (folder / "show.py").write_text(SHOW)
    return folder / "show.py"


def test_run_gives_a_script_our_classes_and_its_own_arguments(script):
    done = trl_ext("run", "--plugins", "power:alpha=1,ema", script, "one", "--plugins", "mine", "--", "-x", check=True)
    shown = json.loads(done.stdout.partition("@")[2])
    assert shown == {
        "classes": [
            "trl_ext.config.GRPOConfig",
            "trl_ext.config.SFTConfig",
            "trl_ext.trainers.grpo.GRPOTrainer",
            "trl_ext.trainers.sft.SFTTrainer",
        ],
        "argv": [str(script), "one", "--plugins", "mine", "--", "-x"],
        "path": str(script.parent),
        "name": "__main__",
        "file": str(script),
        "plugins": [{"name": "power", "alpha": "1"}, {"name": "ema"}],
        "beside": True,
    }


def test_run_without_plugins_leaves_the_environment_s(process, script, capsys, monkeypatch):
    monkeypatch.chdir(script.parent)
    monkeypatch.setenv("TRL_EXT_PLUGINS", "ema")
    run_script(Path("show.py"), [])
    shown = json.loads(capsys.readouterr().out.partition("@")[2])
    assert shown["plugins"] == [{"name": "ema"}]
    assert (shown["argv"], shown["path"]) == (["show.py"], str(script.parent))


def test_a_script_s_exit_code_is_kept(process, script):
    script.write_text("import sys; sys.exit(7)")
    with pytest.raises(SystemExit) as raised:
        run_script(script, [])
    assert raised.value.code == 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "absent.py"], "run: there is no file 'absent.py'"),
        (["run", "--plugins", "alpha=1", __file__], "plugins: 'alpha=1' starts with an option"),
    ],
)
def test_what_cannot_work_ends_with_its_message_alone(arguments, expected):
    done = trl_ext(*arguments)
    assert done.returncode == 2
    assert f"trl-ext: {expected}" in done.stderr
    assert "Traceback" not in done.stderr


# sft, grpo


CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--model_name_or_path", "absent"]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_training_commands_show_trl_s_flags_and_ours(process, capsys, kind):
    with pytest.raises(SystemExit) as raised:
        train(kind, ["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: trl-ext {kind}" in shown
    for flag in ("--learning_rate", "--dataset_name", "--plugins", "--streams", "--dataset_columns", "--nonfinite"):
        assert flag in shown


@pytest.mark.parametrize(
    ("kind", "plugins", "expected"),
    [
        ("sft", "alpha=1", "plugins: 'alpha=1' starts with an option"),
        ("sft", "good:alpha=ten,path=x", "plugin 'good' (trl-ext-good 1.2), option 'alpha': expected float, got 'ten'"),
        ("grpo", "good:path=x", "plugin 'good' (trl-ext-good 1.2) is for the trainers sft, and this is grpo"),
    ],
)
def test_a_plugin_that_cannot_run_stops_the_command_before_data_and_model(process, site, kind, plugins, expected):
    add_plugin(site, "good", GOOD)
    with pytest.raises(ConfigurationError) as raised:
        train(kind, [*CPU, "--dataset_name", "absent/absent", "--plugins", plugins])
    assert expected in str(raised.value)


def test_a_missing_data_file_is_named(process):
    with pytest.raises(ConfigurationError, match=r"dataset_name: there is no file 'absent\.jsonl'"):
        train("sft", [*CPU, "--dataset_name", "absent.jsonl"])


def test_the_first_line_comes_before_the_heavy_imports():
    script = (
        "import builtins, sys\nreal = print\n"
        "builtins.print = lambda *texts, **options: real(*texts, [m for m in ('torch', 'trl') if m in sys.modules])\n"
        "sys.argv = ['trl-ext', 'sft']\nsys.modules['trl'] = None  # so that it goes no further\n"
        "from trl_ext.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "trl-ext sft: loading torch, transformers and TRL ['trl']"


# Errors


def test_debug_shows_the_traceback_and_the_error_behind_the_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for arguments in (["--debug", "run", "absent.py"], ["run", "--debug", "absent.py"]):
        assert run(arguments) == 2
        shown = capsys.readouterr().err
        assert "Traceback" in shown
        assert "in run_script" in shown
        assert shown.splitlines()[-1] == "trl-ext: run: there is no file 'absent.py'"


def test_the_debug_flags_of_trl_and_of_a_script_stay_theirs(process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "show.py").write_text("import sys; print(sys.argv[1:])")
    assert run(["run", str(tmp_path / "show.py"), "--debug"]) == 0
    assert "['--debug']" in capsys.readouterr().out
    parsed = parse("sft", ["--use_cpu", "--bf16", "false", "--report_to", "none", "--debug", "underflow_overflow"])
    assert [str(option.value) for option in parsed[1].debug] == ["underflow_overflow"]


def test_an_error_of_a_user_s_script_keeps_its_traceback(process, tmp_path):
    (tmp_path / "train.py").write_text("rows = {}\nrows['text']\n")
    with pytest.raises(KeyError, match="text") as raised:
        run(["run", str(tmp_path / "train.py")])
    assert raised.traceback[-1].path == tmp_path / "train.py"


def test_what_a_script_is_refused_names_its_line(process, tmp_path, capsys):
    (tmp_path / "train.py").write_text("import trl\n\ntrl.SFTConfig('out', plugins='alpha=1', use_cpu=True)\n")
    assert run(["run", str(tmp_path / "train.py")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trl-ext: plugins: 'alpha=1' starts with an option")
    assert last.endswith(f"See {tmp_path / 'train.py'}, line 3")


def test_a_bug_keeps_its_traceback(site, process):
    add_plugin(site, "bad", EXPLODES)
    with pytest.raises(ConfigurationError, match="importing 'bad_pkg:Plugin' raised RuntimeError"):
        run(["plugins", "info", "bad"])


def test_an_interrupt_says_how_to_go_on(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=True, save_steps=500)
    assert how_to_resume("sft", ["--seed", "1"], args) == (
        "interrupted before the first checkpoint (save_steps=500): run it again"
    )
    (tmp_path / "checkpoint-7").mkdir()
    state = {"global_step": 7, "max_steps": 9, "log_history": [], "stateful_callbacks": {}}
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-7" / "model.safetensors").write_text("")
    assert how_to_resume("sft", ["--seed", "1"], args) == (
        f"interrupted; to go on from {tmp_path / 'checkpoint-7'}: trl-ext sft --seed 1 --resume_from_checkpoint true"
    )


# doctor


def test_doctor_names_versions_devices_and_problems(site, capsys):
    add_plugin(site, "bad", EXPLODES)
    site.add("trl-ext-old", requires=("pluggy>=99",))
    assert run(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["trl"] == version("trl")
    assert "cores" in report["devices"]["cpu"]
    assert report["plugins"]["trl-ext-bad 1.2"] == 1
    assert any("'bad' (trl-ext-bad 1.2): importing 'bad_pkg' fails" in problem for problem in report["problems"])
    assert f"trl-ext-old: it requires pluggy>=99, but {version('pluggy')} is installed" in report["problems"]
    assert run(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"  trl: {version('trl')}" in text.splitlines()
    assert "trl-ext-old: it requires pluggy>=99" in text


SECRETIVE = (
    HEADER.replace("dataclass\n", "dataclass, field\n", 1)
    + """
@dataclass
class Plugin:
    endpoint: str = field(default="", repr=False)
    api_key: str = ""
    count: int = 1
"""
)


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        (
            "judge:endpoint=sesame,api_key=sesame,count=3,label=one",
            [{"name": "judge", "endpoint": "***", "api_key": "***", "count": 3, "label": "one"}],
        ),
        ("judge:count=sesame", None),
        ("api_key=sesame", None),
    ],
)
def test_doctor_shows_no_secret_of_the_plugins_that_the_environment_names(site, monkeypatch, capsys, named, shown):
    add_plugin(site, "judge", SECRETIVE)
    monkeypatch.setenv("TRL_EXT_PLUGINS", named)
    run(["doctor", "--json"])
    said = capsys.readouterr()
    assert "sesame" not in said.out + said.err
    report = json.loads(said.out)
    assert shown is None or json.loads(report["environment"]["TRL_EXT_PLUGINS"]) == shown
    problems = [problem for problem in report["problems"] if problem.startswith("TRL_EXT_PLUGINS cannot be activated")]
    assert len(problems) == (shown is None)
