"""Two-sided random projections of every sample's gradient: unbiased scores and Gram matrix, in p x p numbers each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from trl_ext_data_regularization.engines.engine import Engine, Scores, sums, sums_of_products
from trl_ext_data_regularization.engines.target import Part, Target, summed
from trl_ext_data_regularization.layers import Batch, Layer, Use


class Projections:
    """Random sign matrices (d, p) / sqrt(p), one per side and width; the identity where d <= p, which is exact.

    Args:
        size: p.
        seed: seed of the signs; they stay the same for the whole run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._signs: dict[tuple[str, int], Tensor] = {}
        self._known: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def apply(self, side: str, values: Tensor, width: int | None = None, start: int = 0) -> Tensor:
        """(N, d) to (N, min(width, p)).

        Args:
            side: "out" or "in".
            values: d of `width` columns; all of them where that is None.
            width: of the whole; the columns left out count as zero.
            start: the first of the d columns.
        """
        d = values.shape[1]
        width = d if width is None else width
        if width <= self.size:
            return values if d == width else torch.nn.functional.pad(values, (start, width - start - d))
        return values @ self.matrix(side, width, values)[start : start + d]

    def rows(self, side: str, width: int, ids: Tensor) -> Tensor:
        """(N, min(width, p)) float: the projections of the unit vectors `ids` (N,)."""
        if width <= self.size:
            return torch.nn.functional.one_hot(ids, width).float()
        return self._sign(side, width, ids.device)[ids].float().mul_(self.size**-0.5)

    def matrix(self, side: str, width: int, like: Tensor) -> Tensor:
        """(width, p) in the dtype and on the device of `like`."""
        key = (side, width, like.dtype)
        if key not in self._known:
            self._known[key] = self._sign(side, width, like.device).to(like.dtype) * self.size**-0.5
        return self._known[key]

    def _sign(self, side: str, width: int, device: torch.device) -> Tensor:
        """(width, p) int8."""
        key = (side, width)
        if key not in self._signs:
            # Two sides need independent signs, or their product would be biased.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * width + (side == "in"))
            signs = torch.randint(0, 2, (width, self.size), generator=generator, dtype=torch.int8)
            self._signs[key] = signs.to(device).mul_(2).sub_(1)
        return self._signs[key]


class Sketch(Engine):
    """z_i = (P go)' (Q x) summed over tokens: E<z_i, z_t> = <g_i, t> (arXiv:2605.07063, "compressed").

    The target is sketched at once, and not held on to.

    Args:
        projections: P and Q of every width.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        target: Target,
        samples: int,
        device: torch.device,
        projections: Projections,
    ) -> None:
        super().__init__(layers, Target(()), samples, device)
        self.projections = projections
        self._parameters, self._parts = target.parameters, target.parts(self._sketched)
        self._z: dict[int, Tensor] = {}
        self._bias: dict[int, Tensor] = {}

    def add(self, use: Use, x: Tensor | None, go: Tensor, index: Tensor, batch: Batch) -> None:
        project = self.projections.apply
        if use.kind == "embedding":
            # A Linear on one-hot inputs with the sides swapped: the weight is (V, H), as a tied head's.
            assert x is not None
            rows = self.projections.rows("out", use.module.weight.shape[0], x)
            z = sums_of_products(rows, project("in", go).float(), index, batch)
        else:
            left = project("out", go).float()
            z = (
                sums(left, index, batch)
                if x is None
                else sums_of_products(left, project("in", x).float(), index, batch)
            )
            if self.has_bias(use):
                self._accumulate(self._bias, use.layer, sums(left, index, batch), batch)
        self._accumulate(self._z, use.layer, z.flatten(1), batch)

    def scores(self, layers: Sequence[int]) -> Scores:
        pairs = [self.sketches(layer) for layer in layers]
        return Scores(torch.stack([z @ t for z, t in pairs]), torch.stack([z @ z.t() for z, _ in pairs]))

    def sketches(self, layer: int) -> tuple[Tensor, Tensor]:
        """(n, d) the samples' sketches and (d,) the target's, in one layer."""
        found, target = self.layers[layer], [torch.zeros(0, device=self.device)]
        for store, i in ((self._z, found.weight), (self._bias, found.bias)):
            if layer in store and i is not None:
                nothing = torch.zeros(store[layer].shape[1], device=self.device)
                target.append(self._target.get(i, nothing))
        return self.vectors(layer), torch.cat(target)

    def vectors(self, layer: int) -> Tensor:
        """(n, d) float: the samples' sketches in one layer; d = 0 where the forward leaves it out."""
        parts = [store[layer] for store in (self._z, self._bias) if layer in store]
        return torch.cat(parts, 1) if parts else torch.zeros(self.samples, 0, device=self.device)

    @cached_property
    def _target(self) -> dict[int, Tensor]:
        """(d,) float by parameter: sketches of the target's gradient. Collective under FSDP2 on the first use."""
        return summed(self._parts, self._parameters)

    def _sketched(self, part: Part) -> Tensor:
        """(d,) float: a parameter's gradient (O, I) or (O,) in the coordinates of the samples' sketches."""
        gradient, shape, place = part.tensor, part.shape, part.place
        if gradient.dim() == 1:
            return self.projections.apply("out", gradient.float().unsqueeze(0), shape[0], place[0])[0]
        left = self.projections.apply("out", gradient.t(), shape[0], place[0]).t()
        return self.projections.apply("in", left, shape[1], place[1]).float().flatten()

    def _accumulate(self, store: dict[int, Tensor], layer: int, values: Tensor, batch: Batch) -> None:
        if layer not in store:
            store[layer] = values.new_zeros(self.samples, values.shape[1])
        store[layer][batch.window] += values
