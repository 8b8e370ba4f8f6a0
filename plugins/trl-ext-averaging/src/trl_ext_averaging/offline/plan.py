"""An average as a plan that can be shown, and then carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from trl_ext.errors import ConfigurationError
from trl_ext_averaging.offline.adapters import AdapterProduct
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.checkpoint_writer import Advance, write_checkpoint
from trl_ext_averaging.offline.combination import Combination, Source
from trl_ext_averaging.offline.compatibility import check_compatible
from trl_ext_averaging.offline.output_folder import output_folder, sign
from trl_ext_averaging.offline.rules import Rule

LoraMode = Literal["factors", "product"]


@dataclass(frozen=True)
class Plan:
    """What is to be averaged, and how.

    Args:
        inputs: the checkpoints, in order.
        rule: a coefficient for each input, for all tensors or by tensor (`rules`).
        method: name of the method, for the model card.
        options: its options, for the model card.
        lora: adapters: "product" averages what they add to the weights (right across runs), "factors" their A and B
            (fine along one run). By default "factors" for checkpoints of one run, else "product".
        rank: "product": rank of the output; the sum of the inputs' ranks if None.
        dtype: of the output; that of the template if None.
        max_shard_bytes: largest file of a model, but for larger tensors.
        like: the template, which gives config, dtypes and tokenizer; the last input if None.
    """

    inputs: Sequence[Checkpoint]
    rule: Rule | Sequence[float]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraMode | None = None
    rank: int | None = None
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    like: Checkpoint | None = None

    @property
    def template(self) -> Checkpoint:
        """What the output is like in all but its numbers."""
        return self.like or self.inputs[-1]

    @cached_property
    def lora_mode(self) -> LoraMode | None:
        """The mode for adapters, None for models."""
        if self.inputs[0].kind == "model":
            return None
        one_run = (
            len(self.inputs) > 1 and len({c.path.resolve().parent for c in self.inputs if c.step is not None}) == 1
        )
        along = one_run and all(c.step is not None for c in self.inputs)
        return self.lora or ("factors" if along else "product")

    @cached_property
    def source(self) -> Source:
        """The output's tensors, checked and not computed yet.

        Raises:
            CheckpointError: the inputs do not belong together.
            ConfigurationError: options that do not fit them.
        """
        product, rule = self.lora_mode == "product", self.rule
        if self.lora_mode is None and (self.lora or self.rank):
            raise ConfigurationError("--lora and --rank are for adapters; these are models")
        if self.rank is not None and (not product or self.rank < 1):
            raise ConfigurationError(f"--rank {self.rank} needs --lora product and at least 1")
        names = check_compatible(self.inputs, same_ranks=not product, any_dtype=self.dtype is not None or product)
        if product and callable(rule):
            raise ConfigurationError(f"{self.method} has no meaning for products of factors; merge the adapters first")
        if product and not callable(rule):
            return AdapterProduct(self.inputs, names, rule, self.rank, self.dtype)
        if not callable(rule) and abs(sum(rule) - 1) > 1e-6:
            raise ConfigurationError(f"{self.method} of factors needs coefficients that sum to 1; use --lora product")
        return Combination(self.inputs, names, rule, self.template, self.dtype)

    @property
    def paths(self) -> list[Path]:
        """The folders that are read."""
        return [checkpoint.path for checkpoint in self.inputs]

    def write(self, folder: Path, advance: Advance = lambda nbytes: None) -> Source:
        """Write the average's files into a folder, and give its source.

        Args:
            folder: where to.
            advance: told the bytes written, for a progress bar.

        Raises:
            CheckpointError, ConfigurationError: as `source`.
        """
        source, like = self.source, self.template
        write_checkpoint(folder, source, like.kind, like.path, self.provenance(), self.max_shard_bytes, advance)
        return source

    def provenance(self) -> dict[str, Any]:
        """What the model card says."""
        coefficients = [None] * len(self.inputs) if callable(self.rule) else [float(f"{c:.6g}") for c in self.rule]
        options = {**self.options, **({"lora": self.lora_mode} if self.lora_mode else {})}
        return {
            "method": self.method,
            "options": options | ({"rank": self.rank} if self.rank else {}),
            "inputs": [
                {"path": str(c.path), "step": c.step, "bytes": c.nbytes}
                | ({} if coefficient is None else {"coefficient": coefficient})
                for c, coefficient in zip(self.inputs, coefficients, strict=True)
            ],
            "version": version("trl-ext-averaging"),
        }


def average(plan: Plan, output: Path, overwrite: bool = False, advance: Advance = lambda nbytes: None) -> Source:
    """Write a plan's average to a folder, all of it or nothing, and give its source.

    Raises:
        CheckpointError, ConfigurationError: as `Plan.source` and `output_folder`.
    """
    with output_folder(output, overwrite, plan.paths) as folder:
        source = plan.write(folder, advance)
        sign(folder, plan.provenance())
    return source
