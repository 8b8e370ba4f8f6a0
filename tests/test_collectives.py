"""The collectives that plugins add to an optimiser step are those that docs/scale.md counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from collectives import GRADIENTS, of_one_step
from documents import ROOT
from helpers import Idle
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext.testing import save_model
from trl_ext.testing.ranks import on_ranks
from trl_ext.testing.runs import additions, make_grpo, make_sft, tiny_model, tokenizer

pytestmark = pytest.mark.slow

TARGET, GENERAL, SFT = ({role: None} for role in ("target", "general", "sft"))

# Row of the table -> the trainer, and what it gets beside the settings of all.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "no plugin": ("sft", {}),
    "any plugin": ("sft", {"plugins": [Idle()]}),
    "`power` and the other objectives": ("sft", {"names": ["power"]}),
    "`weighted`": ("sft", {"names": ["weighted"], "train": "weights"}),
    "`ema` and the other averages": ("sft", {"names": ["ema"]}),
    "`gradient-surgery`": ("sft", {"names": ["gradient-surgery"], "streams": GENERAL}),
    "`data-regularization`": ("sft", {"names": ["data-regularization"], "streams": TARGET}),
    "`data-regularization:scope=global,engine=derivative`": (
        "sft",
        {"names": ["data-regularization:scope=global,engine=derivative"], "streams": TARGET},
    ),
    "GRPO: no plugin": ("grpo", {}),
    "GRPO: `best-of-m`": ("grpo", {"names": ["best-of-m"]}),
    "GRPO: `pg`": ("grpo", {"names": ["pg"]}),
    "GRPO: `adaptive-lr`": ("grpo", {"names": ["adaptive-lr"]}),
    "GRPO: `chord`": ("grpo", {"names": ["chord"], "streams": SFT}),
    "GRPO: `parallel-averaging`": ("grpo", {"names": ["parallel-averaging"], "streams": SFT}),
    "GRPO: `hpt`": ("grpo", {"names": ["hpt"], "train": "demonstrations"}),
}
TRAIN = {
    "weights": lambda: additions().add_column("weight", [1.0] * len(additions())),
    "demonstrations": lambda: additions(32, "prompt_completion"),
}
DDP, FSDP2 = "DDP", "FSDP2"


def table() -> dict[str, dict[str, str]]:
    """The table of docs/scale.md: row, then column, to what is written there."""
    text = (ROOT / "docs" / "scale.md").read_text()
    written = text[text.index("| added to one optimiser step") :].split("\n\n")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines()]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def counted(folder: Path, sharded: bool, rows: list[str]) -> dict[str, list[tuple[str, int]]]:
    if dist.get_rank() == 0:
        save_model(tiny_model(), tokenizer(), folder / "start")
    dist.barrier()
    found = {}
    for i, row in enumerate(rows):
        kind, given = RUNS[row]
        options: dict[str, Any] = dict(given)
        if "streams" in options:
            options["streams"] = {role: additions(16, seed=3) for role in options["streams"]}
        if "train" in options:
            options["train"] = TRAIN[options["train"]]()
        if sharded:
            options["model"] = AutoModelForCausalLM.from_pretrained(
                str(folder / "start"), distributed_config=DistributedConfig(fsdp_size=2)
            )
        options |= {"max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 100, "plain": len(given) == 0}
        make = {"sft": make_sft, "grpo": make_grpo}[kind]
        found[row] = of_one_step(make(folder / str(i), **options, **({"num_generations": 4} if kind == "grpo" else {})))
    return found


@pytest.fixture(scope="module", params=[DDP, FSDP2])
def steps(request, tmp_path_factory) -> tuple[str, dict[str, list[tuple[str, int]]]]:
    sharding = request.param
    rows = [row for row in RUNS if table().get(row, {}).get(sharding) != "refused"]
    ranks = on_ranks(counted, tmp_path_factory.mktemp(sharding), sharding == FSDP2, rows)
    for row in rows:
        assert ranks[0][row] == ranks[1][row], f"{row}: ranks went into other collectives"
    return sharding, ranks[0]


def test_the_table_names_all_runs():
    assert {row for row in RUNS if not row.endswith("no plugin")} == set(table())


def test_the_calls_added_to_plain_trl_are_those_of_the_table(steps):
    sharding, found = steps
    plain = {kind: found[row] for row, (kind, given) in RUNS.items() if not given}
    added = {}
    for row, exchanges in found.items():
        small, large = (
            sum((size < GRADIENTS) == below for _, size in exchanges)
            - sum((size < GRADIENTS) == below for _, size in plain[RUNS[row][0]])
            for below in (True, False)
        )
        added[row] = f"{small} + {large}" if large else f"{small}"
    expected = {row: cells[sharding] for row, cells in table().items() if cells[sharding] != "refused"}
    assert {row: calls for row, calls in added.items() if not row.endswith("no plugin")} == expected


def test_a_stream_exchanges_one_gradient(steps):
    """Under DDP one more all-reduce of the same bytes, under FSDP2 one more pass of each kind."""
    _, found = steps
    for stream, plain in (("`gradient-surgery`", "no plugin"), ("GRPO: `chord`", "GRPO: no plugin")):
        assert gradient_bytes(found[stream]) == 2 * gradient_bytes(found[plain]) > 0


def gradient_bytes(exchanges: list[tuple[str, int]]) -> int:
    return sum(size for kind, size in exchanges if size >= GRADIENTS and kind in ("allreduce", "reduce_scatter_base"))
