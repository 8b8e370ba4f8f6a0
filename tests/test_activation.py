"""From what a config says to an ordered set of plugins, and what every refusal tells."""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from trl_ext import API_VERSION, hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS
from trl_ext.options import Range
from trl_ext.plugins import PluginSet, activate
from trl_ext.plugins.coercion import coerce
from trl_ext.specs import parse_specs


class Reduction(enum.Enum):
    SUM = 1
    MEAN = 2


EXCLUSIVE = [hook for hook, facts in HOOKS.items() if facts.kind == "exclusive"]
HEADER = """
    from dataclasses import dataclass, field
    from typing import ClassVar, Literal
    from trl_ext import hookimpl
"""
POWDER = (
    HEADER
    + """
    @dataclass
    class Plugin:
        alpha: float = 1.0
        order: int = 2
        layers: list[int] = field(default_factory=list)
        mode: Literal["soft", "hard"] = "soft"

        citation: ClassVar[str] = "A paper, arXiv:0000.00000"

        def __post_init__(self):
            if self.alpha < 0:
                raise ValueError(f"alpha={self.alpha} is negative")

        @hookimpl
        def weights_updated(self, step, weights):
            return ("powder", self.alpha, step, weights)
"""
)


def add_plugin(site, name: str, source: str) -> None:
    site.add(f"trl-ext-{name}", plugins={name: f"{name}_pkg:Plugin"}, files={f"{name}_pkg/__init__.py": source})


def add_hooks(site, name: str, body: str) -> None:
    """Install a plugin whose class body is `body`."""
    indented = "".join(f"        {line}\n" for line in body.splitlines())
    add_plugin(site, name, HEADER + f"    @dataclass\n    class Plugin:\n{indented}")


def message_of(specs: Any, instances: Any = (), trainer: str = "sft") -> str:
    with pytest.raises(ConfigurationError) as raised:
        activate(specs, instances, trainer=trainer)
    return str(raised.value)


