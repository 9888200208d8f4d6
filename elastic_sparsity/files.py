"""Writing whole folders or nothing, and hashing. Knows no format of ours."""

import hashlib
import json
import logging
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elastic_sparsity.errors import OutputError

log = logging.getLogger(__name__)


def is_file(path: str | Path) -> bool:
    """Whether a file is there. A name that no file can have is none, where `Path.is_file` raises before Python 3.14."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False for a name that none can have."""
    return os.path.isdir(path)  # noqa: PTH112


def strange_file(folder: Path) -> Path | None:
    """What lies in a folder and is neither file nor folder: a library that opens a pipe would wait for ever."""
    strange = (x for x in sorted(folder.iterdir()) if not (is_file(x) or is_folder(x)) and os.path.exists(x))  # noqa: PTH110
    return next(strange, None)


def file_sha256(path: Path) -> str:
    """sha256 of a file, in chunks so large that a thread seldom has to wait for Python's lock."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def file_crc32(path: Path) -> int:
    """CRC-32 of a file: three times as fast as sha256, enough against accidents."""
    found = 0
    for chunk in _chunks(path):
        found = zlib.crc32(chunk, found)
    return found


def _chunks(path: Path) -> Iterator[memoryview]:
    """The file's bytes; each chunk is valid until the next is asked for."""
    chunk = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            yield chunk[:count]


def check_output_folder(folder: Path) -> None:
    """Raises: OutputError: unless `folder` can be made, or is an empty folder that can be replaced."""
    try:
        if folder.is_symlink():
            raise OutputError(f"{folder}: is a link, which cannot be replaced; name the folder itself.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: already holds something; choose another output folder or move it away.")
        if folder.exists() and folder.samefile(Path.cwd()):
            raise OutputError(f"{folder}: is the working directory, which cannot be replaced; name a new folder in it.")
        if folder.is_mount():
            raise OutputError(f"{folder}: is a mount point, which cannot be replaced; name a new folder inside it.")
        _try_out(folder)
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # a name that is too long, or no name at all
        raise OutputError(f"{folder}: cannot be made: {error}.") from error


def _try_out(folder: Path) -> None:
    """Makes a scratch folder beside `folder` and `folder` itself, and removes what it made."""
    str(folder.absolute()).encode()  # safetensors and tokenizers write to no path that is not UTF-8
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    scratch = _scratch_beside(folder)
    try:
        scratch.mkdir(parents=True)
        scratch.rmdir()
        folder.mkdir(exist_ok=True)
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


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
        _sync_all(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.replace(folder)
        sync_path(folder.parent)
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "(os error" not in str(error):
            raise  # tokenizers raises no type of its own for a full disk
        raise OutputError(f"{folder}: cannot be written: {error}; nothing was left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    """Waits until the disk has all of a folder: what it was made from may be removed once it has its name."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A scratch name beside `path` that replaces it when the block ends well.

    Raises: OutputError: if it cannot be written, or is a device or pipe; what was there is then unchanged.
    """
    scratch = _scratch_beside(path)
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}; what was there is unchanged.") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _check_replaceable(path: Path) -> None:
    """A rename would replace a device too: as root, the machine's /dev/null."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is no file; name another output file.")


def check_output_file(path: Path) -> None:
    """Raises: OutputError: unless a file can be made at `path`, or be replaced."""
    try:
        _check_replaceable(path)
        made = [parent for parent in path.parents if not parent.exists()]
        scratch = _scratch_beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.touch()
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be made: {error}.") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Inside, nobody else who takes it changes what it is taken for: what is read from the folder can be written back.

    It is on the folder itself, so that no file is left for a reader or an upload to find, and ends with its process.
    Windows has no such lock, and some network drives neither (a warning says so): do not change one file from two
    processes at a time there.

    Raises: OSError: if there is no such folder.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: cannot be locked (%s); let no other process change what is in it now", folder, error)
        yield
    finally:
        os.close(descriptor)


def sync_path(path: Path) -> None:
    """Waits until the disk has a file's bytes; of a folder its names, where that can be waited for.

    Raises: OSError: of a file, e.g. if only now the disk turns out to be full.
    """
    access = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is open for writing
    # Windows opens no folder, and some file systems sync none: nothing could be done about it, and the files are there.
    with suppress(OSError) if is_folder(path) else nullcontext():
        descriptor = os.open(path, access)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, data: Any, *, sync: bool = False) -> None:
    """UTF-8 JSON under a temporary name, then renamed. Args: sync: only once the disk has its bytes."""
    with atomic_file(path) as scratch:
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")  # half characters as JSON escapes them
        if sync:
            sync_path(scratch)
