"""A run that goes on with another number of ranks: 2, then 3, then 1, with averages, a stream and a projection.

The global batch stays the same, and so do the order of the data and that of the stream. What differs is the order in
which fp32 sums are taken: over the rows of a rank, then over ranks. The model has no dropout, whose random numbers
belong to a rank. Four ranks under FSDP2 hold two replicas of shards (HSDP).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import merge_fsdp_weights
from helpers import assert_close, assert_equal_bits
from safetensors.torch import load_file
from torch import Tensor
from workers import other_ranks

from trl_ext.checkpoints.fsdp_files import refuse_other_files
from trl_ext.errors import CheckpointError
from trl_ext.testing.ranks import RanksError, on_ranks

pytestmark = pytest.mark.slow

STEPS = 6

# SGD on fp32: `lr` times a few steps times the rounding of gradients of size 1, which momentum adds up to tenfold.
ROUNDING = {"rtol": 0, "atol": 5e-6}


def saved(folder: Path) -> dict[str, Tensor]:
    """The raw weights and their average, as a run saves them at its end."""
    return {
        f"{place}: {name}": tensor
        for place in (".", "raw")
        for name, tensor in load_file(folder / "final" / place / "model.safetensors").items()
    }


def in_parts(folder: Path, case: str, ranks: tuple[int, ...], *options: Any) -> dict[str, Any]:
    """Train two steps on each of these numbers of ranks, and give what the first rank of the last ones has found."""
    for part, number in enumerate(ranks, 1):
        found = on_ranks(other_ranks.main, folder, case, 2 * part, *options, ranks=number)[0]
    return found


def losses(found: dict[str, Any]) -> list[dict[str, float]]:
    return [entry for entry in found["logs"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Gives what one rank ends with that is left alone."""

    @functools.cache
    def train(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp(case)
        return on_ranks(other_ranks.main, folder, case, STEPS, ranks=1)[0], saved(folder)

    return train


SHARDINGS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "fsdp2": {"state_dict_type": "FULL_STATE_DICT"},
    "fsdp2, sharded files": {"state_dict_type": "SHARDED_STATE_DICT"},
}


@pytest.mark.parametrize(
    ("case", "sharding", "ranks"),
    [
        ("surgery", "ddp", (2, 3, 1)),
        ("cone", "ddp", (2, 3, 1)),
        ("surgery", "fsdp2", (2, 3, 1)),
        ("replicas", "fsdp2", (4, 3, 1)),
        # Its choice is discrete: the gap to the next sample is 5 % of the largest score at least.
        ("derivative", "fsdp2", (2, 3, 1)),
        ("surgery", "fsdp2, sharded files", (2, 3, 1)),
        ("replicas", "fsdp2, sharded files", (2, 4, 1)),
    ],
)
def test_on_several_ranks_then_others_then_one_a_run_ends_where_one_rank_does(tmp_path, alone, case, sharding, ranks):
    found = in_parts(tmp_path, case, ranks, SHARDINGS[sharding])
    expected, weights = alone(case)
    assert found["sharded"] == (sharding != "ddp")
    assert found["positions"] == expected["positions"]
    assert expected["moved"] > 500 * ROUNDING["atol"]
    assert_close(saved(tmp_path), weights, **ROUNDING)
    for mine, theirs in zip(losses(found), losses(expected), strict=True):
        for key in ("step", "loss", "nll", "grad_norm", "num_tokens"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key


def test_the_last_step_of_a_pass_is_the_same_only_where_the_rows_divide(tmp_path):
    """Of 20 rows, two are left for the fourth step, which accelerate fills with four others, by the number of ranks."""
    filled = {"dataloader_drop_last": False}
    one, several = (losses(in_parts(tmp_path / name, "surgery", ranks, None, filled)) for name, ranks in FILLED.items())
    same = [mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) for mine, theirs in zip(one, several, strict=True)]
    assert same == [True, True, True, False]


FILLED = {"one": (1, 1), "several": (2, 3)}


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp2, sharded files"])
def test_shards_on_the_same_ranks_go_on_to_the_same_bytes(tmp_path, sharding):
    in_parts(tmp_path / "parts", "surgery", (2, 2, 2), SHARDINGS[sharding])
    on_ranks(other_ranks.main, tmp_path / "whole", "surgery", STEPS, SHARDINGS[sharding])
    assert_equal_bits(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("ddp", "fsdp2", r"files without shards, and FSDP would look for its own \(FULL_STATE_DICT\)"),
        ("fsdp2", "ddp", r"files of FSDP \(FULL_STATE_DICT\), and this run has no FSDP"),
        ("fsdp2, sharded files", "fsdp2", r"looks for FULL_STATE_DICT; set fsdp_state_dict_type: SHARDED_STATE_DICT"),
    ],
)
def test_weights_in_files_of_another_kind_are_refused(tmp_path, written, read, message):
    in_parts(tmp_path, "surgery", (2,), SHARDINGS[written])
    with pytest.raises(RanksError) as failed:
        on_ranks(other_ranks.main, tmp_path, "surgery", 4, SHARDINGS[read])
    assert isinstance(failed.value.__cause__, CheckpointError)
    assert re.search(message, str(failed.value.__cause__))


def test_shards_can_be_merged_as_the_refusal_says(tmp_path):
    """Into the weights that the run has saved whole at its end, by their names."""
    in_parts(tmp_path, "surgery", (2,), SHARDINGS["fsdp2, sharded files"])
    (shards,) = tmp_path.rglob("pytorch_model_fsdp_0")
    with pytest.raises(CheckpointError) as refused:
        refuse_other_files(shards.parent, None)
    (advised,) = re.findall(r"'accelerate merge-weights (\S+) FOLDER'", str(refused.value))
    merge_fsdp_weights(advised, str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    raw = load_file(tmp_path / "final" / "raw" / "model.safetensors")
    assert_equal_bits({name: merged[name] for name in raw}, raw)
