"""Writing whole folders or nothing, hashing, and looking at safetensors headers. Knows no format of ours."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from elastic_sparsity.errors import CheckpointError, OutputError

TensorSpec = tuple[str, tuple[int, ...]]  # safetensors dtype name ("BF16"), shape


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_folder(folder: Path) -> None:
    """Raises: OutputError: unless `folder` can be made, or is an empty folder that can be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: already holds something; choose another output folder or move it away.")
    if folder.is_mount():
        raise OutputError(f"{folder}: is a mount point, which cannot be replaced; name a new folder inside it.")
    scratch = _scratch_beside(folder)
    try:
        scratch.mkdir(parents=True)
        scratch.rmdir()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error}.") from error


def _scratch_beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Raises: OutputError: if `folder` is taken, cannot be made, or the disk is full.
    """
    check_output_folder(folder)
    scratch = _scratch_beside(folder)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if folder.exists():
            folder.rmdir()
        scratch.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written: {error}; nothing was left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A scratch name beside `path` that replaces it when the block ends well.

    Raises: OutputError: if it cannot be written; what was there is then unchanged.
    """
    scratch = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}; what was there is unchanged.") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """UTF-8 JSON under a temporary name, then renamed."""
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_headers(paths: Sequence[Path], expected: Mapping[str, TensorSpec]) -> None:
    """That safetensors files together hold exactly the expected tensors, before any of them is read.

    safetensors itself refuses overlapping or out-of-range offsets, holes, and headers over 100 MB.

    Raises: CheckpointError: naming file and tensor.
    """
    seen: set[str] = set()
    for path in paths:
        file = open_tensors(path)
        names = set(file.keys())
        if extra := sorted((names - expected.keys()) | (names & seen)):
            raise CheckpointError(f"{path}: {_few('not expected', extra)}; it is damaged.")
        for name in names:
            part = file.get_slice(name)
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found != expected[name]:
                wanted = f"{expected[name][0]} {expected[name][1]}"
                raise CheckpointError(f"{path}: {name}: found {found[0]} {found[1]}, expected {wanted}.")
        seen |= names
    if missing := sorted(expected.keys() - seen):
        raise CheckpointError(f"{paths[-1]}: {_few('missing', missing)}; it is damaged.")


def _few(title: str, names: list[str]) -> str:
    return f"{len(names)} tensors {title} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped; it stays open until the handle is gone.

    Raises: CheckpointError: if the file is missing or no safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