# What a config may say


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (None, []),
        ("", []),
        ([], []),
        ("power", [{"name": "power"}]),
        ("power:", [{"name": "power"}]),
        ("power:alpha=10", [{"name": "power", "alpha": "10"}]),
        ("power:alpha=,tag=aba", [{"name": "power", "alpha": "", "tag": "aba"}]),
        ("power:alpha=10,order=3", [{"name": "power", "alpha": "10", "order": "3"}]),
        ("power:alpha=10, ema ,", [{"name": "power", "alpha": "10"}, {"name": "ema"}]),
        (
            "power:a=1,b=2,ema:decay=0.9,c=3",
            [{"name": "power", "a": "1", "b": "2"}, {"name": "ema", "decay": "0.9", "c": "3"}],
        ),
        ("lora:layers=[0,1],path=C:/x", [{"name": "lora", "layers": "[0,1]", "path": "C:/x"}]),
        ("lora:text='a,b=c',rank={\"a\": [1, 2]}", [{"name": "lora", "text": "a,b=c", "rank": '{"a": [1, 2]}'}]),
        ("wise-ft:ratio=a=b", [{"name": "wise-ft", "ratio": "a=b"}]),
        (["power:alpha=10", "ema"], [{"name": "power", "alpha": "10"}, {"name": "ema"}]),
        (["power,ema"], [{"name": "power"}, {"name": "ema"}]),
        ({"name": "ema", "decay": 0.9}, [{"name": "ema", "decay": 0.9}]),
        ({"decay": 0.9, "name": "ema"}, [{"name": "ema", "decay": 0.9}]),
        (["power", {"name": "ema", "layers": (1, 2)}], [{"name": "power"}, {"name": "ema", "layers": [1, 2]}]),
        (
            '[{"name": "ema", "decay": 0.9}, "power:alpha=1"]',
            [{"name": "ema", "decay": 0.9}, {"name": "power", "alpha": "1"}],
        ),
        (['{"name": "ema", "on": true}', "power"], [{"name": "ema", "on": True}, {"name": "power"}]),
        ("ema:label=slow,ema:label=fast", [{"name": "ema", "label": "slow"}, {"name": "ema", "label": "fast"}]),
        ("some-dist/power:alpha=1", [{"name": "some-dist/power", "alpha": "1"}]),
        ("./my_plugin.py:Focal:gamma=1", [{"name": "./my_plugin.py:Focal", "gamma": "1"}]),
        ("../other place/f.py:Focal, ema", [{"name": "../other place/f.py:Focal"}, {"name": "ema"}]),
        ("f.py:focal:gamma=1,b=C:/x", [{"name": "f.py:focal", "gamma": "1", "b": "C:/x"}]),
        ("package.module:Focal", [{"name": "package.module:Focal"}]),
        ("module:_Focal:gamma=1", [{"name": "module:_Focal", "gamma": "1"}]),
        ({"name": "./f.py:Focal", "gamma": 1}, [{"name": "./f.py:Focal", "gamma": 1}]),
        ("power:Alpha=1", [{"name": "power", "Alpha": "1"}]),
    ],
)
def test_every_form_of_a_setting_has_one_canonical_form(written, canonical):
    assert parse_specs(written) == canonical
    assert parse_specs(canonical) == canonical
    assert [next(iter(spec)) for spec in parse_specs(written)] == ["name"] * len(canonical)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("alpha=1", "'alpha=1' starts with an option; write the plugin first"),
        (["power", "alpha=1"], "'alpha=1' starts with an option; write the plugin first"),
        ("power:alpha", "'alpha' in 'power:alpha' is not of the form option=value"),
        ("power:alpha=1,alpha=2", "sets 'alpha' of 'power' twice"),
        ("power:name=ema", "sets 'name' of 'power' twice"),
        ("power:layers=[0,1", "'[' is never closed"),
        ("power:layers=0]", "']' at character 15 closes nothing"),
        ("power:text='a", '"\'" is never closed'),
        ("pow er", "name 'pow er' in 'pow er' is not a name"),
        ("a/b/power", "name 'a/b/power' in 'a/b/power' is not a name"),
        ("./focal.py", "'./focal.py' in './focal.py' is a file; name the class too: ./focal.py:MyPlugin"),
        ({"name": "./focal.py", "gamma": 1}, "name the class too: ./focal.py:MyPlugin"),
        ("./focal.py:gamma=1", "name the class too: ./focal.py:MyPlugin"),
        ("one/power,two/power", "label each: plugins: [one/power:label=first, two/power:label=second]"),
        ("./a.py:Focal,b:Focal", "'Focal' comes more than once"),
        ("ema:label=a/b", "label 'a/b' in 'ema:label=a/b' is not a name"),
        ({"name": "ema", "label": 3}, "label 3 in"),
        ({"power": {"alpha": 1}}, "{'power': {'alpha': 1}} has no key 'name'"),
        ('[{"name": "ema"]', "starts like JSON, but is not"),
        (3, "plugins: 3 is a int; expected a name such as"),
        (["power", None], "plugins: None is a NoneType"),
        ([{"name": "ema", "dtype": object}], "cannot be saved with the run"),
        ("ema,ema", "'ema' comes more than once. Keep one; or, of a plugin that can run beside another"),
        ("ema,ema:label=slow", "'ema' comes more than once"),
        ("ema:label=slow,ema:label=slow", "'slow' comes more than once"),
        ("power,ema:label=power", "'power' comes more than once"),
    ],
)
def test_a_setting_that_cannot_be_read_is_quoted(written, expected):
    with pytest.raises(ConfigurationError) as raised:
        parse_specs(written)
    assert expected in str(raised.value)


def test_an_instance_in_a_config_is_sent_to_the_trainer():
    @dataclass
    class Mine:
        alpha: float = 1.0

    for instance in (Mine(), Mine):
        with pytest.raises(ConfigurationError, match=re.escape("SFTTrainer(..., plugins=[...])")):
            parse_specs([instance])


