"""What plugins declare of each other: provided words, conflicts and orders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.plugins import activate


class Plugin:
    @hookimpl
    def metrics(self):
        return {}


def plugin(name: str, **declared: Any) -> Any:
    return type(name, (Plugin,), declared)()


def refusal(*plugins: Any) -> str:
    with pytest.raises(ConfigurationError) as raised:
        activate(None, plugins, trainer="sft")
    return str(raised.value)


def names(*plugins: Any) -> tuple[str, ...]:
    return activate(None, plugins, trainer="sft").names


SFT = {"provides": ("sft in the step",), "conflicts": {"sft in the step": "Each would bring SFT into the step."}}


@pytest.mark.parametrize("flip", [False, True])
def test_a_conflict_names_both_plugins_the_reason_and_the_lines(flip):
    pair = [plugin("Loud", conflicts={"Quiet": "Nothing would be heard; turn one down"}), plugin("Quiet")]
    message = refusal(*reversed(pair) if flip else pair)
    assert message.startswith("plugin 'Loud' (class Loud of tests.test_relations) does not run beside 'Quiet' (class ")
    assert message.endswith(
        "Nothing would be heard; turn one down. Keep one of plugins=[Loud(...)] or plugins=[Quiet(...)]"
    )


def test_two_that_provide_a_word_and_conflict_with_it_exclude_each_other_and_no_third():
    one, other = plugin("One", **SFT), plugin("Other", **SFT)
    assert "Each would bring SFT into the step." in refusal(one, other)
    assert names(one, plugin("Third", provides=("averages",))) == ("One", "Third")


def test_a_plugin_that_conflicts_with_its_own_name_cannot_come_twice(site):
    source = """
    from dataclasses import dataclass
    from trl_ext import hookimpl

    @dataclass
    class Plugin:
        conflicts = {"single": "One is enough."}

        @hookimpl
        def setup(self): pass
    """
    site.add("trl-ext-single", plugins={"single": "single_pkg:Plugin"}, files={"single_pkg.py": source})
    assert activate("single:label=only", trainer="sft").names == ("only",)
    with pytest.raises(ConfigurationError, match=r"'a' .*does not run beside 'b' .*One is enough"):
        activate("single:label=a,single:label=b", trainer="sft")


def test_an_order_is_held_among_the_plugins_that_provide_the_word():
    setter = plugin("Setter", provides=("sets advantages",))
    scaler = plugin("Scaler", after={"sets advantages": "What it scales would be set anew."})
    assert names(setter, scaler) == ("Setter", "Scaler")
    assert names(scaler) == ("Scaler",)
    message = refusal(scaler, setter)
    assert message.startswith("plugin 'Scaler' (class Scaler of tests.test_relations) has to be named after 'Setter' ")
    assert message.endswith("What it scales would be set anew. Put plugins=[Setter(...)] before plugins=[Scaler(...)]")


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"provides": "averages"}, "declares provides = 'averages', a bare text; write provides = ('averages',)"),
        ({"provides": (1,)}, "declares provides = (1,), which is not a tuple of texts"),
        ({"conflicts": ("ema",)}, "declares conflicts = ('ema',), which is not a mapping from words to reasons"),
        ({"after": {"ema": ""}}, "declares after = {'ema': ''}, which is not a mapping from words to reasons"),
        ({"after": {"Odd": "No."}}, "declares after = {'Odd': ...}, a word that it provides itself"),
        ({"trainers": "sft"}, "declares trainers = 'sft', a bare text; write trainers = ('sft',)"),
        ({"trainers": ("sfT",)}, "declares trainers = ('sfT',); name one or more of sft, grpo"),
        ({"fused_outputs": "is_top1"}, "declares fused_outputs = 'is_top1', a bare text; write fused_outputs = ("),
        ({"trainers": ()}, "declares trainers = (); name one or more of sft, grpo"),
        ({"state_dict": lambda self: {}}, "has state_dict without load_state_dict, so that its state would not"),
        ({"load_state_dict": lambda self, state: None}, "has load_state_dict without state_dict"),
    ],
)
def test_a_declaration_of_another_form_is_refused(declared: Mapping[str, Any], expected):
    message = refusal(plugin("Odd", **declared))
    assert message.startswith(f"plugin 'Odd' (class Odd of tests.test_relations) {expected}")
    assert message.endswith(", or remove plugins=[Odd(...)]")
