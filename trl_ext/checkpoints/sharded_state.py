"""State that is sharded as the parameters are (DTensors): each rank writes its shards, any number of ranks reads them.

The files are safetensors, written and read through `torch.distributed.checkpoint`. They hold where each shard belongs,
so that another number of ranks, or a run whose parameters are whole, takes over the same values bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, empty
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import empty as empty_sharded

from trl_ext.errors import CheckpointError

FOLDER = "sharded"


def save(folder: Path, tensors: Mapping[str, DTensor]) -> None:
    """Write this rank's shards. Collective.

    Raises:
        CheckpointError: on every rank, where a shard cannot be written on any.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter  # of torch 2.9; other runs go on without it

    writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"{folder / FOLDER} cannot be written: {error}") from error


def load(folder: Path, layout: DTensor | None) -> dict[str, Tensor]:
    """Read this rank's part of what any number of ranks has written; {} where nothing is sharded. Not collective.

    Args:
        layout: a parameter of this run, which says over which ranks tensors are sharded; None where they are whole.

    Returns:
        Host tensors in the dtypes that were saved: DTensors laid out as `layout`, whole tensors without it.

    Raises:
        CheckpointError: a file is missing or corrupt.
    """
    if not (folder / FOLDER).is_dir():
        return {}
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        saved = HuggingFaceStorageReader(str(folder / FOLDER)).read_metadata().state_dict_metadata
        tensors = {n: _empty(about, layout) for n, about in saved.items() if isinstance(about, TensorStorageMetadata)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as asked for: no_dist
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER)), no_dist=True)
    except Exception as error:  # safetensors, json and torch each have their own
        raise CheckpointError(f"{folder / FOLDER} is corrupt: {error}") from error
    return tensors


def _empty(about: TensorStorageMetadata, layout: DTensor | None) -> Tensor:
    if layout is None:
        return empty(about.size, dtype=about.properties.dtype)
    cut = Shard(_sharded_dimension(about)) if about.size else Replicate()
    placements: list[Placement] = [cut if placement.is_shard() else Replicate() for placement in layout.placements]
    whole = empty_sharded(
        about.size, dtype=about.properties.dtype, device_mesh=layout.device_mesh, placements=placements
    )
    return whole.to("cpu")


def _sharded_dimension(about: TensorStorageMetadata) -> int:
    """The dimension that was cut; the first, as FSDP does, where one rank held it all."""
    cut = (d for d, size in enumerate(about.size) if any(chunk.sizes[d] != size for chunk in about.chunks))
    return next(cut, 0)