# Values


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", int, 3),
        (3, float, 3.0),
        ("3e-4", float, 3e-4),
        ("inf", float, float("inf")),
        ("x", str, "x"),
        ("true", bool, True),
        ("No", bool, False),
        (True, bool, True),
        ("none", int | None, None),
        (None, int | None, None),
        ("4", int | None, 4),
        ("none", str | None, None),
        ("text", float | str, "text"),
        ("0.5", str | float, 0.5),
        ("1", bool | float, 1.0),
        ("true", bool | float, True),
        ("auto", Literal["auto"] | float, "auto"),
        ("hard", Literal["soft", "hard"], "hard"),
        ("2", Literal[1, 2], 2),
        ("[0, 1]", list[int], [0, 1]),
        ("[q_proj, 'v,o']", list[str], ["q_proj", "v,o"]),
        ("(0.9,0.99)", tuple[float, float], (0.9, 0.99)),
        ([1, "2"], tuple[int, ...], (1, 2)),
        ("[]", list[int], []),
        ('{"a": 1}', dict[str, float], {"a": 1.0}),
        ({"a": "1"}, dict[str, float], {"a": 1.0}),
        ([[1], [2, 3]], list[list[int]], [[1], [2, 3]]),
        ("[1, two]", list, ["1", "two"]),
        ("data/x", Path, Path("data/x")),
        ("none", Path | None, None),
        ("3", Path | int, 3),
        ("MEAN", Reduction, Reduction.MEAN),
        ("text", Reduction | str, "text"),
        ("[1, 2]", Sequence[int], (1, 2)),
        (["a"], Sequence[Path], (Path("a"),)),
        ("[a]", Sequence, ("a",)),
        ('{"a": 1}', Mapping[str, float], {"a": 1.0}),
        ("0.5", Annotated[float, Range(gt=0)], 0.5),
        ("[1]", list[Annotated[int, Range(ge=1)]], [1]),
        ("auto", Literal["auto"] | Annotated[float, Range(gt=0)], "auto"),
        ("2", Annotated[str, "unit"] | Annotated[int, Range(ge=1)], 2),
        ({"x": [1]}, Any, {"x": [1]}),
    ],
)
def test_a_value_takes_the_annotated_type(value, annotation, expected):
    result = coerce(value, annotation)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("ten", float, "expected float, got 'ten' (str)"),
        (True, float, "expected float, got True (bool)"),
        (1, bool, "expected bool, got 1 (int)"),
        (1.5, int, "expected int, got 1.5 (float)"),
        ("1.5", int, "expected int, got '1.5' (str)"),
        (3, str, "expected str, got 3 (int)"),
        ("soft", Literal["a", "b"], "expected one of 'a', 'b', got 'soft' (str)"),
        (True, Literal[1, 2], "expected one of 1, 2, got True (bool)"),
        ("x", int | None, "expected int | None, got 'x' (str)"),
        ("5", list[int], "expected list[int], got 5 (int)"),
        ("x", list[int], "expected list[int], got 'x' (str)"),
        (["x"], list[int], "expected int, got 'x' (str)"),
        ([1, 2, 3], tuple[int, int], "expected tuple[int, int], got 3 values"),
        ([1], dict[str, int], "expected dict[str, int], got [1] (list)"),
        (3, Path, "expected Path, got 3 (int)"),
        ("mean", Reduction, "expected one of SUM, MEAN, got 'mean' (str)"),
        (1, Reduction, "expected one of SUM, MEAN, got 1 (int)"),
        ("x", Sequence[int], "expected Sequence[int], got 'x' (str)"),
        ([1], Mapping[str, int], "expected Mapping[str, int], got [1] (list)"),
        ("x", Annotated[float, Range(ge=0, lt=1)], "expected float, got 'x' (str)"),
    ],
)
def test_a_value_of_another_type_is_refused(value, annotation, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        coerce(value, annotation)


def test_a_type_that_no_text_can_give_is_refused():
    with pytest.raises(TypeError, match="type object cannot be written in a config"):
        coerce("x", object)


# Options


def test_options_reach_the_plugin_and_the_record_of_the_run(site):
    add_plugin(site, "powder", POWDER)
    (plugin,) = activate("powder:alpha=10,layers=[1,2]", trainer="sft")
    assert (plugin.instance.alpha, plugin.instance.layers, plugin.instance.order) == (10.0, [1, 2], 2)
    assert plugin.options == {"alpha": 10.0, "order": 2, "layers": [1, 2], "mode": "soft"}
    assert (plugin.name, plugin.distribution, plugin.version) == ("powder", "trl-ext-powder", "1.2")
    assert plugin.citation == "A paper, arXiv:0000.00000"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "powder:alhpa=1",
            "plugin 'powder' (trl-ext-powder 1.2) has no option 'alhpa'. Did you mean 'alpha'? "
            "Its options: alpha, order, layers, mode. Change plugins: [powder:alhpa=1]",
        ),
        (
            "powder:alpha=ten,order=3",
            "plugin 'powder' (trl-ext-powder 1.2), option 'alpha': expected float, got 'ten' (str). "
            "Change it to plugins: [powder:alpha=<float>,order=3]",
        ),
        (
            {"name": "powder", "mode": "loud"},
            "option 'mode': expected one of 'soft', 'hard', got 'loud' (str). Change it to plugins: [powder:mode=<",
        ),
        (
            "powder:alpha=-1",
            "plugin 'powder' (trl-ext-powder 1.2) refuses its options: alpha=-1.0 is negative. "
            "Change plugins: [powder:alpha=-1]",
        ),
    ],
    ids=["unknown", "type", "choice", "range"],
)
def test_a_bad_option_names_plugin_distribution_and_line(site, spec, expected):
    add_plugin(site, "powder", POWDER)
    assert expected in message_of(spec)


