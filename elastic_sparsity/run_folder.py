"""What an unfinished run keeps beside its output, so that it goes on after a crash from its last finished block.

`<output>.run/` holds run.json (what the run is), allocation.json (the plan, if it searches one; see allocation_file),
structured-0.5.json (where the search of that level's counts stands; see structured_search_file),
base.safetensors (the base model's weights, if the run changes them before it prunes),
induction.safetensors (scales that were learned first),
block-0007.safetensors (a finished block, written under another name, synced and renamed: its presence commits the
block), the hidden states that the next block starts from, and a snapshot of the end-to-end phase. All of it goes when
the checkpoint is in place. One process at a time: a lock, which the system drops with its process. Each file's sha256
covers what the run is: a damaged one, or one of another run, is refused.
"""

import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from elastic_sparsity.errors import ConfigError, OutputError, brief
from elastic_sparsity.files import atomic_file, is_file, sync_path, write_json
from elastic_sparsity.tensor_file import TensorFile
from elastic_sparsity.tensor_file_writer import write_tensors

log = logging.getLogger(__name__)
# What a run may have left; whatever else lies in the folder is somebody's, and stays.
_OWN = re.compile(
    r"lock|(run|allocation|structured-[\w.-]+)\.json|(block-\d{4}|base|induction|end-to-end|trained-\w+)\.safetensors|[\w-]+\.activations|\..+\.partial-[0-9a-f]{8}"
)


