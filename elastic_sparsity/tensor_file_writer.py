"""One safetensors file written tensor by tensor: no more than one of them has to be in memory.

Bytes are those of the safetensors library for the same tensors and metadata, which needs all of them at once.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError

DTYPE_NAMES = {  # in the library's order; a file holds the last ones first, so that every tensor is aligned
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
PlannedTensor = tuple[torch.dtype, tuple[int, ...]]


class TensorFileWriter:
    """Open from the start; tensors come in any order. Without `close` the file is incomplete.

    As a context manager it closes at the end of the block; after an exception it leaves the file as it is.

    Args:
        specs: dtype and shape of every tensor, by name.
        metadata: at most one key, or equal files may differ between this writer and the library (it keeps no order).
    Raises: ShapeError: a dtype or a name that cannot be stored. OSError: the file cannot be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, PlannedTensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.specs = dict(specs)
        self._missing = set(specs)
        self._offsets = _offsets(path, specs)
        header = self._header(metadata)
        self._start = len(header)
        self._file = path.open("wb", buffering=0)
        try:
            self._write_at(0, memoryview(header))
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor, of any device and strides, where it belongs.

        Raises: ShapeError: not a planned tensor, another dtype or shape than planned, or written before. OSError.
        """
        if name not in self.specs:
            raise ShapeError(f"{self.path}: {name}: is not one of its {len(self.specs)} tensors.")
        if name not in self._missing:
            raise ShapeError(f"{self.path}: {name}: is written a second time.")
        dtype, shape = self.specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ShapeError(f"{self.path}: {name}: found {found}, expected {dtype} {shape}.")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._write_at(self._start + self._offsets[name][0], memoryview(flat.view(torch.uint8).numpy().data))
        self._missing.remove(name)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Writes the header again with other metadata.

        Raises: ShapeError: if the header's size changes, for tensors cannot move. OSError.
        """
        header = self._header(metadata)
        if len(header) != self._start:
            raise ShapeError(f"{self.path}: header of {len(header)} bytes, expected {self._start}; keep its length.")
        self._write_at(0, memoryview(header))

    def close(self) -> None:
        """On disk when this returns.

        Raises: ShapeError: if a tensor was not written. OSError.
        """
        try:
            if self._missing:
                few = ", ".join(sorted(self._missing)[:3])
                raise ShapeError(f"{self.path}: {len(self._missing)} tensors were never written ({few}).")
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        for name, offsets in self._offsets.items():
            dtype, shape = self.specs[name]
            entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _write_at(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        while data:  # the system may take less than it is given
            data = data[self._file.write(data) :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole file at once. Unlike the library's own, others may read it as far as the user's umask lets them.

    Raises: ShapeError, OSError: as `TensorFileWriter` does.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, specs, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _offsets(path: Path, specs: Mapping[str, PlannedTensor]) -> dict[str, tuple[int, int]]:
    """Begin and end of every tensor after the header, in the file's order.

    Raises: ShapeError.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}
    for name, (dtype, _) in specs.items():
        if dtype not in rank:
            raise ShapeError(f"{path}: {name}: {dtype} cannot be stored; expected one of {', '.join(map(str, rank))}.")
        if name == "__metadata__" or not _is_text(name):
            raise ShapeError(f"{path}: {name!a}: no tensor can have this name; choose another.")
    begin, offsets = 0, {}
    for name in sorted(specs, key=lambda name: (-rank[specs[name][0]], name)):  # code points sort like UTF-8 bytes
        dtype, shape = specs[name]
        end = begin + math.prod(shape) * dtype.itemsize
        offsets[name] = begin, end
        begin = end
    return offsets


def _is_text(name: str) -> bool:
    """False for half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
