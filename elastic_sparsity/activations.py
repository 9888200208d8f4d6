"""Where the hidden states of a run live: on the device, in host memory, or on disk. Tensors and files only.

All kinds are indexed alike: `[slice]` or `[LongTensor]` reads samples onto the device, `[slice] = tensor` writes them.
Files are read and written by calls, not mapped: mapped pages would count as this process's memory. One file holds all
samples of a run, so that several workers share it, each with rows of its own. Letters: S samples, T tokens, D width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastic_sparsity.errors import OutputError
from elastic_sparsity.files import file_crc32, sync_path

DEVICE, HOST, DISK = "device", "host", "disk"


class Activations(Protocol):
    """(S, T, D) hidden states of one worker's samples. A plain tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, samples: slice | Tensor, /) -> Tensor: ...
    def __setitem__(self, samples: slice, values: Tensor, /) -> None: ...


class HostActivations:
    """Hidden states in host memory, for a device with memory of its own."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._tensor = torch.empty(*shape, dtype=dtype, device="cpu")
        self.device = device

    @property
    def shape(self) -> Sequence[int]:
        return self._tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    def __getitem__(self, samples: slice | Tensor) -> Tensor:
        return self._tensor[samples].to(self.device)

    def __setitem__(self, samples: slice, values: Tensor) -> None:
        self._tensor[samples] = values.to("cpu", self.dtype)


class DiskActivations:
    """Hidden states in a file of raw numbers, sample after sample.

    Args:
        rows: which samples of the file these are, in order.
        num_samples: how many samples the file has in all.
    Raises: OutputError: a full disk, or a file that became shorter.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[int],
        num_samples: int,
        shape_TD: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.path, self.rows, self.device = path, list(rows), device
        self._shape_TD, self._dtype = tuple(shape_TD), dtype
        self._stride = int(np.prod(self._shape_TD)) * dtype.itemsize
        self._bytes = self._stride * num_samples

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.rows), *self._shape_TD)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def __getitem__(self, samples: slice | Tensor) -> Tensor:
        chosen = self.rows[samples] if isinstance(samples, slice) else [self.rows[int(i)] for i in samples]
        result = torch.empty(len(chosen), *self._shape_TD, dtype=self._dtype, device="cpu")
        raw = result.view(torch.uint8).numpy()
        try:
            with self.path.open("rb", buffering=0) as file:
                for target, row in zip(raw, chosen, strict=True):
                    _read_all(file.fileno(), target.reshape(-1).data, row * self._stride, self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error}; start the run again.") from error
        return result.to(self.device)

    def __setitem__(self, samples: slice, values: Tensor) -> None:
        raw = values.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                for source, row in zip(raw, self.rows[samples], strict=True):
                    _write_all(descriptor, source.reshape(-1).data, row * self._stride)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {error}; free some space and run the same command again.")

    def sync(self) -> None:
        """Waits until the disk has it.

        Raises: OutputError: if it will not: some disks say only now that they are full.
        """
        try:
            sync_path(self.path)
        except OSError as error:
            raise self._unwritten(error) from error

    def is_whole(self) -> bool:
        """Whether the file has its full size."""
        return self.path.is_file() and self.path.stat().st_size == self._bytes


def _read_all(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise OutputError(f"{path}: became shorter; start the run again.")
        done += count


def _write_all(descriptor: int, source: memoryview, offset: int) -> None:
    done = 0
    while done < len(source):
        done += os.pwrite(descriptor, source[done:], offset + done)


class ActivationStore:
    """Makes activations, and keeps those that a run may have to go on from.

    Args:
        folder: for the files.
        where: "device", "host" or "disk".
        rows: this worker's samples among all `num_samples`.
    """

    def __init__(self, folder: Path, where: str, rows: Sequence[int], num_samples: int, device: torch.device) -> None:
        self.folder, self.where, self.device = folder, where, device
        self.rows, self.num_samples = list(rows), num_samples

    def _file(self, name: str, shape_TD: Sequence[int], dtype: torch.dtype) -> DiskActivations:
        path = self.folder / f"{name}.activations"
        return DiskActivations(path, self.rows, self.num_samples, shape_TD, dtype, self.device)

    def new(self, name: str, shape_TD: Sequence[int], dtype: torch.dtype) -> Activations:
        """Uninitialised activations; `name` is that of their file."""
        shape = (len(self.rows), *shape_TD)
        if self.where == DISK:
            return self._file(name, shape_TD, dtype)
        if self.where == HOST and self.device.type != "cpu":
            return HostActivations(shape, dtype, self.device)
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def save(self, name: str, activations: Activations) -> None:
        """Puts activations safely on disk, if they are not there."""
        file = self._file(name, activations.shape[1:], activations.dtype)
        if not isinstance(activations, DiskActivations):
            for sample in range(len(self.rows)):
                file[sample : sample + 1] = activations[sample : sample + 1]
        file.sync()

    def load(self, name: str, shape_TD: Sequence[int], dtype: torch.dtype) -> Activations | None:
        """What `save` left; None if it is not whole."""
        file = self._file(name, shape_TD, dtype)
        if not file.is_whole():
            return None
        if self.where == DISK:
            return file
        found = self.new(name, shape_TD, dtype)
        for sample in range(len(self.rows)):
            found[sample : sample + 1] = file[sample : sample + 1]
        return found

    def checksum(self, name: str) -> int:
        """Of what `save` left, all workers' rows.

        Raises: OutputError: if it cannot be read.
        """
        path = self.folder / f"{name}.activations"
        try:
            return file_crc32(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error}; start again with --restart.") from error

    def keep_only(self, names: Sequence[str]) -> None:
        """Removes all other files."""
        wanted = {f"{name}.activations" for name in names}
        for path in self.folder.glob("*.activations"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)
