"""Writes docs/conformance.yaml, which the gallery shows: `python docs/conformance.py [NAME ...]`.

It runs `trl-ext plugins check --run` for each plugin of this repository, or for those that are named, which takes a
minute each. A plugin that cannot run without data or models of its own has no entry; the kit is in its tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import yaml
from generated import DOCS

RESULTS = DOCS / "conformance.yaml"
HEADER = """\
# Written by docs/conformance.py. For each plugin and trainer the number of cases that passed; of the others the names,
# with the reason.
"""
AS = {
    "by-column": '{"name": "by-column", "column": "kind", "objectives": {"sum": "power:alpha=1", "text": "nll"}}',
    "gfpo": "gfpo:k=2",  # the default group of the kit has no more than the default k retains
    "pass-at-k": "pass-at-k:k=2",  # by default a set is a whole group of the kit, in which none stands out
    "lawa": "lawa:k=2,every=1",  # or there is no snapshot within three steps
    "threshold": "threshold:q=0.004",  # of an untrained model no token is as likely as the default asks
    "wit": "wit:prompt=0,response=0.5",  # a weight of the prompt needs settings of the run
}
"""How a plugin is named where its defaults do not run as they are."""
OWN_DATA = ("hpt", "process-reward", "reachability", "relift", "rho1", "rollout-filter")
"""Plugins that need demonstrations, a verifier, a probe, a reference or a reward of their own."""
Results = dict[str, dict[str, dict[str, Any]]]


def summary(outcomes: Iterable[tuple[str, str, str, str]]) -> dict[str, dict[str, Any]]:
    """By trainer, the number of cases passed and the reasons of the others; of (trainer, case, verdict, remark)."""
    found: dict[str, dict[str, Any]] = {}
    for trainer, case, verdict, remark in outcomes:
        of_trainer = found.setdefault(trainer, {"passed": 0})
        if verdict == "passed":
            of_trainer["passed"] += 1
        else:
            of_trainer.setdefault(verdict, {})[case] = remark
    return found


def in_words(results: dict[str, dict[str, Any]]) -> str:
    """What the gallery shows: "SFT 19 of 20"."""
    return ", ".join(
        f"{trainer.upper()} {found['passed']} of {found['passed'] + sum(len(found[v]) for v in found if v != 'passed')}"
        for trainer, found in results.items()
    )


def read() -> Results:
    """What was recorded last."""
    recorded: Results = yaml.safe_load(RESULTS.read_text()) or {}
    return recorded


def write(results: Results) -> None:
    """Record them."""
    RESULTS.write_text(HEADER + yaml.safe_dump(results, width=1000))


def main() -> None:
    from gallery import plugins

    from trl_ext.cli.conformance import run_cases

    named = sys.argv[1:] or [name for name in plugins() if name not in OWN_DATA]
    for name in named:
        found = run_cases(AS.get(name, name))
        outcomes = ((trainer, case, outcome.verdict, outcome.remark) for trainer, case, outcome in found)
        write(read() | {name: summary(outcomes)})
        print(name, in_words(read()[name]), flush=True)


if __name__ == "__main__":
    main()