def test_an_option_without_an_annotation_is_named(site):
    add_hooks(site, "bare", "alpha = 2.0\n@hookimpl\ndef setup(self): pass")
    assert "no option 'alpha'. Its class sets one without an annotation: write `alpha: <type> = ...`" in message_of(
        "bare:alpha=3"
    )


@pytest.mark.parametrize("spec", ["powder:share=2", {"name": "powder", "share": 2}])
def test_a_value_outside_its_range_names_plugin_option_and_line(site, spec):
    source = POWDER.replace(
        "alpha: float = 1.0", "alpha: float = 1.0\n        share: Annotated[float, Range(le=1)] = 0.5"
    )
    source = source.replace("ClassVar, Literal", "Annotated, ClassVar, Literal\n    from trl_ext.options import Range")
    add_plugin(site, "powder", source)
    assert message_of(spec) == (
        "plugin 'powder' (trl-ext-powder 1.2): share=2.0 is not <= 1. Change it to plugins: [powder:share=<float <= 1>]"
    )


def test_a_missing_value_names_its_type(site):
    add_hooks(site, "needy", "path: str\n@hookimpl\ndef setup(self): pass")
    assert message_of("needy") == (
        "plugin 'needy' (trl-ext-needy 1.2) needs a value for option 'path' (str): plugins: [needy:path=<str>]"
    )


def test_an_error_of_post_init_is_the_cause(site):
    add_plugin(site, "powder", POWDER)
    with pytest.raises(ConfigurationError) as raised:
        activate("powder:alpha=-1", trainer="sft")
    assert isinstance(raised.value.__cause__, ValueError)


def test_options_are_read_beside_fields_whose_types_only_a_checker_knows(site):
    source = """
    from __future__ import annotations
    from dataclasses import dataclass, field
    from typing import TYPE_CHECKING
    from trl_ext import hookimpl
    if TYPE_CHECKING:
        from torch import Tensor

    @dataclass
    class Plugin:
        alpha: float = 1.0
        state: list[Tensor] = field(default_factory=list, init=False)

        @hookimpl
        def setup(self): pass
    """
    add_plugin(site, "typed", source)
    (plugin,) = activate("typed:alpha=2", trainer="sft")
    assert plugin.options == {"alpha": 2.0}
    assert "has no option 'state'" in message_of("typed:state=1")


def test_an_inherited_option_is_one_too(site):
    source = (
        POWDER.replace("class Plugin", "class Base")
        + "\n    @dataclass\n    class Plugin(Base):\n        beta: int = 1\n"
    )
    add_plugin(site, "child", source)
    (plugin,) = activate("child:alpha=3,beta=4", trainer="sft")
    assert (plugin.options["alpha"], plugin.options["beta"]) == (3.0, 4)


@pytest.mark.parametrize("reserved", ["name", "label"])
def test_an_option_may_not_take_a_reserved_name(site, reserved):
    add_hooks(site, "greedy", f"{reserved}: str = ''\n@hookimpl\ndef setup(self): pass")
    assert f"'greedy' (trl-ext-greedy 1.2) has an option '{reserved}', a name that configs reserve" in message_of(
        "greedy"
    )