class RunFolder:
    """Files of one unfinished run. Workers other than the first one only read.

    Args:
        path: the folder; made if missing.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._identity = ""  # sha256 of what the run is; part of every file's

    def decided(self) -> dict[str, Any]:
        """The choices of the run's first process; empty if there is none, or `claim` will refuse what is there."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))["decided"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return dict(found) if isinstance(found, dict) else {}

    def claim(self, what: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
        """Says what the run is, or checks that it is the one that began here.

        Args:
            what: all that its result depends on.
            decided: choices that depend on the machine's state at the time, e.g. free memory.
        Returns: the choices of the run's first process.
        Raises: ConfigError: if another run began here, naming what differs. OutputError: if its record is damaged.
        """
        file = self.path / "run.json"
        if not file.exists():
            self._identity = _sha256({"run": what, "decided": decided})
            if self.writes:
                write_json(file, {"run": what, "decided": decided, "sha256": self._identity}, sync=True)
            return dict(decided)
        try:
            began = json.loads(file.read_text(encoding="utf-8"))
            self._identity = began.pop("sha256")
            intact = self._identity == _sha256(began)
            found, choices = began["run"], dict(began["decided"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # whatever the file holds
            intact = False
        if not intact:
            raise OutputError(f"{file}: is damaged; start again with --restart.")
        differing = list(_differences(found, json.loads(json.dumps(what))))
        if differing:
            raise ConfigError(
                f"{self.path}: holds an unfinished run that differs in {'; '.join(differing[:4])}. Put it back as it "
                "was to go on, or give --restart to begin anew."
            )
        log.info("%s: going on with the unfinished run", self.path)
        return choices

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:04d}.safetensors"

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are done."""
        count = 0
        while is_file(self._block(count)):
            count += 1
        return count

    @property
    def _base(self) -> Path:
        return self.path / "base.safetensors"

    def save_base(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Keeps the base model's weights as the induction stage left them."""
        self._save(self._base, tensors, note)

    @property
    def has_base(self) -> bool:
        """Whether `save_base` is done."""
        return is_file(self._base)

    @torch.no_grad()
    def restore_base_(self, model: Any) -> dict[str, Any]:
        """Gives the base model, as it was loaded, the weights that `save_base` kept, in its own dtype.

        Returns: their note.
        Raises: OutputError: if the file is damaged, or gone.
        """
        parameters = dict(model.named_parameters())
        return self._read(self._base, lambda name, tensor: parameters[name].copy_(tensor))

    @property
    def _induction(self) -> Path:
        return self.path / "induction.safetensors"

    def save_induction(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Keeps what the induction stage learned."""
        self._save(self._induction, tensors, note)

    def load_induction(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_induction` kept, if anything."""
        return self._load(self._induction) if is_file(self._induction) else None

    @property
    def allocation(self) -> Path:
        """Where the plan of a run that searches one is kept."""
        return self.path / "allocation.json"

    def structured(self, level: str) -> Path:
        """Where the search of a structured level's counts is kept."""
        return self.path / f"{level}.json"

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a run that goes on from here is spared any work."""
        stages = (self._base, self._induction, self.allocation)
        return bool(self.finished_blocks()) or any(is_file(stage) for stage in stages)

    def save_block(self, index: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Commits a finished block."""
        self._save(self._block(index), tensors, note)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and note of a finished block.

        Raises: OutputError: if the file is damaged.
        """
        return self._load(self._block(index))

    def open_block(self, index: int) -> TensorFile:
        """A finished block, to read single tensors of."""
        return TensorFile(self._block(index))

    def save_trained(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a block, by number, or the rest of a model after an end-to-end phase whose model is in parts."""
        self._save(self.path / f"trained-{name}.safetensors", tensors, {})

    def open_trained(self, name: str) -> TensorFile:
        """What `save_trained` kept."""
        return TensorFile(self.path / f"trained-{name}.safetensors")

    def save_snapshot(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], note: Mapping[str, Any]
    ) -> None:
        """Replaces the end-to-end phase's snapshot; `settings`, plain values, are those of the phase."""
        self._save(self.path / "end-to-end.safetensors", tensors, {**note, "settings": settings})

    def load_snapshot(self, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The end-to-end phase's snapshot, if there is one of these settings."""
        path = self.path / "end-to-end.safetensors"
        if not is_file(path):
            return None
        tensors, note = self._load(path)
        begun = note.pop("settings", None)
        if differing := list(_differences(begun, dict(settings), "end_to_end")):
            log.warning("the end-to-end phase begins anew: it differs in %s", "; ".join(differing))
            return None
        return tensors, note

    def _save(self, path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        with atomic_file(path) as scratch:
            digest = self._digest(path.name, note)
            for name, tensor in sorted(tensors.items()):
                _add(digest, name, tensor)
            record = {"note": note, "sha256": digest.hexdigest()}
            write_tensors(scratch, tensors, {"record": json.dumps(record)})  # on disk before it gets its name
        sync_path(self.path)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        note = self._read(path, tensors.__setitem__)
        return tensors, note

    def _read(self, path: Path, take: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        """Hands over a file's tensors, one at a time; only then it is known whether they are what was saved.

        Returns: the note.
        Raises: OutputError: if they are not.
        """
        try:
            file = TensorFile(path)
            record = json.loads(file.metadata["record"])
            digest = self._digest(path.name, record["note"])
            for name in sorted(file.specs):
                tensor = file.read(name)
                _add(digest, name, tensor)
                take(name, tensor)
            intact = record["sha256"] == digest.hexdigest()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(f"{path}: cannot be read: {error}; start again with --restart.") from error
        if not intact:
            raise OutputError(f"{path}: is damaged, or of another run; start again with --restart.")
        note: dict[str, Any] = record["note"]
        return note

    def _digest(self, name: str, note: Mapping[str, Any]) -> Any:
        return hashlib.sha256(_sha256([self._identity, name, note]).encode())


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Paths at which two plain values differ, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif old != new:
        yield f"{where} ({brief(old, 40)} then, {brief(new, 40)} now)"


@contextmanager
def run_folder(output: Path, *, restart: bool = False, writes: bool = True) -> Iterator[RunFolder]:
    """The folder of the run that makes `output`, locked; removed if the run ends well, or before any block is done.

    Args:
        restart: throw away what an unfinished run left.
        writes: False in every process of a run but the first, which holds the lock.
    Raises: OutputError: if it cannot be made, holds what is no run's, or another process works on it.
    """
    folder = _folder_of(output)
    if not writes:
        yield RunFolder(folder, writes=False)
        return
    lock = _lock(folder, output)
    made, done = RunFolder(folder), False
    try:
        if not (folder / "lock").exists():  # the one who had the lock ended, and removed the folder, just now
            raise OutputError(f"{folder}: another process has just made {output}; look there first.")
        if restart:
            _empty(folder)
        for scratch in folder.glob(".*.partial-*"):  # of a process that was killed, as those beside the output
            with suppress(OSError):
                scratch.unlink()
        for scratch in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield made
        done = True
    finally:
        if done or not made.is_worth_keeping:
            _remove(folder)
        else:
            log.warning("%s keeps what is finished: run the same command again to go on from there", folder)
        lock.release()


def _lock(folder: Path, output: Path) -> FileLock:
    """Makes the folder if it is missing, and takes its lock. What is no run's is never touched."""
    is_new = False
    try:
        is_new = not os.path.lexists(folder)
        if folder.is_symlink():
            raise OutputError(f"{folder}: an unfinished run is kept there, but it is a link; move it away.")
        folder.mkdir(parents=True, exist_ok=True)
        strange = [x.name for x in folder.iterdir() if not _OWN.fullmatch(x.name) or _is_special(x)]
        if strange:
            raise OutputError(
                f"{folder}: an unfinished run is kept there, but it holds {brief(min(strange))}, which no run made; "
                "move it away or name another output."
            )
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise OutputError(f"{folder}: another process makes {output}; wait for it or name another output.") from None
    except OSError as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(f"{folder}: cannot be made: {error}.") from error
    return lock


def _is_special(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())


def is_unfinished(output: Path) -> bool:
    """Whether a run that makes `output` was interrupted."""
    return is_file(_folder_of(output) / "run.json")


def _folder_of(output: Path) -> Path:
    try:
        return output.with_name(f"{output.name}.run")
    except ValueError as error:
        raise OutputError(f"{str(output)!r}: is no name of a folder; name a new folder.") from error


def _remove(folder: Path) -> None:
    """Takes the folder away, what says that it is an unfinished run last: killed on the way, it is still one."""
    with suppress(OSError):
        _empty(folder, but=("lock", "run.json"))
    shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path, but: Sequence[str] = ("lock",)) -> None:
    for path in folder.iterdir():
        if path.name not in but:
            path.unlink()
