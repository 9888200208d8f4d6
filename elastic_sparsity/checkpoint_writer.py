"""Writing an elastic checkpoint, whole or not at all (README). Memory holds one linear at a time, however many come."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.errors import CheckpointError, NumericsError
from elastic_sparsity.files import atomic_file, atomic_folder, file_sha256, folder_lock, sync_path, write_json
from elastic_sparsity.ladder import Ladder, StructuredLevel
from elastic_sparsity.manifest import (
    CONFIG_NAME,
    FORMAT,
    FORMAT_VERSION,
    adapter_dtype,
    digest,
    part_names,
    read_manifest,
)
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.shells import LinearRecord, LinearSpec, encode_shells, shell_names, spec_of
from elastic_sparsity.tensor_file_writer import PlannedTensor, TensorFileWriter

log = logging.getLogger(__name__)
MAX_SHARD_BYTES = 5_000_000_000
_NO_ID = "0" * 32  # stands in the files until all their bytes are known, from which the id comes
_Section = dict[str, PlannedTensor]


def write_checkpoint(
    folder: Path,
    linears: Mapping[str, LinearRecord],
    shared: Mapping[str, Tensor],
    *,
    ladder: Ladder,
    ranks: Sequence[int],
    inheritance: str,
    dtype: str,
    record: Mapping[str, Any],
    save_extras: Callable[[Path], None],
    optional: Mapping[str, Mapping[str, Tensor]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a whole checkpoint, or nothing. Equal arguments make equal bytes, on any day and in any process.

    Mappings may read an item from disk whenever they are asked: each is asked twice, and let go before the next.

    Args:
        linears: by fully qualified name.
        shared: everything that is not sparsified, stored once, in `dtype` if floating.
        record: more for elastic_config.json (base model, recipe, versions, data hashes, losses).
        save_extras: writes the model's own config and tokenizer into the folder it gets.
        optional: more sections, which readers that do not know them skip.
        max_shard_bytes: a section larger than this becomes several files.
    Raises: OutputError. NumericsError: if a value is NaN or infinite in `dtype`. ShapeError: pairs of other ranks, or
        rows that keep different numbers. Nothing is left behind then.
    """
    specs = {name: spec_of(linears[name], ladder) for name in linears}
    plan = _plan_linears(specs, ladder, ranks, dtype)
    tensors = {"shared": shared, **(optional or {})}
    # One at a time, so no loop over items(), which holds an item while it asks for the next.
    plan |= {section: {n: _planned(found[n], section, dtype) for n in found} for section, found in tensors.items()}
    with atomic_folder(folder) as scratch:
        save_extras(scratch)
        extras = [file_entry(scratch, p) for p in sorted(scratch.rglob("*")) if p.is_file()]
        with _open_files(scratch, plan, max_shard_bytes) as files:
            for name in linears:
                _write_linear(files, name, linears[name], ladder, ranks, dtype)
            for section, found in tensors.items():
                for name in found:
                    files.write(section, name, _stored(found[name], section, dtype))
            config = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "requires": [],
                "checkpoint_id": _NO_ID,
                "ladder": {
                    "sparsities": ladder.sparsities,
                    "patterns": ladder.patterns,
                    "group_ends": ladder.group_ends,
                    "pattern_parent": ladder.pattern_parent,
                },
                "ranks": list(ranks),
                "inheritance": inheritance,
                "dtype": dtype,
                "adapter_dtype": adapter_dtype(dtype),
                "linears": {name: dataclasses.asdict(spec) for name, spec in specs.items()},
                "files": files.entries(),
                "extras": extras,
                **record,
            }
            config["checkpoint_id"] = digest(config)[: len(_NO_ID)]  # covers the hash of every file
            files.set_id(config["checkpoint_id"])
        config["files"] = files.entries()
        write_json(scratch / CONFIG_NAME, {**config, "digest": digest(config)})


@contextmanager
def config_lock(folder: Path) -> Iterator[None]:
    """Inside, nobody else who takes it replaces a checkpoint's elastic_config.json. See `folder_lock`.

    Raises: CheckpointError: if there is no such folder.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(folder))
        except OSError as error:
            raise CheckpointError(f"{folder}: no elastic checkpoint can be opened here: {error}.") from error
        yield


def add_section(
    folder: Path,
    level: StructuredLevel,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Adds a structured level to a checkpoint that is there. No file of it changes but elastic_config.json, at the end.

    The files come first, under names that the old elastic_config.json does not list, so readers pass them over; then it
    is replaced at once. Killed on the way, the checkpoint is what it was, and adding again replaces what is left.
    The `checkpoint_id` stays: it says which shells, adapters and shared weights belong together, and these are the same
    (so a checkpoint made with the level equals one that got it later); the digest covers the level as all else.

    Args:
        tensors: the section, floats in the checkpoint's dtype.
        record: how the level was made, for elastic_config.json.
    Raises: CheckpointError: no checkpoint there, or it has the level already. NumericsError: NaN or infinity.
        OutputError.
    """
    with config_lock(folder):
        _add_section(folder, level, tensors, record, max_shard_bytes)


