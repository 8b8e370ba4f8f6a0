"""safetensors files read and written piece by piece, so that memory does not follow the size of a file or a tensor.

The library maps whole files and writes a file only as a whole; the format itself (a JSON header of offsets, then raw
little-endian data) allows more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from trl_ext.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: a file, and the bytes in it."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """(stop - start,) elements of the flattened tensor; all of them by default."""
        stop = self.numel if stop is None else stop
        buffer = bytearray((stop - start) * self.dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            view, got = memoryview(buffer), 0
            while got < len(buffer):
                count = file.readinto(view[got:])
                if not count:
                    raise CheckpointError(f"{self.path} ends in the middle of a tensor")
                got += count
        return torch.frombuffer(buffer, dtype=self.dtype)

    def tensor(self) -> Tensor:
        """The whole tensor in its shape."""
        return self.read().view(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name, in the order of its data.

    Raises:
        CheckpointError: not a safetensors file, cut off, or of a dtype that cannot be averaged (fp8, quantised).
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("the header does not fit")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{path} is cut off: {size} bytes instead of {end}")
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _entry(path: Path, name: str, fields: Mapping[str, Any], data: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {fields['dtype']}, which has no average")
    entry = TensorEntry(path, DTYPES[fields["dtype"]], tuple(map(int, fields["shape"])), data + begin)
    if begin < 0 or min(entry.shape, default=0) < 0 or entry.nbytes != end - begin:
        raise ValueError(f"{name} of shape {list(entry.shape)} does not fill its {end - begin} bytes")
    return entry


class TensorFileWriter:
    """Writes one file whose tensors are known by shape beforehand and come in pieces, in order.

    Args:
        path: the file to create.
        layout: name to (dtype, shape), in the order of writing.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned, as the library writes it
        self.path = path
        self._missing = offset
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, piece: Tensor) -> None:
        """Append a piece of the current tensor, already in the layout's dtype."""
        data = piece.contiguous().view(-1).view(torch.uint8).numpy()
        self._missing -= data.nbytes
        self._file.write(data.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None and self._missing:
            raise CheckpointError(f"{self.path}: {self._missing} bytes of its tensors were not written")