# Order, names, calls


def add_recorders(site) -> None:
    for name in ("first", "second", "third"):
        add_hooks(site, name, f"@hookimpl\ndef metrics(self, mode): return {{'{name}': mode}}")


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first", "second")])
def test_calls_run_in_the_order_of_the_config(site, order):
    add_recorders(site)
    plugins = activate(list(order), trainer="sft")
    assert plugins.names == order
    assert [(name, call(mode="train")) for name, call in plugins.calls("metrics")] == [
        (name, {name: "train"}) for name in order
    ]
    assert plugins.manager.hook.metrics(mode="train") == [{name: "train"} for name in order]


def test_a_call_passes_what_the_implementation_asks_for_in_its_own_order(site):
    add_plugin(site, "powder", POWDER)
    ((_, call),) = activate("powder:alpha=3", trainer="sft").calls("weights_updated")
    assert call(weights="w", step=7, skipped=False) == ("powder", 3.0, 7, "w")


def test_one_plugin_may_run_twice_under_two_labels(site):
    add_plugin(site, "powder", POWDER)
    plugins = activate(["powder:label=a", {"name": "powder", "label": "b"}], trainer="sft")
    assert plugins.names == ("a", "b")
    assert [name for name, _ in plugins.calls("weights_updated")] == ["a", "b"]
    assert "label" not in plugins.plugins[0].options


def test_instances_follow_the_config_s_plugins(site):
    add_recorders(site)

    class Mine:
        @hookimpl
        def metrics(self):
            return {}

    plugins = activate("second", [Mine()], trainer="sft")
    assert plugins.names == ("second", "Mine")
    assert (plugins.plugins[1].distribution, plugins.plugins[1].options) == (None, {})


def test_an_empty_set_is_false_and_has_no_calls():
    plugins = PluginSet()
    assert not plugins
    assert (len(plugins), list(plugins), plugins.names) == (0, [], ())
    assert all(plugins.calls(hook) == [] and not plugins.implements(hook) for hook in HOOKS)
    assert all(plugins.owner(hook) is None for hook in EXCLUSIVE)


def test_the_owner_of_an_exclusive_hook_is_known(site):
    add_hooks(site, "loss", "@hookimpl\ndef per_token_loss(self, tokens): return tokens")
    add_recorders(site)
    plugins = activate("first,loss", trainer="sft")
    assert plugins.owner("per_token_loss") == "loss"
    assert plugins.owner("deployed_weights") is None
    assert plugins.implements("per_token_loss")
    with pytest.raises(KeyError, match="not an exclusive hook"):
        plugins.owner("metrics")


@pytest.mark.parametrize("hook", EXCLUSIVE)
def test_two_owners_of_an_exclusive_hook_are_both_named(site, hook):
    arguments = {
        "sample_weights": "window",
        "deployed_weights": "weights",
        "sampling_weights": "weights",
    }.get(hook, "tokens")
    body = f"alpha: int = 1\n@hookimpl\ndef {hook}(self, {arguments}): pass\n@hookimpl\ndef metrics(self): pass"
    for name in ("mine", "yours"):
        add_hooks(site, name, body)
    trainer = HOOKS[hook].trainers[0]
    assert message_of("mine:alpha=2,yours", trainer=trainer) == (
        f"hook '{hook}' can have one owner, and 'mine' (trl-ext-mine 1.2) and 'yours' (trl-ext-yours 1.2) claim it. "
        "Keep one of plugins: [mine:alpha=2] or plugins: [yours]"
    )


