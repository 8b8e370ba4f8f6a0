"""What every engine that listens to a backward pass does: add up tokens, layer by layer, to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext_data_regularization.engines.target import Target
from trl_ext_data_regularization.layers import Batch, Layer, Use


@dataclass(frozen=True)
class Scores:
    """What is known of n samples in one or more layers, in fp32, for gradients as the backward pass scaled them."""

    s: Tensor
    """(L, n)"""
    K: Tensor | None
    """(L, n, n), where the engine has it."""

    def over_layers(self) -> Scores:
        """The scores of all layers as one, (1, n) and (1, n, n)."""
        return Scores(self.s.sum(0, keepdim=True), None if self.K is None else self.K.sum(0, keepdim=True))


class Engine(ABC):
    """Scores of the n samples of a window.

    Args:
        layers: all layers of the model.
        target: the target's gradient per parameter, in the order of the gradient views.
        samples: n.
        device: where scores are.
    """

    def __init__(self, layers: Sequence[Layer], target: Target, samples: int, device: torch.device) -> None:
        self.layers = layers
        self.target = target
        self.samples = samples
        self.device = device
        self._at_hand: tuple[int, Sequence[Tensor | None]] | None = None

    @abstractmethod
    def add(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        """Add tokens of one use of a layer.

        Args:
            use: the module.
            x: (N, I) its input, (N,) ids for an embedding, None for a scale.
            go: (N, O) gradient of its output.
            index: (N,) the sample of each token, counted over the micro-batch.
            batch: the micro-batch.
        """

    @abstractmethod
    def scores(self, layers: Sequence[int]) -> Scores:
        """The scores of some layers. Collective under FSDP2."""

    def target_of(self, layer: int) -> Sequence[Tensor | None]:
        """The target's gradient of a layer's weight: (O, I), (V, H) for an embedding, (H,) for a scale; and bias: (O,).

        Collective under FSDP2, where it is gathered, and held until another layer asks. So all ranks have to ask for
        the same layers in the same order, however many tokens they have; backward passes of one model do.
        """
        if self._at_hand is None or self._at_hand[0] != layer:
            self._at_hand = None  # before the next is gathered: one layer at a time is whole
            self._at_hand = layer, [self.target.whole(i) for i in self.layers[layer].parameters]
        return self._at_hand[1]

    def has_bias(self, use: Use) -> bool:
        """Whether tokens of this use also make up a bias's gradient."""
        return self.layers[use.layer].bias is not None and use.kind != "embedding"


def sums_of_products(left: Tensor, right: Tensor, index: Tensor, batch: Batch) -> Tensor:
    """(samples, p, q): for each sample the sum over its tokens of the outer product of left (N, p) and right (N, q)."""
    rows = len(batch.index)
    if batch.by_row and len(index) % batch.index.numel() == 0:
        return left.view(rows, -1, left.shape[1]).transpose(1, 2) @ right.view(rows, -1, right.shape[1])
    # Without a loop over samples, whose lengths only the device knows.
    mine = torch.nn.functional.one_hot(index, batch.samples).to(left.dtype)
    spread = (mine.unsqueeze(2) * left.unsqueeze(1)).flatten(1)
    return (spread.t() @ right).view(batch.samples, left.shape[1], right.shape[1])


def sums(values: Tensor, index: Tensor, batch: Batch) -> Tensor:
    """(samples, p): for each sample the sum of its tokens' values (N, p)."""
    return values.new_zeros(batch.samples, values.shape[1]).index_add_(0, index, values)