def _add_section(
    folder: Path,
    level: StructuredLevel,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    manifest, config = read_manifest(folder)
    if level.name in manifest.files:
        raise CheckpointError(f"{folder}: has level {level.name} already; leave it out.")
    planned = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    shards = _shards(planned, max_shard_bytes)
    entries = []
    for file, shard in zip(part_names(level.name, len(shards)), shards, strict=True):
        for left in folder.glob(f".{file}.partial-*"):  # of a process that was killed
            left.unlink()
        with atomic_file(folder / file) as scratch:
            with TensorFileWriter(scratch, shard, file_metadata(manifest.checkpoint_id)) as writer:
                for name in shard:
                    writer.write(name, tensors[name].detach().cpu())
        entries.append(file_entry(folder, folder / file))
    sync_path(folder)
    levels = sorted([*manifest.structured_levels(), level], key=lambda found: found.fraction)
    config["ladder"] = {**config["ladder"], "structured": [dataclasses.asdict(found) for found in levels]}
    config["files"] = {**config["files"], level.name: entries}
    records = config.get("structured")
    config["structured"] = {**(records if isinstance(records, dict) else {}), level.name: dict(record)}
    write_json(folder / CONFIG_NAME, {**config, "digest": digest(config)}, sync=True)


def file_entry(folder: Path, path: Path) -> dict[str, Any]:
    """Name, size and hash of a file, as elastic_config.json lists it."""
    return {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_metadata(checkpoint_id: str) -> dict[str, str]:
    """Metadata of every tensor file. One key only: safetensors keeps no order of several, and equal files need one."""
    return {"elastic_checkpoint": checkpoint_id}


class _SectionFiles:
    """Every file of every section, open at once, for a linear has a part in most of them."""

    def __init__(self, folder: Path, parts: Mapping[str, Sequence[TensorFileWriter]]) -> None:
        self._folder, self._parts = folder, parts
        self._file_of = {
            (section, name): file for section, files in parts.items() for file in files for name in file.specs
        }

    def write(self, section: str, name: str, tensor: Tensor) -> None:
        """Raises: NumericsError; ShapeError, OSError: as the file does."""
        _check_finite(name, tensor)
        self._file_of[section, name].write(name, tensor)

    def entries(self) -> dict[str, list[dict[str, Any]]]:
        """The manifest's `files`, as they are now."""
        return {
            section: [file_entry(self._folder, file.path) for file in files] for section, files in self._parts.items()
        }

    def set_id(self, checkpoint_id: str) -> None:
        for file in itertools.chain(*self._parts.values()):
            file.replace_metadata(file_metadata(checkpoint_id))


@contextmanager
def _open_files(folder: Path, plan: Mapping[str, _Section], max_shard_bytes: int) -> Iterator[_SectionFiles]:
    with ExitStack() as stack:
        parts = {}
        for section, planned in plan.items():
            shards = _shards(planned, max_shard_bytes)
            paths = [folder / name for name in part_names(section, len(shards))]
            parts[section] = [
                stack.enter_context(TensorFileWriter(path, shard, file_metadata(_NO_ID)))
                for path, shard in zip(paths, shards, strict=True)
            ]
        yield _SectionFiles(folder, parts)


def _shards(planned: _Section, max_shard_bytes: int) -> list[_Section]:
    shards: list[_Section] = [{}]
    room = max_shard_bytes
    for name, (dtype, shape) in planned.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = dtype, shape
        room -= size
    return shards


def _plan_linears(
    specs: Mapping[str, LinearSpec], ladder: Ladder, ranks: Sequence[int], dtype: str
) -> dict[str, _Section]:
    """Sections of shells and adapters: dtype and shape of all that `_write_linear` will write."""
    plan: dict[str, _Section] = {f"shell-{name}": {} for name in shell_names(ladder)}
    plan |= {f"adapters-{group}": {} for group, rank in enumerate(ranks) if rank}
    for name, spec in specs.items():
        for number, shell in enumerate(shell_names(ladder)):
            for part, shape in spec.shell_shapes(number).items():
                kind = DTYPES[dtype] if part == "values" else torch.uint8
                plan[f"shell-{shell}"][f"{name}.{part}"] = kind, shape
        for group, rank in enumerate(ranks):
            if rank:
                kind, section = DTYPES[adapter_dtype(dtype)], plan[f"adapters-{group}"]
                section[f"{name}.lora_A"] = kind, (rank, spec.shape[1])
                section[f"{name}.lora_B"] = kind, (spec.shape[0], rank)
    return plan


def _write_linear(
    files: _SectionFiles, name: str, linear: LinearRecord, ladder: Ladder, ranks: Sequence[int], dtype: str
) -> None:
    for shell, tensors in zip(shell_names(ladder), encode_shells(linear, ladder, DTYPES[dtype]), strict=True):
        for part, tensor in tensors.items():
            files.write(f"shell-{shell}", f"{name}.{part}", tensor)
    for group, pair in enumerate(linear.pairs):
        if ranks[group]:
            for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                cast = tensor.detach().cpu().to(DTYPES[adapter_dtype(dtype)])
                files.write(f"adapters-{group}", f"{name}.{part}", cast)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NumericsError(f"{name}: NaN or infinite as {tensor.dtype}; choose another checkpoint.dtype.")


def _stored(tensor: Tensor, section: str, dtype: str) -> Tensor:
    return tensor.detach().cpu().to(_stored_dtype(tensor, section, dtype))


def _planned(tensor: Tensor, section: str, dtype: str) -> PlannedTensor:
    return _stored_dtype(tensor, section, dtype), tuple(tensor.shape)


def _stored_dtype(tensor: Tensor, section: str, dtype: str) -> torch.dtype:
    """What all levels share is stored in the checkpoint's dtype, other sections as they are."""
    return DTYPES[dtype] if section == "shared" and tensor.is_floating_point() else tensor.dtype
