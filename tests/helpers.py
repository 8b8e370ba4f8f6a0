"""What the tests of the core share: tiny runs, exact comparisons of what they leave behind, and small plugins."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.hookspecs import HOOKS
from trl_ext.records import TokenRecord
from trl_ext.testing.runs import tiny_model, without_timing

FIRST = ("sft", "grpo")
"""Trainers to try what does not depend on the trainer in: of labels, and of rewards."""
WITH_STREAMS = HOOKS["streams"].trainers
WITH_LOSSES = HOOKS["auxiliary_losses"].trainers

# A file's pickled config class differs by design; the others must not.
PICKLED_CONFIG = "training_args.bin"


def ending_model() -> Any:
    """A tiny model some of whose completions end early, so that masks and lengths differ within a batch."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[258] *= 30  # the end token
        model.lm_head.weight[:] *= 3
    return model


def assert_equal_bits(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ, first {different[0]}"


def assert_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def file_digests(folder: Path) -> dict[str, str]:
    """Every file below a folder by its relative path, with its content's hash; timings in JSON left out."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == PICKLED_CONFIG:
            continue
        content = path.read_bytes()
        if path.name == "trainer_state.json":
            state = json.loads(content)
            state["log_history"] = [without_timing(entry) for entry in state["log_history"]]
            # It holds the folder of the run.
            state["best_model_checkpoint"] = os.path.basename(state["best_model_checkpoint"] or "")
            content = json.dumps(state).encode()
        if path.name == "manifest.json":  # the checksums of what is left out here differ too
            manifest = json.loads(content)
            del manifest["checksum"]
            for name in (PICKLED_CONFIG, "trainer_state.json"):
                del manifest["files"][name]
            content = json.dumps(manifest).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return digests


# -- plugins that tests share ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Plugin:
    """Base of test plugins."""

    requires_api: ClassVar[str] = "1"


@dataclass(eq=False)
class Nll(Plugin):
    """The objective that plain TRL has."""

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        return -tokens.log_probs


@dataclass(eq=False)
class Idle(Plugin):
    """Active, and without effect."""

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        return {}
