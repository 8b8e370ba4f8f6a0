"""Inner products with the target's gradient, without any sample's gradient being formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ext_data_regularization.engines.engine import Engine, Scores
from trl_ext_data_regularization.engines.target import Target
from trl_ext_data_regularization.layers import Batch, Layer, Use


class Ghost(Engine):
    """s_i = sum over sample i's tokens of go (T x): one matmul with the target's gradient T, as dear as a forward.

    arXiv:2605.07063, "reduced ghost". Products are in the activations' dtype, sums in fp32. Gives no K.
    """

    def __init__(self, layers: Sequence[Layer], target: Target, samples: int, device: torch.device) -> None:
        super().__init__(layers, target, samples, device)
        self._s: dict[int, Tensor] = {}

    def add(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        if use.layer not in self._s:
            self._s[use.layer] = go.new_zeros(self.samples, dtype=torch.float32)
        s = self._s[use.layer][batch.window]
        weight, *bias = self.target_of(use.layer)
        if weight is not None:
            s.index_add_(0, index, _along(use, x, go, weight))
        if self.has_bias(use) and bias[0] is not None:
            s.index_add_(0, index, go.float() @ bias[0].float())

    def scores(self, layers: Sequence[int]) -> Scores:
        nothing = torch.zeros(self.samples, device=self.device)  # where the forward leaves a layer out
        return Scores(torch.stack([self._s.get(layer, nothing) for layer in layers]), None)


def _along(use: Use, x: Tensor | None, go: Tensor, weight: Tensor) -> Tensor:
    """(N,) float: the inner product of each token's gradient with a direction of the weight's shape."""
    if x is None:
        return go.float() @ weight.float()
    if use.kind == "embedding":
        return (weight[x].float() * go.float()).sum(1)
    return ((x @ weight.to(x.dtype).t()).float() * go.float()).sum(1)
