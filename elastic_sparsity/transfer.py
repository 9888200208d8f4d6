"""Copying single levels of a checkpoint between folders: a device's smaller download, and its upgrade."""

import hashlib
from pathlib import Path
from typing import Any

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, LevelError
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

    A structured level that was added to `path` after `folder` was copied comes with the new elastic_config.json.

    Returns: names of the files written. If it fails on the way, those already written are whole; run it again.
    Raises: LevelError. CheckpointError: not the same checkpoint, something was added to the two apart, or a file of the
        source is damaged. OutputError.
    """
    here = ElasticCheckpoint(folder)

    def missing(manifest: Manifest) -> list[FileEntry]:
        if manifest.checkpoint_id != here.manifest.checkpoint_id:
            return []
        known = here.manifest if _has(here.manifest, level) else manifest
        found = [x for x in [*known.extras, *known.files_of(known.find(level))] if not _is_whole(here, x)]
        offered = [*manifest.extras, *(x for entries in manifest.files.values() for x in entries)]
        apart = next((x for x in found if x not in offered), None)
        if apart is not None:
            raise CheckpointError(_made_apart(here, apart.file, path))
        return found

    source = ElasticCheckpoint(checkpoint_folder(path, files=missing, **hub))
    if source.manifest.checkpoint_id != here.manifest.checkpoint_id:
        raise CheckpointError(
            f"{folder}: cannot be upgraded from {path}: it is checkpoint {here.manifest.checkpoint_id}, "
            f"the source {source.manifest.checkpoint_id}; download the level as a whole instead."
        )
    needed = missing(source.manifest)
    if not _has(here.manifest, level):
        _check_only_adds(here, source)
    for entry in needed:
        _copy_checked(source.folder / entry.file, here.folder / entry.file, entry)
    if not _has(here.manifest, level):
        with atomic_file(here.folder / CONFIG_NAME) as scratch:
            scratch.write_bytes((source.folder / CONFIG_NAME).read_bytes())
    return [entry.file for entry in needed]


def _has(manifest: Manifest, level: str | float) -> bool:
    try:
        manifest.find(level)
    except LevelError:
        return False
    return True


def _check_only_adds(here: ElasticCheckpoint, source: ElasticCheckpoint) -> None:
    """That the source's elastic_config.json can take the place of the one that is here: all it lists stays listed.

    Raises: CheckpointError: e.g. each had a structured level added to it, and not the same one.
    """
    for section, entries in here.manifest.files.items():
        if source.manifest.files.get(section) != entries:
            raise CheckpointError(_made_apart(here, section, source.folder))


def _made_apart(here: ElasticCheckpoint, what: str, source: str | Path) -> str:
    return (
        f"{here.folder}: its {what} is not that of {source}, though both are checkpoint "
        f"{here.manifest.checkpoint_id}: something was added to them apart; download the level as a whole."
    )


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
