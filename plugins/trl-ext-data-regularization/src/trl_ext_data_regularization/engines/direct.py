"""Every sample's gradient itself: exact scores and Gram matrix, at n times a layer's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ext_data_regularization.engines.engine import Engine, Scores, sums, sums_of_products
from trl_ext_data_regularization.engines.target import Target
from trl_ext_data_regularization.layers import Batch, Layer, Use


class Direct(Engine):
    """G (n, P) in fp32 per layer, until its scores are taken: s = G t, K = G G'. For LoRA and small models."""

    def __init__(self, layers: Sequence[Layer], target: Target, samples: int, device: torch.device) -> None:
        super().__init__(layers, target, samples, device)
        self._weight: dict[int, Tensor] = {}
        self._bias: dict[int, Tensor] = {}

    def add(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        go = go.float()
        self._accumulate(self._weight, use.layer, _gradients(use, x, go, index, batch), batch)
        if self.has_bias(use):
            self._accumulate(self._bias, use.layer, sums(go, index, batch), batch)

    def scores(self, layers: Sequence[int]) -> Scores:
        found = [self._inner_products(layer) for layer in layers]
        for layer in layers:
            self._weight.pop(layer, None)
            self._bias.pop(layer, None)
        return Scores(torch.stack([s for s, _ in found]), torch.stack([K for _, K in found]))

    def _inner_products(self, layer: int) -> tuple[Tensor, Tensor]:
        """(n,) and (n, n) of one layer; zeros where the forward leaves it out."""
        s, K = (
            torch.zeros(self.samples, device=self.device),
            torch.zeros(self.samples, self.samples, device=self.device),
        )
        for store, t in zip((self._weight, self._bias), self.target_of(layer), strict=False):
            if layer in store:
                G = store[layer].flatten(1)
                s = s if t is None else s + G @ t.float().flatten()
                K = K + G @ G.t()
        return s, K

    def vectors(self, layer: int) -> Tensor:
        """(n, P) float: the samples' gradients in one layer; P = 0 where the forward leaves it out."""
        parts = [store[layer].flatten(1) for store in (self._weight, self._bias) if layer in store]
        return torch.cat(parts, 1) if parts else torch.zeros(self.samples, 0, device=self.device)

    def _accumulate(self, store: dict[int, Tensor], layer: int, values: Tensor, batch: Batch) -> None:
        if layer not in store:
            store[layer] = values.new_zeros(self.samples, *values.shape[1:])
        store[layer][batch.window] += values


def _gradients(use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> Tensor:
    """(samples, ...) fp32 gradients of the weight: (O, I) each, (V, H) for an embedding, (H,) for a scale."""
    if x is None:
        return sums(go, index, batch)
    if use.kind == "embedding":
        rows = use.module.weight.shape[0]
        flat = go.new_zeros(batch.samples * rows, go.shape[1]).index_add_(0, index * rows + x, go)
        return flat.view(batch.samples, rows, go.shape[1])
    return sums_of_products(go, x.float(), index, batch)
