"""One safetensors file open for reading: header checked, tensors read into memory of their own when asked for.

Not memory-mapped like safetensors' own reader: pages of compressed shells that were decoded once would stay counted as
this process's memory, which a small device notices.
"""

import json
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic_sparsity.errors import CheckpointError

TensorSpec = tuple[str, tuple[int, ...]]  # safetensors dtype name ("BF16"), shape
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


class Room:
    """Memory that tensors are read into again and again: a thread's freed memory would stay with the process."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def clear(self) -> None:
        """Forgets what was taken; from now on there is room for as much as was wanted since the last time."""
        if self._bytes.numel() < self._used:
            self._bytes = torch.empty(self._used, dtype=torch.uint8, device="cpu")
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8, aligned for any dtype; memory of its own if the room is full."""
        begin = -(-self._used // 64) * 64
        self._used = begin + num_bytes
        if self._used > self._bytes.numel():
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._bytes[begin : self._used]


class TensorFile:
    """Stays open until the object is gone, also when another file takes its name.

    Raises: CheckpointError: missing, no safetensors file (overlapping or out-of-range offsets, holes, absurd header).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as checked:  # the library's own validation of the whole header
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._file = path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
            header_size = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(header_size))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error
        header.pop("__metadata__", None)
        self._lock = threading.Lock()
        self._start = 8 + header_size
        self.specs: dict[str, TensorSpec] = {name: (x["dtype"], tuple(x["shape"])) for name, x in header.items()}
        self._offsets: dict[str, tuple[int, int]] = {name: tuple(x["data_offsets"]) for name, x in header.items()}

    def read(self, name: str, room: "Room | None" = None) -> Tensor:
        """One tensor, from any thread.

        Args:
            room: where to put it; None = memory of its own.
        Raises: CheckpointError: if the file became shorter, or holds a dtype that no elastic checkpoint does.
        """
        dtype, shape = self.specs[name]
        begin, end = self._offsets[name]
        if dtype not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name}: found {dtype}, expected one of {', '.join(_DTYPES)}.")
        if room is None:
            flat = torch.empty((end - begin) // _DTYPES[dtype].itemsize, dtype=_DTYPES[dtype], device="cpu")
        else:
            flat = room.take(end - begin).view(_DTYPES[dtype])
        try:
            self._read_into(memoryview(flat.view(torch.uint8).numpy().data), self._start + begin, name)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name}: cannot be read: {error}.") from error
        return flat.view(shape)

    def _read_into(self, buffer: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if not count:
                raise CheckpointError(f"{self.path}: {name}: the file became shorter; copy or download it again.")
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:  # Windows has no read that leaves the file's position alone
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0


def check_headers(files: Sequence[TensorFile], expected: Mapping[str, TensorSpec]) -> None:
    """That files together hold exactly the expected tensors, before any of them is read.

    Raises: CheckpointError: naming file and tensor.
    """
    seen: set[str] = set()
    for file in files:
        names = file.specs.keys()
        if extra := sorted((names - expected.keys()) | (names & seen)):
            raise CheckpointError(f"{file.path}: {_few('not expected', extra)}; it is damaged.")
        for name, found in file.specs.items():
            if found != expected[name]:
                wanted = f"{expected[name][0]} {expected[name][1]}"
                raise CheckpointError(f"{file.path}: {name}: found {found[0]} {found[1]}, expected {wanted}.")
        seen |= names
    if missing := sorted(expected.keys() - seen):
        raise CheckpointError(f"{files[-1].path}: {_few('missing', missing)}; it is damaged.")


def _few(title: str, names: list[str]) -> str:
    return f"{len(names)} tensors {title} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
