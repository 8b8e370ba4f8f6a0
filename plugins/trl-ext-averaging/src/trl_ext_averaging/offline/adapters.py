"""Combinations of LoRA adapters that are exact in the product B A, which is what an adapter adds to its weight.

The mean of B and the mean of A is not the mean of B A. Along one run the difference is small and the factors may be
averaged as they are; across runs it is not: their factors are different bases of the same space. Here the factors of
all inputs are stacked, A = [A_1; A_2; ...] and B = [c_1 s_1 B_1, c_2 s_2 B_2, ...], whose product is the combination
exactly, at the price of the sum of the ranks. With `rank`, the best approximation of that rank follows (Eckart-Young).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import CheckpointError
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.combination import Combination, rounded

FACTOR = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.weight)?")
PREFIX = "base_model.model."


class AdapterProduct:
    """The linear combination of adapters by their products; a source as in `sources`.

    Args:
        inputs: LoRA adapters of one base model and the same target modules; ranks and scales may differ.
        names: their tensors.
        coefficients: one per input.
        rank: rank of the output, for all modules; the sum of the inputs' ranks if None.
        dtype: of the output; that of the last input if None.

    Raises:
        CheckpointError: DoRA, fused experts, factors that do not match, or tensors without factors where the
            coefficients do not sum to 1.
    """

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        names: Sequence[str],
        coefficients: Sequence[float],
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse(inputs, names, coefficients, rank)
        self._factors = _pairs(names, inputs)
        self.truncation = 0.0
        """Largest relative Frobenius error of a module that `rank` has cost so far."""
        self._inputs, self._coefficients, self._rank = inputs, coefficients, rank
        plain = [name for name in names if not FACTOR.fullmatch(name)]
        self._plain = Combination(inputs, plain, coefficients, inputs[-1], dtype)
        ranks = {}
        layout = dict(self._plain.layout)
        for module, factors in self._factors.items():
            a, b = (inputs[-1].entries[factors[factor]] for factor in "AB")
            total = sum(checkpoint.entries[factors["A"]].shape[0] for checkpoint in inputs)
            ranks[module] = rank or total
            layout[factors["A"]] = (dtype or a.dtype, (ranks[module], *a.shape[1:]))
            layout[factors["B"]] = (dtype or b.dtype, (b.shape[0], ranks[module], *b.shape[2:]))
        self.layout = {name: layout[name] for name in names}
        self.config = _config(inputs[-1].config, ranks)
        self._pending: dict[str, Tensor] = {}

    def pieces(self, name: str) -> Iterator[Tensor]:
        match = FACTOR.fullmatch(name)
        if match is None:
            yield from self._plain.pieces(name)
            return
        if name not in self._pending:  # the two factors are computed together and written one after the other
            factors = self._factors[match["module"]]
            self._pending |= dict(zip((factors["A"], factors["B"]), self._stacked(factors), strict=True))
        yield rounded(name, self._pending.pop(name), self.layout[name][0])

    def _stacked(self, factors: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """The output's factors A (rank, in) and B (out, rank), in fp64; its scale is 1."""
        a = [checkpoint.entries[factors["A"]].tensor().double() for checkpoint in self._inputs]
        b = [
            checkpoint.entries[factors["B"]].tensor().double() * (coefficient * scale(checkpoint, factors["A"]))
            for checkpoint, coefficient in zip(self._inputs, self._coefficients, strict=True)
        ]
        stacked = torch.cat(a, dim=0), torch.cat(b, dim=1)
        if self._rank is None:
            return stacked
        try:
            truncated, error = truncate(*stacked, self._rank)
        except torch.linalg.LinAlgError:
            raise CheckpointError(
                f"{factors['A']} and its B have no approximation: they hold NaN or infinity"
            ) from None
        self.truncation = max(self.truncation, error)
        return truncated


def scale(checkpoint: Checkpoint, name: str) -> float:
    """What PEFT multiplies B A with: alpha / r, or alpha / sqrt(r) with `use_rslora`; `name` is that of an A.

    Raises:
        CheckpointError: there is no alpha, or no rank.
    """
    config, rank = checkpoint.config, checkpoint.entries[name].shape[0]
    match = FACTOR.fullmatch(name)
    module = match["module"] if match else name
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        matches = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = float(next(matches, config["lora_alpha"]))
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{checkpoint.path}: adapter_config.json gives {module} no lora_alpha: {error}") from None
    if not rank:
        raise CheckpointError(f"{checkpoint.path}: {module} has rank 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """The factors of the best approximation of B A of a rank, and its relative Frobenius error.

    Args:
        a, b: (R, in) and (out, R) in fp64; B A itself is never formed.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    kept = s[:rank].sqrt()
    new_a, new_b = kept[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * kept
    if missing := rank - len(kept):  # the stacked rank, or a side of the weight, is smaller
        new_a = torch.cat([new_a, new_a.new_zeros(missing, new_a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], missing)], dim=1)
    total = float(s.square().sum())
    return (new_a, new_b), math.sqrt(float(s[rank:].square().sum()) / total) if total else 0.0


def _pairs(names: Sequence[str], inputs: Sequence[Checkpoint]) -> dict[str, dict[str, str]]:
    """Module -> factor, "A" or "B" -> name of its tensor.

    Raises:
        CheckpointError: one of the two is missing, or they have no common rank.
    """
    pairs: dict[str, dict[str, str]] = {}
    for name in names:
        if match := FACTOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["factor"]] = name
    for module, factors in pairs.items():
        if missing := {"A", "B"} - factors.keys():
            raise CheckpointError(f"{inputs[0].path}: {module} has no factor {missing.pop()}")
        for checkpoint in inputs:
            a, b = (checkpoint.entries[factors[factor]].shape for factor in "AB")
            if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
                raise CheckpointError(f"{checkpoint.path}: the factors of {module}, {a} and {b}, have no common rank")
    return pairs


def _refuse(
    inputs: Sequence[Checkpoint], names: Sequence[str], coefficients: Sequence[float], rank: int | None
) -> None:
    for checkpoint in inputs:
        if checkpoint.config.get("peft_type") != "LORA":
            raise CheckpointError(f"{checkpoint.path} is not a LoRA adapter; only --lora factors averages it")
        if checkpoint.config.get("use_dora") or checkpoint.config.get("target_parameters"):
            raise CheckpointError(
                f"{checkpoint.path}: DoRA and target_parameters are not products of two factors; merge it into its base"
            )
    plain = [name for name in names if not FACTOR.fullmatch(name)]
    if plain and abs(sum(coefficients) - 1) > 1e-9:
        raise CheckpointError(f"{plain[0]} has no factors to scale; give the start as an adapter too, or merge first")
    for name in names:
        if rank is not None and FACTOR.fullmatch(name) and len(inputs[0].entries[name].shape) != 2:
            raise CheckpointError(f"{name} is a convolution's factor; omit --rank")


def _config(template: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter's config for these ranks, with every scale 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module.removeprefix(PREFIX): r for module, r in ranks.items() if r != rank}
    ranks_and_scales = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
    return {**template, **ranks_and_scales, "use_rslora": False}
