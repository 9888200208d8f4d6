"""Overlay: masks and adapters only, beside a public base model, for weights that may not be passed on.

An overlay folder holds `elastic_overlay.json` (the checkpoint's elastic_config.json, and id and hash of the base), the
shells without their values, the adapters, and no weight of the base. Restoring puts the base's values back and must
give every shell its recorded sha256: a checkpoint whose base values were trained cannot be made an overlay.
Structured levels are weights of the base, cut and refitted, so an overlay leaves them out; what is restored lists them
as not here, and `upgrade` fetches them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elastic_sparsity.checkpoint import ElasticCheckpoint, base_dtype
from elastic_sparsity.checkpoint_writer import file_metadata
from elastic_sparsity.errors import CheckpointError, ShapeError
from elastic_sparsity.files import atomic_folder, check_output_folder, file_sha256, write_json
from elastic_sparsity.manifest import CONFIG_NAME, OVERLAY_NAME
from elastic_sparsity.models import load_base
from elastic_sparsity.packing import positions_of
from elastic_sparsity.shells import listed_mask, shell_names, shell_of
from elastic_sparsity.tensor_file_writer import write_tensors

OVERLAY_FORMAT = "elastic_sparsity.overlay"
OVERLAY_VERSION = 1


def write_overlay(path: str | Path, output: str | Path, base: str | None = None) -> None:
    """Writes the overlay of a whole checkpoint.

    Args:
        base: folder, hub id or .gguf of the base model; None = the id that the checkpoint records.
    Raises: CheckpointError: naming the first tensor in which checkpoint and base differ. ConfigError, OutputError.
    """
    check_output_folder(Path(output))
    checkpoint = ElasticCheckpoint(path)
    recorded = checkpoint.config.get("base_model")
    base_id = base or (recorded.get("id") if isinstance(recorded, dict) else None)
    if not isinstance(base_id, str):
        raise CheckpointError(f"{path}: does not record its base model; name it.")
    for level in checkpoint.ladder.levels:
        checkpoint.open_level(level)  # checks every file
    model = load_base(base_id, base_dtype(checkpoint.config))
    sections = _sections_with_values(checkpoint)
    stored = {file: _load(checkpoint.folder / file) for file in sections}
    expected = _from_base(model.model, checkpoint, _by_section(stored, sections))
    for file, tensors in stored.items():
        for name, tensor in tensors.items():
            value = expected[sections[file]].get(name)
            if value is not None and not _same_bits(tensor, value):
                raise CheckpointError(
                    f"{path}: {name} differs from {base_id}: no overlay. Only recipes that leave the base as it is can "
                    "have one (end_to_end.trainable = 'adapters', block.base_lr = 0, no induction.folds)."
                )
    with atomic_folder(Path(output)) as scratch:
        for file, tensors in stored.items():
            kept = {name: tensor for name, tensor in tensors.items() if name not in expected[sections[file]]}
            write_tensors(scratch / file, kept, file_metadata(checkpoint.manifest.checkpoint_id))
        others = [e.file for entries in checkpoint.manifest.files.values() for e in entries if e.file not in stored]
        others = [file for file in others if (checkpoint.folder / file).exists()]  # a copy lacks what no level reads
        others = [file for file in others if file not in _structured_files(checkpoint)]
        for file in [*others, *(entry.file for entry in checkpoint.manifest.extras)]:
            _copy(checkpoint.folder / file, scratch / file)
        overlay = {
            "format": OVERLAY_FORMAT,
            "format_version": OVERLAY_VERSION,
            "base_model": {**model.identity, "id": _recorded_id(recorded, model.identity)},
            "from_base": {f: sorted(expected[sections[f]].keys() & tensors.keys()) for f, tensors in stored.items()},
            "config": checkpoint.config,
        }
        write_json(scratch / OVERLAY_NAME, overlay)


def restore_overlay(path: str | Path, output: str | Path, base: str | None = None) -> ElasticCheckpoint:
    """The whole checkpoint again, bit for bit, from an overlay and its base model.

    Args:
        base: where the base model is; None = the id that the overlay records.
    Raises: CheckpointError: damaged overlay, or another base than the one it was made with. OutputError.
    """
    check_output_folder(Path(output))
    folder, overlay = Path(path), _read_overlay(Path(path))
    recorded, missing = overlay["base_model"], overlay["from_base"]
    model = load_base(base or recorded["id"], base_dtype(overlay["config"]))
    if model.identity["sha256"] != recorded["sha256"]:
        raise CheckpointError(
            f"{base or recorded['id']}: holds other weights (sha256 {model.identity['sha256'][:12]}...) than the base "
            f"of {path} ({recorded['sha256'][:12]}...)."
        )
    with atomic_folder(Path(output)) as scratch:
        write_json(scratch / CONFIG_NAME, overlay["config"])
        checkpoint = ElasticCheckpoint(scratch)
        sections = _sections_with_values(checkpoint)
        kept = {file: _load(folder / file) for file in sections}
        values = _from_base(model.model, checkpoint, _by_section(kept, sections))
        needed = {e.file for level in checkpoint.ladder.levels for e in checkpoint.files_of(level)}
        for entry in [e for entries in checkpoint.manifest.files.values() for e in entries]:
            if entry.file not in needed and not (folder / entry.file).exists():
                continue
            if entry.file in kept:
                found = values[sections[entry.file]]
                added = {name: found[name] for name in missing.get(entry.file, ()) if name in found}
                metadata = file_metadata(checkpoint.manifest.checkpoint_id)
                write_tensors(scratch / entry.file, kept[entry.file] | added, metadata)
            else:
                _copy(folder / entry.file, scratch / entry.file)
            if file_sha256(scratch / entry.file) != entry.sha256:
                raise CheckpointError(f"{folder / entry.file}: with the base's values it is not the recorded file.")
        for entry in checkpoint.manifest.extras:
            _copy(folder / entry.file, scratch / entry.file)
        checkpoint.check_extras()
    return ElasticCheckpoint(output)


def _recorded_id(recorded: Any, identity: Mapping[str, str]) -> str:
    """The public id, not the folder on this machine, if both hold the same weights."""
    same = isinstance(recorded, dict) and recorded.get("sha256") == identity["sha256"] and "id" in recorded
    return str(recorded["id"]) if same else identity["id"]


def _sections_with_values(checkpoint: ElasticCheckpoint) -> dict[str, str]:
    """File -> section, for those that hold values of the base: the shells, and what all levels share."""
    files = checkpoint.manifest.files
    return {e.file: section for section in files for e in files[section] if section.startswith(("shell-", "shared"))}


def _structured_files(checkpoint: ElasticCheckpoint) -> set[str]:
    files = checkpoint.manifest.files
    return {entry.file for level in checkpoint.structured for entry in files[level.name]}


Sections = dict[str, dict[str, Tensor]]  # section -> tensor name -> tensor


def _by_section(tensors: Mapping[str, Mapping[str, Tensor]], sections: Mapping[str, str]) -> Sections:
    found: Sections = {}
    for file, section in sections.items():
        found.setdefault(section, {}).update(tensors[file])
    return found


def _from_base(model: Any, checkpoint: ElasticCheckpoint, masks: Sections) -> Sections:
    """Every tensor of values, by section, as the base model gives it at the positions of the masks.

    Raises: CheckpointError: if the base is another model, or the masks are damaged.
    """
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    dtype, found = checkpoint.dtype, cast("Sections", {section: {} for section in masks})
    try:
        for name, spec in checkpoint.linears.items():
            weight = weights.pop(f"{name}.weight").to(dtype)
            flat = (weight.T if spec.transposed else weight).reshape(spec.size)
            covered = torch.zeros(spec.size, dtype=torch.bool, device="cpu")
            for number, shell in enumerate(shell_names(checkpoint.ladder)):
                listed = listed_mask(shell_of(masks[f"shell-{shell}"], name, spec, number), spec, number)
                found[f"shell-{shell}"][f"{name}.values"] = flat[positions_of(listed & ~covered)]
                covered |= listed
    except (KeyError, RuntimeError, ShapeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: does not fit this base model: {error}.") from error
    found["shared"] = {n: w.to(dtype if w.is_floating_point() else w.dtype) for n, w in weights.items()}
    return found


def _read_overlay(folder: Path) -> dict[str, Any]:
    path = folder / OVERLAY_NAME
    try:
        overlay = json.loads(path.read_text(encoding="utf-8"))
        version = overlay["format"], overlay["format_version"]
        texts = [overlay["base_model"][key] for key in ("id", "sha256")]
        texts += [name for names in overlay["from_base"].values() for name in names]
        fits = all(isinstance(text, str) for text in texts) and isinstance(overlay["config"], dict)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no overlay here ({OVERLAY_NAME} is missing).") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}.") from None
    if version != (OVERLAY_FORMAT, OVERLAY_VERSION) or not fits:
        raise CheckpointError(f"{path}: found {version}, expected {(OVERLAY_FORMAT, OVERLAY_VERSION)} with its fields.")
    return dict(overlay)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise CheckpointError(f"{source}: is missing; copy or download the folder again.") from None
