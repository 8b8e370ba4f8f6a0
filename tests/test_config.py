"""The configs: TRL's own, with settings that survive every way a config is written, saved and read."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import trl
from transformers import TrainingArguments

from trl_ext.config import GRPOConfig, SFTConfig, upgrade_config
from trl_ext.errors import ConfigurationError

PAIRS = [(SFTConfig, trl.SFTConfig), (GRPOConfig, trl.GRPOConfig)]
ADDED = [
    *("plugins", "streams", "dataset_columns", "nonfinite", "rank_check_steps"),
    *("reset_plugin_state", "resume_changes", "verify_checkpoint", "strict_versions", "profile"),
]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
CANONICAL = [{"name": "power", "alpha": "10"}, {"name": "ema", "decay": 0.9}]


def make(config_class=SFTConfig, **settings):
    return config_class("out", **CPU, **settings)


@dataclasses.dataclass
class OwnConfig(trl.SFTConfig):
    """A user's config, as scripts write them."""

    extra: int = 3

    def __post_init__(self):
        self.derived = self.extra * 2
        super().__post_init__()


@pytest.fixture(autouse=True)
def _no_plugins_from_outside(monkeypatch):
    monkeypatch.delenv("TRL_EXT_PLUGINS", raising=False)


# Beside TRL's


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_trl_s_fields_keep_their_places_and_defaults(ours, theirs):
    def described(config_class):
        return [(f.name, f.default, f.default_factory, f.metadata) for f in dataclasses.fields(config_class)]

    assert described(ours)[: -len(ADDED)] == described(theirs)
    assert [name for name, *_ in described(ours)[-len(ADDED) :]] == ADDED


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_without_settings_of_ours_all_values_are_trl_s(ours, theirs):
    mine, trls = make(ours).to_dict(), make(theirs).to_dict()
    assert {key: value for key, value in mine.items() if key not in ADDED} == trls
    assert {key: mine[key] for key in ADDED} == {
        "plugins": [],
        "streams": None,
        "dataset_columns": None,
        "nonfinite": None,
        "rank_check_steps": 0,
        "reset_plugin_state": False,
        "resume_changes": "refuse",
        "verify_checkpoint": True,
        "strict_versions": False,
        "profile": False,
    }


@pytest.mark.parametrize("config_class", [SFTConfig, GRPOConfig])
def test_every_added_field_has_a_help_text_and_a_docstring_entry(config_class):
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    _, parameters = config_class.__doc__.split("\n    Parameters:\n")
    for name in ADDED:
        assert len(fields[name].metadata["help"]) > 40
        assert f"\n        {name} (`" in "\n" + parameters


# Every way to write one


WRITTEN = {
    "text": "power:alpha=10,ema:decay=0.9",
    "texts": ["power:alpha=10", "ema:decay=0.9"],
    "json": '[{"name": "power", "alpha": "10"}, {"name": "ema", "decay": 0.9}]',
    "mappings": CANONICAL,
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_plugins_become_canonical_however_they_are_written(written):
    plugins = make(plugins=written).plugins
    assert [(spec["name"], [str(spec.get(key)) for key in ("alpha", "decay")]) for spec in plugins] == [
        ("power", ["10", "None"]),
        ("ema", ["None", "0.9"]),
    ]


def parse(arguments, config_class=SFTConfig):
    common = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    (config,) = trl.TrlParser(config_class).parse_args_and_config([*common, *arguments])
    return config


@pytest.mark.parametrize("config_class", [SFTConfig, GRPOConfig])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--plugins", "power:alpha=10,ema"],
        ["--plugins", "power:alpha=10", "ema"],
        ["--plugins", '[{"name": "power", "alpha": "10"}, "ema"]'],
        ["--plugins", '{"name": "power", "alpha": "10"}', "ema"],
    ],
    ids=["one text", "two texts", "json list", "json object"],
)
def test_the_command_line_takes_plugins_in_every_form(config_class, arguments):
    assert parse(arguments, config_class).plugins == [{"name": "power", "alpha": "10"}, {"name": "ema"}]


