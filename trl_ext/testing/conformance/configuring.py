"""A case about options: that a config can give all of them."""

from __future__ import annotations

from pathlib import Path

from trl_ext.plugins.coercion import build_options, check_option_types
from trl_ext.plugins.written_options import written_options
from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import Subject


@case()
def options_in_config(subject: Subject, folder: Path) -> None:
    """Every option can be written in a config, and the values of this instance come back from one as they are.

    Installed plugins are named in YAML and on the command line. An option of a type that neither can write would only
    be found by its first user.
    """
    kind = type(subject.plugin)
    check_option_types(kind, kind.__name__)
    written = written_options(subject.plugin)
    read = build_options(kind, {"name": "plugin", **written}, kind.__name__)
    different = [name for name, value in read.items() if value != getattr(subject.plugin, name, value)]
    assert not different, (
        f"option {different[0]!r} is {getattr(subject.plugin, different[0])!r}, and a config gives "
        f"{read[different[0]]!r}"
    )
