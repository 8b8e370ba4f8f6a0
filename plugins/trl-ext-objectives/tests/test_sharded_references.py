"""References that are copies of the weights: under FSDP2 each rank keeps and swaps its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext.testing import save_model
from trl_ext.testing.ranks import on_ranks
from trl_ext.testing.runs import additions, logged, make_sft, moved, parameters, tiny_model, tokenizer

pytestmark = pytest.mark.slow

# SGD on fp32: sums in another order; `lr` times a few steps times the rounding of gradients of size 1.
ROUNDING = {"rtol": 0, "atol": 5e-6}
METHODS = ("psft:refresh_every=3", "iw-sft:reference=start", "rho1:reference=start")


def run(folder: Path, method: str, model: Any = None, **options: Any) -> Any:
    return make_sft(
        folder,
        names=[method],
        model=model,
        max_steps=4,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        trainer={"eval_dataset": additions(8, seed=9)},
        eval_strategy="steps",
        eval_steps=3,
        **options,
    )


def sharded_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        str(folder / "start"), distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )


def of_rank(folder: Path) -> dict[str, Any]:
    if dist.get_rank() == 0:
        save_model(tiny_model(layers=2), tokenizer(), folder / "start")
    dist.barrier()
    found: dict[str, Any] = {}
    for method in METHODS:
        for kind in ("ddp", "fsdp2"):
            model = sharded_model(folder) if kind == "fsdp2" else tiny_model(layers=2)
            trainer = run(folder / f"{kind} {method}", method, model)
            start = parameters(trainer)
            trainer.train()
            assert trainer.ext_weights.sharded == (kind == "fsdp2")
            found[f"{method} {kind}"] = parameters(trainer), logged(trainer), moved(trainer, start)
        # A state is taken over: that of whole weights too, as a run that was not sharded has saved it.
        plugin = next(iter(trainer.ext_plugins)).instance
        saved = {name: whole(tensor) for name, tensor in plugin.state_dict().items() if isinstance(tensor, Tensor)}
        plugin.load_state_dict({name: tensor + 1 for name, tensor in saved.items()})
        loaded = {name: whole(plugin.state_dict()[name]) for name in saved}
        found[f"{method} state"] = saved, loaded
    return found


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


@pytest.fixture(scope="module")
def rank(tmp_path_factory) -> dict[str, Any]:
    return on_ranks(of_rank, tmp_path_factory.mktemp("sharded"))[0]


@pytest.mark.parametrize("method", METHODS)
def test_training_and_evaluation_are_those_of_ddp(rank, method):
    mine, logs, change = rank[f"{method} fsdp2"]
    theirs, expected, _ = rank[f"{method} ddp"]
    assert change > 500 * ROUNDING["atol"]
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], **ROUNDING)
    for entry, other in zip(logs, expected, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(other):
            assert entry[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_whole_weights_is_cut_into_shards(rank, method):
    saved, loaded = rank[f"{method} state"]
    assert saved
    assert all(torch.equal(loaded[name], tensor + 1) for name, tensor in saved.items())