def test_the_command_line_takes_the_other_settings():
    config = parse(
        [
            *("--streams", "general=data.jsonl", "--dataset_columns", "question=prompt,answer=completion"),
            *("--nonfinite", "skip", "--rank_check_steps", "5", "--reset_plugin_state"),
        ]
    )
    assert config.streams == {"general": {"path": "data.jsonl"}}
    assert config.dataset_columns == {"question": "prompt", "answer": "completion"}
    assert (config.nonfinite, config.rank_check_steps, config.reset_plugin_state) == ("skip", 5, True)


YAML = """
plugins:
  - power:alpha=10
  - name: ema
    decay: 0.9
streams:
  general: data.jsonl
  target: {path: math.csv, split: train, columns: {question: prompt}}
dataset_columns: {question: prompt}
nonfinite: skip
"""


def test_yaml_takes_texts_and_mappings(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    config = parse(["--config", str(tmp_path / "config.yaml")])
    assert config.plugins == CANONICAL
    assert config.streams == {
        "general": {"path": "data.jsonl"},
        "target": {"path": "math.csv", "split": "train", "columns": {"question": "prompt"}},
    }
    assert config.dataset_columns == {"question": "prompt"}
    assert config.nonfinite == "skip"


def test_the_command_line_overrides_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    config = parse(["--config", str(tmp_path / "config.yaml"), "--plugins", "swa"])
    assert config.plugins == [{"name": "swa"}]
    assert config.nonfinite == "skip"


def test_the_environment_counts_where_the_config_says_nothing(monkeypatch):
    monkeypatch.setenv("TRL_EXT_PLUGINS", "power:alpha=10")
    assert make().plugins == [{"name": "power", "alpha": "10"}]
    assert make(plugins="ema").plugins == [{"name": "ema"}]
    assert make(plugins=[]).plugins == []


# Every way to keep one


FULL = {
    "plugins": CANONICAL,
    "streams": {"general": {"path": "a.jsonl", "columns": {"q": "prompt"}}},
    "dataset_columns": {"q": "prompt"},
    "nonfinite": "skip",
    "rank_check_steps": 3,
    "reset_plugin_state": True,
    "resume_changes": "warn",
    "verify_checkpoint": False,
    "strict_versions": True,
    "profile": True,
}


@pytest.mark.parametrize(
    "trip",
    [
        lambda config: SFTConfig(**config.to_dict()),
        lambda config: SFTConfig(**json.loads(config.to_json_string())),
        lambda config: dataclasses.replace(config, learning_rate=1e-3),
        lambda config: pickle.loads(pickle.dumps(config)),
        copy.deepcopy,
    ],
    ids=["to_dict", "to_json_string", "replace", "pickle", "deepcopy"],
)
def test_the_settings_survive(trip):
    config = trip(make(**FULL))
    assert {name: getattr(config, name) for name in ADDED} == FULL


def test_a_saved_config_is_not_changed_by_the_environment(monkeypatch):
    saved = make(plugins=[]).to_dict()
    monkeypatch.setenv("TRL_EXT_PLUGINS", "power")
    assert SFTConfig(**saved).plugins == []


def test_the_settings_survive_training_args_bin(tmp_path):
    torch.save(make(**FULL), tmp_path / "training_args.bin")
    config = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert {name: getattr(config, name) for name in ADDED} == FULL


# What is refused


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"plugins": "alpha=1"}, "plugins: 'alpha=1' starts with an option"),
        ({"plugins": [object()]}, "Pass instances to the trainer: SFTTrainer(..., plugins=[...])"),
        ({"streams": "data.jsonl"}, "streams: 'data.jsonl' in 'data.jsonl' is not of the form 'general=data.jsonl'"),
        ({"streams": ["data.jsonl"]}, "streams: ['data.jsonl'] is a list; expected a mapping"),
        ({"streams": "a=x,a=y"}, "streams: 'a=x,a=y' names 'a' twice"),
        ({"streams": '{"a": '}, "streams: '{\"a\": ' starts like JSON, but is not"),
        ({"streams": {"a": {"file": "x"}}}, "streams: 'a' is {'file': 'x'}; expected a path or a mapping with the key"),
        (
            {"streams": {"a": {"path": "x", "fraction": 1}}},
            "streams: 'a' has an unknown key 'fraction'. Known are path,",
        ),
        ({"streams": {"a": {"path": "x", "columns": "q"}}}, "streams: columns of 'a': 'q' in 'q' is not of the form"),
        ({"dataset_columns": "question"}, "dataset_columns: 'question' in 'question' is not of the form"),
        ({"dataset_columns": {"q": 3}}, "dataset_columns: {'q': 3} must give each column a new name"),
        (
            {"dataset_columns": "a=prompt,b=prompt"},
            "dataset_columns: 'a=prompt,b=prompt' gives two columns the same name",
        ),
        ({"nonfinite": "stop"}, "nonfinite: 'stop' is not one of raise, skip, ignore"),
        ({"rank_check_steps": -1}, "rank_check_steps: -1 is negative"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_and_quoted(settings, expected):
    with pytest.raises(ConfigurationError) as raised:
        make(**settings)
    assert expected in str(raised.value)


# Other people's configs


def test_a_config_of_ours_is_taken_as_it_is():
    config = make()
    assert upgrade_config(config, SFTConfig) is config


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_plain_trl_config_keeps_every_value(ours, theirs, monkeypatch):
    plain = make(theirs, learning_rate=3e-4, hub_token="secret")
    plain.max_steps = 77  # set after __post_init__, as scripts do
    monkeypatch.setattr(theirs, "__post_init__", lambda self: pytest.fail("__post_init__ ran again"))
    upgraded = upgrade_config(plain, ours)
    assert type(upgraded) is ours
    assert {key: value for key, value in vars(upgraded).items() if key not in ADDED} == vars(plain)
    assert (upgraded.plugins, upgraded.nonfinite) == ([], None)


def test_derived_values_of_a_grpo_config_do_not_clash_with_what_they_derive_from():
    plain = make(trl.GRPOConfig, steps_per_generation=2)
    assert plain.generation_batch_size is not None
    with pytest.raises(ValueError, match="can not be both configured"):
        GRPOConfig(**plain.to_dict())
    assert upgrade_config(plain, GRPOConfig).generation_batch_size == plain.generation_batch_size


def test_the_environment_s_plugins_reach_a_plain_config(monkeypatch):
    monkeypatch.setenv("TRL_EXT_PLUGINS", "power")
    assert upgrade_config(make(trl.SFTConfig), SFTConfig).plugins == [{"name": "power"}]


def test_a_user_s_subclass_stays_one():
    own = OwnConfig("out", extra=5, **CPU)
    upgraded = upgrade_config(own, SFTConfig)
    assert isinstance(upgraded, OwnConfig)
    assert isinstance(upgraded, SFTConfig)
    assert (upgraded.extra, upgraded.derived, upgraded.plugins) == (5, 10, [])
    assert {"extra", "plugins"} <= set(upgraded.to_dict())


def test_an_upgraded_subclass_can_be_saved_and_read(tmp_path):
    upgraded = upgrade_config(OwnConfig("out", extra=5, **CPU), SFTConfig)
    upgraded.plugins = CANONICAL
    torch.save(upgraded, tmp_path / "training_args.bin")
    read = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(read) is type(upgraded)
    assert (read.extra, read.derived, read.plugins) == (5, 10, CANONICAL)


def test_plain_training_arguments_become_what_trl_makes_of_them():
    plain = TrainingArguments("out", use_cpu=True, report_to="none", learning_rate=3e-4, hub_token="secret")
    ours, theirs = upgrade_config(plain, SFTConfig), trl.SFTConfig(**(plain.to_dict() | {"hub_token": "secret"}))
    assert type(ours) is SFTConfig
    assert ours.hub_token == "secret"
    assert {key: value for key, value in ours.to_dict().items() if key not in ADDED} == theirs.to_dict()


def test_no_config_becomes_the_default_one():
    @dataclasses.dataclass
    class OnCpu(SFTConfig):
        use_cpu: bool = True

    assert type(upgrade_config(None, OnCpu)) is OnCpu


@pytest.mark.parametrize("args", [{"learning_rate": 1}, "out", 3])
def test_anything_else_is_refused(args):
    with pytest.raises(ConfigurationError, match="pass a SFTConfig"):
        upgrade_config(args, SFTConfig)
