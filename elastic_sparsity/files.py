"""Writing whole folders or nothing, and hashing. Knows no format of ours."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elastic_sparsity.errors import OutputError


def file_sha256(path: Path) -> str:
    """sha256 of a file, in chunks so large that a thread seldom has to wait for Python's lock."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()


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


def sync_path(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """UTF-8 JSON under a temporary name, then renamed."""
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
