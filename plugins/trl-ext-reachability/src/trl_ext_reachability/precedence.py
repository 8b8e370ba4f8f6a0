"""Orders of plugins in which one would throw away the advantages that another has set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trl_ext.records import RunDescription
from trl_ext.specs import parse_specs, registered_name


def named_before(run: RunDescription, own: str, others: Iterable[str]) -> list[str]:
    """Those of the other plugins that come before the plugin `own`, whatever label the config gives them."""
    labels = {registered_name(spec): spec["name"] for spec in parse_specs(run.args.plugins)}
    names = [labels.get(name, name) for name in run.plugins]
    before = names[: names.index(own)] if own in names else []
    return [name for name in before if name in others]


def refuse_overwriting(run: RunDescription, own: str, advice: Mapping[str, str]) -> None:
    """Refuse that the plugin `own`, which sets advantages anew, comes after one whose advantages it would replace.

    Args:
        run: the run as asked for.
        own: name of the plugin that checks.
        advice: for each plugin that may not come before, what to do instead.

    Raises:
        ValueError: one of them does.
    """
    for name in named_before(run, own, advice):
        raise ValueError(
            f"{own} sets advantages anew, so that those of {name}, which is named before it, would be thrown away; "
            f"{advice[name]}"
        )
