"""Writing an elastic checkpoint: dicts of tensors to a folder of sections, whole or not at all (README)."""

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic_sparsity.errors import NumericsError
from elastic_sparsity.files import atomic_folder, file_sha256, write_json
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.manifest import CONFIG_NAME, FORMAT, FORMAT_VERSION, adapter_dtype, digest, part_names
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.shells import LinearRecord, encode_shells, shell_names, spec_of

MAX_SHARD_BYTES = 5_000_000_000


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
    """Writes a whole checkpoint, or nothing.

    Args:
        linears: by fully qualified name.
        shared: everything that is not sparsified, stored once, in `dtype` if floating.
        record: more for elastic_config.json (base model, recipe, versions, data hashes, losses).
        save_extras: writes the model's own config and tokenizer into the folder it gets.
        optional: more sections, which readers that do not know them skip.
        max_shard_bytes: a section larger than this becomes several files.
    Raises: OutputError. NumericsError: if a value is NaN or infinite in `dtype`; nothing is written then.
    """
    names = [f"shell-{name}" for name in shell_names(ladder)]
    sections: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, linear in linears.items():
        for section, shell in zip(names, encode_shells(linear, ladder, DTYPES[dtype]), strict=True):
            sections[section].update({f"{name}.{part}": tensor for part, tensor in shell.items()})
        for group, pair in enumerate(linear.pairs):
            if ranks[group]:
                cast = [x.detach().cpu().to(DTYPES[adapter_dtype(dtype)]) for x in pair]
                adapters = sections.setdefault(f"adapters-{group}", {})
                adapters[f"{name}.lora_A"], adapters[f"{name}.lora_B"] = cast
    sections["shared"] = {
        k: t.detach().cpu().to(DTYPES[dtype] if t.is_floating_point() else t.dtype) for k, t in shared.items()
    }
    sections |= {name: dict(tensors) for name, tensors in (optional or {}).items()}
    for name, tensor in itertools.chain(*(tensors.items() for tensors in sections.values())):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{name}: NaN or infinite as {tensor.dtype}; choose another checkpoint.dtype.")
    checkpoint_id = uuid.uuid4().hex
    with atomic_folder(folder) as scratch:
        save_extras(scratch)
        extras = [file_entry(scratch, p) for p in sorted(scratch.rglob("*")) if p.is_file()]
        files = {
            name: _save_section(scratch, name, tensors, checkpoint_id, max_shard_bytes)
            for name, tensors in sections.items()
        }
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "requires": [],
            "checkpoint_id": checkpoint_id,
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
            "linears": {name: _linear_entry(linear, ladder) for name, linear in linears.items()},
            "files": files,
            "extras": extras,
            **record,
        }
        write_json(scratch / CONFIG_NAME, {**config, "digest": digest(config)})


def _linear_entry(linear: LinearRecord, ladder: Ladder) -> dict[str, Any]:
    return dataclasses.asdict(spec_of(linear, ladder))


def file_entry(folder: Path, path: Path) -> dict[str, Any]:
    """Name, size and hash of a file, as elastic_config.json lists it."""
    return {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_metadata(checkpoint_id: str) -> dict[str, str]:
    """Metadata of every tensor file. One key only: safetensors keeps no order of several, and equal files need one."""
    return {"elastic_checkpoint": checkpoint_id}


def _save_section(
    folder: Path, section: str, tensors: Mapping[str, Tensor], checkpoint_id: str, max_shard_bytes: int
) -> list[dict[str, Any]]:
    parts: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if parts[-1] and size > room:
            parts.append({})
            room = max_shard_bytes
        parts[-1][name] = tensor.contiguous()
        room -= size
    entries = []
    for file_name, part in zip(part_names(section, len(parts)), parts, strict=True):
        save_file(part, folder / file_name, metadata=file_metadata(checkpoint_id))
        entries.append(file_entry(folder, folder / file_name))
    return entries
