"""Copying single levels of a checkpoint between folders: a device's smaller download, and its upgrade."""

import hashlib
from pathlib import Path
from typing import Any

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError
from elastic_sparsity.files import atomic_file, atomic_folder, check_output_folder
from elastic_sparsity.hub import checkpoint_folder
from elastic_sparsity.manifest import CONFIG_NAME, FileEntry, Manifest


def copy_level(path: str | Path, level: str | float, output: str | Path, **hub: Any) -> ElasticCheckpoint:
    """A folder with only one level's files, still elastic: `upgrade` adds others.

    Args:
        path: folder or hub id; of a hub id only these files are downloaded.
        level: "auto" = the densest one that `path` holds.
    Raises: LevelError, CheckpointError; OutputError: if `output` is taken or cannot be written.
    """
    check_output_folder(Path(output))
    source = ElasticCheckpoint(checkpoint_folder(path, level, **hub))
    with atomic_folder(Path(output)) as scratch:
        for entry in [*source.manifest.extras, *source.files_of(source.find(level))]:
            _copy_checked(source.folder / entry.file, scratch / entry.file, entry)
        (scratch / CONFIG_NAME).write_bytes((source.folder / CONFIG_NAME).read_bytes())
    return ElasticCheckpoint(output)


def upgrade(folder: str | Path, path: str | Path, level: str | float, **hub: Any) -> list[str]:
    """Adds to `folder` the files of `path` that a level needs and that are missing or damaged; nothing is removed.

    Returns: names of the files written. If it fails on the way, those already written are whole; run it again.
    Raises: LevelError. CheckpointError: not the same checkpoint, or a file of the source is damaged. OutputError.
    """
    here = ElasticCheckpoint(folder)
    wanted = here.ladder.find(level)
    needed = [x for x in [*here.manifest.extras, *here.files_of(wanted)] if not _is_whole(here, x)]

    def to_fetch(manifest: Manifest) -> list[FileEntry]:
        return needed if manifest.checkpoint_id == here.manifest.checkpoint_id else []

    source = ElasticCheckpoint(checkpoint_folder(path, files=to_fetch, **hub))
    if source.manifest.checkpoint_id != here.manifest.checkpoint_id:
        raise CheckpointError(
            f"{folder}: cannot be upgraded from {path}: it is checkpoint {here.manifest.checkpoint_id}, "
            f"the source {source.manifest.checkpoint_id}; download the level as a whole instead."
        )
    for entry in needed:
        _copy_checked(source.folder / entry.file, here.folder / entry.file, entry)
    return [entry.file for entry in needed]


def _is_whole(checkpoint: ElasticCheckpoint, entry: FileEntry) -> bool:
    try:
        checkpoint.check_file(entry)
    except CheckpointError:
        return False
    return True


def _copy_checked(source: Path, target: Path, entry: FileEntry) -> None:
    digest = hashlib.sha256()
    with atomic_file(target) as scratch:
        try:
            reader = source.open("rb")
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read: {error}.") from error
        with reader, scratch.open("wb") as writer:
            while chunk := reader.read(1 << 20):
                digest.update(chunk)
                writer.write(chunk)
        if digest.hexdigest() != entry.sha256:
            raise CheckpointError(f"{source}: sha256 differs from the recorded one; the source is damaged.")
