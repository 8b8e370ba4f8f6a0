"""What the core adds to TRL's fused head is what full logits give, whatever tiles the head goes through."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer import utils

from trl_ext.engine.fused_head import add_head
from trl_ext.testing import tiny_llama, tiny_qwen2

VOCAB = 259
OUTPUTS = ("log_probs", "entropy", "is_top1", "label_rank", "top8_log_probs", "top2_log_probs")
TILES = {"one tile": (4096, 32768), "many tiles": (7, 50)}
"""Tokens and vocabulary of a tile: TRL's own, and such that tokens and vocabulary fall into several."""


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch) -> str:
    tokens, width = TILES[request.param]
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", tokens)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", width)
    return request.param


@dataclass
class OnTriton:
    """TRL's kernel as it is called where there is Triton, `kernel[grid](...)`, on the torch version of it."""

    grids: list[Any] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        self.grids.append(grid)
        return TORCH_TILE


TORCH_TILE = chunked_logprob._forward_tile


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


def sharpened(model: Any) -> Any:
    """Larger logits, so that distributions differ from uniform and labels from each other."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def models(dtype: torch.dtype) -> dict[str, Any]:
    with_bias = tiny_llama()
    with_bias.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))
    capped = tiny_llama(final_logit_softcapping=3.0, logit_scale=0.5)
    made = {"plain": tiny_llama(), "tied": tiny_qwen2(), "with bias": with_bias, "capped": capped}
    return {name: sharpened(model).to(dtype).eval() for name, model in made.items()}


@pytest.mark.parametrize("name", ["plain", "tied", "with bias", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rank_and_top_log_probs_are_those_of_full_logits(tiles: str, batch, name: str, dtype: torch.dtype) -> None:
    model = models(dtype)[name]
    add_head(model, OUTPUTS)
    with torch.no_grad():
        outputs = model(**batch, fused_lm_head=True)
        logits = model.lm_head(model.model(batch["input_ids"]).last_hidden_state[:, :-1])
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    own = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1))
    # The head rounds a tile's logits as the whole product is rounded; a product of another shape may add in another
    # order, and a logit at half a unit in the last place then rounds the other way.
    near = 2 * torch.finfo(dtype).eps * logits.abs()
    fewest, most = (logits > own + near).sum(-1), (logits > own - near).sum(-1) - 1
    rank = outputs.extras["label_rank"]
    assert rank.dtype == torch.long
    assert ((fewest <= rank) & (rank <= most))[mask].all()
    assert (rank[~mask] == 0).all()
    assert ((rank == 0) | ~outputs.is_top1.bool())[mask].all()
    assert rank[mask].float().std() > 10, "the labels are at different places"
    if dtype == torch.float32:
        assert torch.equal(fewest[mask], most[mask]), "no two logits are that near, so the rank is exact"

    z = logits.double()
    if name == "capped":
        z = 3 * torch.tanh(0.5 * z / 3)
    top = z.log_softmax(-1).topk(8).values
    # fp32 statistics of logits that are rounded to the dtype: their error, and that of their normaliser
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4 * float(torch.finfo(dtype).eps * logits.abs().max())}[dtype]
    torch.testing.assert_close(outputs.extras["top8_log_probs"][mask].double(), top[mask], rtol=0, atol=tolerance)
    assert torch.equal(outputs.extras["top2_log_probs"], outputs.extras["top8_log_probs"][..., :2])
    assert (outputs.extras["top8_log_probs"][~mask] == 0).all()


def test_with_triton_labelled_positions_alone_are_scored_with_the_same_outputs(tiles: str, batch, monkeypatch):
    model = sharpened(tiny_model())
    add_head(model, OUTPUTS)
    with torch.no_grad():
        expected = model(**batch, fused_lm_head=True)
        kernel = OnTriton()
        monkeypatch.setattr(chunked_logprob, "_forward_kernel", kernel)
        monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: True)
        monkeypatch.setattr(utils, "_use_triton", lambda device: True)
        outputs = model(**batch, fused_lm_head=True)
    assert 0 < max(n for (n,) in kernel.grids) <= outputs.label_mask.sum() < outputs.label_mask.numel()
    assert torch.equal(outputs.extras["label_rank"], expected.extras["label_rank"])
    torch.testing.assert_close(outputs.extras["top8_log_probs"], expected.extras["top8_log_probs"])


def test_trl_s_own_outputs_and_gradients_keep_their_bits(tiles: str, batch) -> None:
    plain, ours = sharpened(tiny_model()), sharpened(tiny_model())
    add_head(plain, OUTPUTS[:3])
    add_head(ours, OUTPUTS)
    results = {}
    for name, model in {"plain": plain, "ours": ours}.items():
        outputs = model(**batch, fused_lm_head=True)
        (outputs.log_probs.sum() + outputs.entropy.sum()).backward()
        results[name] = [outputs.log_probs, outputs.entropy, *(p.grad for p in model.parameters())]
    assert all(map(torch.equal, results["plain"], results["ours"]))


def test_there_is_one_projection_for_each_tile(monkeypatch, batch) -> None:
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 50)
    model = tiny_model()
    products = {}
    for outputs in (OUTPUTS[:3], OUTPUTS):
        add_head(model, outputs)
        with torch.profiler.profile() as profile, torch.no_grad():
            model(**batch, fused_lm_head=True)
        products[outputs] = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert products[OUTPUTS] == products[OUTPUTS[:3]] > 0


def test_a_batch_without_labels_gives_noughts(batch) -> None:
    model = tiny_model()
    add_head(model, OUTPUTS)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    extras = model(**batch, fused_lm_head=True).extras
    assert extras["label_rank"].shape == (3, 10)
    assert extras["top8_log_probs"].shape == (3, 10, 8)
    assert not any(value.any() for value in extras.values())


def test_a_copy_of_the_model_has_a_head_of_its_own(batch) -> None:
    model = sharpened(tiny_model())
    add_head(model, OUTPUTS)
    copy = deepcopy(model)
    with torch.no_grad():
        copy.lm_head.weight.copy_(copy.lm_head.weight.flip(0))
    before, after = (m(**batch, fused_lm_head=True).extras["label_rank"] for m in (model, copy))
    assert not torch.equal(before, after)


def test_more_than_the_vocabulary_holds_is_an_error_that_leaves_trl_s_head_as_it_was(batch) -> None:
    before = chunked_logprob._forward_tile, utils._ChunkedLogProbFunction
    model = tiny_model()
    add_head(model, ("log_probs", "top300_log_probs"))
    with pytest.raises(ValueError, match="top300_log_probs of a vocabulary of 259 tokens"):
        model(**batch, fused_lm_head=True)
    assert before == (chunked_logprob._forward_tile, utils._ChunkedLogProbFunction)
