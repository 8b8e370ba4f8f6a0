"""`trl-ext plugins check --run`: the conformance kit on an installed plugin, without a test file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from trl_ext.hookspecs import HOOKS
from trl_ext.plugins.activation import from_spec
from trl_ext.plugins.implementations import marked_hooks
from trl_ext.plugins.plugin_set import ActivePlugin
from trl_ext.records import TRAINERS, TrainerKind
from trl_ext.specs import parse_one
from trl_ext.testing.conformance import Outcome, Subject, cases_of, outcome_of


def run_cases(text: str) -> Iterator[tuple[TrainerKind, str, Outcome]]:
    """Run all cases of a plugin, in each trainer that it acts in; gives trainer, case and outcome one by one.

    Args:
        text: the plugin, with options as in a config: `power:alpha=10`.

    Raises:
        ConfigurationError: it is not one plugin, or cannot be activated.
    """
    active = from_spec(parse_one(text))
    for trainer in _trainers(active):
        subject = Subject(active.instance, trainer)
        with TemporaryDirectory(prefix="conformance-") as folder:
            for case in cases_of(subject):
                with _quiet():
                    outcome = outcome_of(case, subject, Path(folder, case.name))
                yield trainer, case.name, outcome


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what trainers print and warn of: a tiny run's says nothing of the plugin."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def _trainers(active: ActivePlugin) -> list[TrainerKind]:
    """The trainers that a plugin is for and acts in by itself.

    Outside of SFT an objective of supervised data is called for streams alone, which a plugin without any leaves to
    another one. A reward model takes no streams.
    """
    hooks = {name for name in marked_hooks(active.instance) if not HOOKS[name].bystander}
    of_streams_of_others = "per_token_loss" in hooks and "streams" not in hooks
    streams = [request for request in active.instance.streams() if not request.optional] if "streams" in hooks else []

    def acts(trainer: TrainerKind) -> bool:
        called = any(trainer in HOOKS[name].trainers for name in hooks)
        without_streams = trainer not in HOOKS["streams"].trainers
        return called and not (trainer != "sft" and of_streams_of_others) and not (streams and without_streams)

    return [trainer for trainer in TRAINERS if trainer in active.declared.trainers and acts(trainer)]