# Hooks written wrongly


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "@hookimpl\ndef per_token_los(self): pass",
            "there is no hook 'per_token_los'. Did you mean 'per_token_loss'?",
        ),
        ("@hookimpl\ndef zzz(self): pass", "there is no hook 'zzz'. Hooks: check, streams"),
        ("def metrics(self): pass", "'metrics' is the name of a hook, but it is not a method marked @hookimpl"),
        (
            "streams: int = 3\n@hookimpl\ndef setup(self): pass",
            "'streams' is the name of a hook, but it is not a method",
        ),
        (
            "check: int = field(default=3, init=False)\n@hookimpl\ndef setup(self): pass",
            "'check' is the name of a hook",
        ),
        ("@property\ndef metrics(self): raise SystemExit", "'metrics' is the name of a hook, but it is not a method"),
        (
            "@hookimpl\ndef weights_updated(self, weight): pass",
            r"it has no argument 'weight'. Did you mean 'weights'\? Its arguments: weights, step, skipped",
        ),
        ("@hookimpl\ndef streams(self, x): pass", "it has no argument 'x'. Its arguments: none"),
        ("@hookimpl\ndef deployed_weights(self): yield", "it is a generator, .* write @contextmanager between"),
        ("@hookimpl\nasync def setup(self): pass", "it is async, so that calling it would run nothing"),
        ("@hookimpl\ndef weights_updated(self, step=0): pass", "argument 'step=0' would never be passed"),
        ("@hookimpl\ndef setup(self, **rest): pass", r"argument '\*\*rest' would never be passed"),
        ("@hookimpl\ndef setup(self, *, context): pass", "argument 'context' would never be passed"),
        (
            "@hookimpl(tryfirst=True)\ndef setup(self): pass",
            r"hook 'setup': @hookimpl\(tryfirst=...\) is not supported",
        ),
        ("@hookimpl(trylast=True)\ndef setup(self): pass", r"@hookimpl\(trylast=...\) is not supported"),
        ("@hookimpl(wrapper=True)\ndef setup(self): yield", r"@hookimpl\(wrapper=...\) is not supported"),
        ("@hookimpl(hookwrapper=True)\ndef setup(self): yield", r"@hookimpl\(hookwrapper=...\) is not supported"),
        ("@hookimpl(optionalhook=True)\ndef setup(self): pass", r"@hookimpl\(optionalhook=...\) is not supported"),
        ("@hookimpl(specname='setup')\ndef check(self): pass", r"@hookimpl\(specname=...\) is not supported"),
        ("alpha: int = 1", "implements no hook; mark its methods with @hookimpl"),
    ],
)
def test_a_hook_written_wrongly_is_refused_with_plugin_and_line(site, body, expected):
    add_hooks(site, "wrong", body)
    message = message_of("wrong")
    assert re.search(expected, message, re.DOTALL), message
    assert message.startswith("plugin 'wrong' (trl-ext-wrong 1.2)")
    assert message.endswith("plugins: [wrong]")


def test_an_override_without_its_marker_is_refused(site):
    body = "\n    @dataclass\n    class Plugin(Base):\n        def weights_updated(self, step): pass\n"
    add_plugin(site, "child", POWDER.replace("class Plugin", "class Base") + body)
    assert "'weights_updated' is the name of a hook, but it is not a method marked @hookimpl" in message_of("child")


# The trainer


@pytest.mark.parametrize(
    ("body", "trainer", "expected"),
    [
        ("trainers = ('grpo',)\n@hookimpl\ndef setup(self): pass", "sft", "is for the trainers grpo, and this is sft"),
        ("trainers = ['sft']\n@hookimpl\ndef setup(self): pass", "grpo", "is for the trainers sft, and this is grpo"),
        (
            "@hookimpl\ndef policy_loss(self, tokens): pass\n@hookimpl\ndef setup(self): pass",
            "sft",
            "acts only through policy_loss, which sft never calls",
        ),
        (
            "@hookimpl\ndef sample_weights(self, window): pass",
            "grpo",
            "acts only through sample_weights, which grpo never",
        ),
    ],
)
def test_a_plugin_for_another_trainer_is_refused(site, body, trainer, expected):
    add_hooks(site, "other", body)
    message = message_of("other", trainer=trainer)
    assert message.startswith("plugin 'other' (trl-ext-other 1.2)")
    assert expected in message
    assert message.endswith("Remove plugins: [other]")
    activate("other", trainer={"sft": "grpo", "grpo": "sft"}[trainer])


def test_a_plugin_with_work_in_both_trainers_is_accepted_by_both(site):
    add_hooks(
        site,
        "both",
        "@hookimpl\ndef advantages(self, advantages): pass\n@hookimpl\ndef per_token_loss(self, tokens): pass",
    )
    assert activate("both", trainer="sft").names == activate("both", trainer="grpo").names == ("both",)


