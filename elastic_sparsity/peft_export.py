"""Adapters as PEFT LoRA folders, and putting a level's zeros back after a merge or a fine-tuning elsewhere.

PEFT knows no mask: its merge adds B A everywhere, which fills the zeros (peers' most reported loss). A level is
(W + sum B A) * M, so after any merge outside this package `reapply_masks_` is needed, and enough.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic_sparsity.arch import weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.files import atomic_folder, check_output_folder, write_json
from elastic_sparsity.hub import checkpoint_folder
from elastic_sparsity.manifest import FileEntry, Manifest


def export_peft(path: str | Path, output: str | Path, level: str | float | None = None, **hub: Any) -> list[str]:
    """One PEFT adapter folder a group: `group-0`, `group-1`, ...; `levels.json` says which ones a level adds up.

    Put them on `ElasticModel.from_pretrained(path, level, merge_adapters=False)`. While they are not merged, PEFT
    computes (W * M) x + B A x, which differs from the level by B A outside the mask; merge, then `reapply_masks_`.

    Args:
        path: folder or hub id of an elastic checkpoint.
        level: only the groups of this level; None = all groups whose files are here (of a hub id: all).
    Returns: names of the folders made.
    Raises: CheckpointError, LevelError, OutputError; ConfigError: if peft is not installed.
    """
    try:
        from peft import LoraConfig  # slow import, only here
    except ImportError:
        raise ConfigError("export for PEFT needs it: pip install 'peft>=0.18'.") from None
    check_output_folder(Path(output))
    checkpoint = ElasticCheckpoint(checkpoint_folder(path, files=partial(_adapter_files, level=level), **hub))
    chosen = checkpoint.ladder.levels if level is None else (checkpoint.find_masked(level, "export_peft"),)
    active = {x.name: checkpoint.active_groups(x) for x in chosen}
    if level is None:
        active = {name: groups for name, groups in active.items() if all(map(checkpoint.has_group, groups))}
    if not any(active.values()):
        raise CheckpointError(f"{path}: no adapters to export here; all ranks are 0, or their files are missing.")
    base = None if checkpoint.changed_base else checkpoint.config.get("base_model")  # adapters fit other weights then
    with atomic_folder(Path(output)) as scratch:
        groups = sorted({group for found in active.values() for group in found})
        for group in groups:
            rank, folder = checkpoint.ranks[group], scratch / f"group-{group}"
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,  # scaling alpha / r = 1
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
                target_modules=sorted(checkpoint.linears),
                fan_in_fan_out=any(spec.transposed for spec in checkpoint.linears.values()),
                base_model_name_or_path=base.get("id") if isinstance(base, dict) else None,
            )
            folder.mkdir()
            config.save_pretrained(str(folder))
            tensors = {
                f"base_model.model.{name}.weight": tensor.contiguous()
                for name, tensor in checkpoint.adapter_tensors(group).items()
            }
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        folders = {name: [f"group-{group}" for group in found] for name, found in active.items()}
        write_json(scratch / "levels.json", {"checkpoint_id": checkpoint.manifest.checkpoint_id, "levels": folders})
    return [f"group-{group}" for group in groups]


def _adapter_files(manifest: Manifest, level: str | float | None) -> list[FileEntry]:
    sections = [section for section in manifest.files if section.startswith("adapters-")]
    if level is not None:
        sections = [x for x in manifest.sections_of(manifest.find(level)) if x in sections]
    return [entry for section in sections for entry in manifest.files[section]]


@torch.no_grad()
def reapply_masks_(model: nn.Module, path: str | Path, level: str | float, **hub: Any) -> int:
    """Sets every weight outside a level's mask to zero again, in place; returns how many were not.

    Args:
        model: a plain causal LM of the same architecture, e.g. after PEFT's `merge_and_unload`.
    Raises: LevelError: outside the ladder, or structured. CheckpointError: if a linear is missing, wrapped, or of
        another shape.
    """
    checkpoint = ElasticCheckpoint(checkpoint_folder(path, level, **hub))
    wanted = checkpoint.find_masked(level, "reapply_masks_")
    weights = {name: _weight(model, name, spec.shape) for name, spec in checkpoint.linears.items()}
    count = 0
    for name, linear in checkpoint.level_linears(wanted):
        weight, outside = weights[name], ~linear.mask_OI.to(weights[name].device)
        count += int(torch.count_nonzero((weight != 0) & outside))
        weight.masked_fill_(outside, 0)
    return count


def _weight(model: nn.Module, name: str, shape: tuple[int, int]) -> Tensor:
    try:
        weight = weight_OI(model.get_submodule(name))
    except AttributeError:
        raise CheckpointError(f"{name}: no such linear in the model; merge and unload PEFT first.") from None
    if tuple(weight.shape) != shape or weight.is_meta:
        raise CheckpointError(f"{name}: found a weight {tuple(weight.shape)} on {weight.device}, expected {shape}.")
    return weight