# Instances


@dataclass
class Equal:
    alpha: float = 1.0
    helper: Any = field(default=print)

    @hookimpl
    def metrics(self, mode):
        return {"alpha": self.alpha}


def test_equal_unhashable_instances_do_not_collide():
    one, two = Equal(), Equal()
    one.label, two.label = "one", "two"
    assert one == two
    with pytest.raises(TypeError):
        hash(one)
    plugins = activate(None, [one, two], trainer="sft")
    assert [(name, call(mode="train")) for name, call in plugins.calls("metrics")] == [
        ("one", {"alpha": 1.0}),
        ("two", {"alpha": 1.0}),
    ]


def test_an_instance_whose_comparison_fails_is_accepted():
    class Tensorlike(Equal):
        def __eq__(self, other):
            raise RuntimeError("ambiguous")

    assert activate(None, [Tensorlike()], trainer="sft").names == ("Tensorlike",)


def test_paths_and_members_are_recorded_as_a_config_writes_them():
    (plugin,) = activate(None, [Equal(alpha=Path("a/b"), helper=Reduction.MEAN)], trainer="sft")
    assert plugin.options == {"alpha": "a/b", "helper": "MEAN"}


def test_what_json_cannot_hold_is_recorded_by_its_repr():
    (plugin,) = activate(None, [Equal()], trainer="sft")
    assert plugin.options == {"alpha": 1.0, "helper": repr(print)}


def test_an_instance_of_an_installed_plugin_goes_under_its_name(site):
    add_plugin(site, "powder", POWDER)
    (made,) = activate("powder", trainer="sft")
    (given,) = activate(None, [made.instance], trainer="sft")
    assert (given.name, given.distribution, given.version) == ("powder", "trl-ext-powder", "1.2")


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([Equal], "plugins=[Equal] is a class; make an instance: plugins=[Equal(...)]"),
        (
            ["power"],
            "plugins=['power'] of a trainer takes instances; names go into its config: SFTConfig(plugins=[...])",
        ),
        ([{"name": "power"}], "names go into its config"),
        ([None], "names go into its config"),
        ([Equal()] * 2, "plugins=[Equal(...)]: the same instance"),
        ([Equal(), Equal(2.0)], "a plugin named 'Equal' is already active. Take one of them out"),
        ([object()], "implements no hook"),
    ],
    ids=["class", "text", "mapping", "none", "twice", "same name", "no hook"],
)
def test_what_is_no_new_instance_of_a_plugin_is_refused(instances, expected):
    assert expected in message_of(None, instances)


def test_an_instance_s_ranges_and_hooks_are_checked_too():
    class Future:
        requires_api = "2"

        @hookimpl
        def setup(self):
            pass

    class Misspelt:
        @hookimpl
        def setpu(self):
            pass

    assert "plugins=[Future(...)]" in message_of(None, [Future()])
    assert f"needs plugin API >=2,<3, but {API_VERSION} is installed" in message_of(None, [Future()])
    assert "Did you mean 'setup'" in message_of(None, [Misspelt()])
    assert "(class " in message_of(None, [Misspelt()])
    assert "plugins=[Misspelt(...)]" in message_of(None, [Misspelt()])


SECRETIVE = """
endpoint: str = field(default="", repr=False)
count: int = 1
trainers: ClassVar = ("sft",)

def __post_init__(self):
    if self.count < 0:
        raise ValueError("it has to be positive")

@hookimpl
def setup(self): pass
"""


@pytest.mark.parametrize(
    ("options", "trainer"),
    [({"count": "many"}, "sft"), ({"cuont": 1}, "sft"), ({"count": -1}, "sft"), ({}, "grpo")],
    ids=["wrong type", "unknown", "refused by the plugin", "other trainer"],
)
def test_no_line_to_change_shows_what_a_plugin_hides(site, options, trainer):
    add_hooks(site, "judge", SECRETIVE)
    message = message_of([{"name": "judge", "endpoint": "swordfish", **options}], trainer=trainer)
    assert "endpoint=***" in message
    assert "swordfish" not in message
