"""Proving a checkpoint's promises from its bytes: an independent, slow and obvious second reading of every level."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, ElasticSparsityError
from elastic_sparsity.hub import checkpoint_folder
from elastic_sparsity.ladder import AnyLevel, Level, StructuredLevel
from elastic_sparsity.shells import listed_mask, num_shells, shell_names, shell_of
from elastic_sparsity.slicing import load_level
from elastic_sparsity.wiring import wiring_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One promise: what, whether it holds, and how much was looked at or what is wrong."""

    name: str
    passed: bool
    detail: str


def verify(path: str | Path, progress: Callable[[str, int, int], None] | None = None, **hub: Any) -> list[Check]:
    """Checks everything a checkpoint promises, for every level whose files are here.

    Files (size, hash, header); masks of sparser levels inside those of denser ones; exact counts a row; N:M along the
    input dimension; and for the models that `ElasticModel.from_pretrained` makes: every weight equals
    (W + sum of B A) * M, computed here from the raw bytes, bit for bit, so exact zeros outside the mask.

    Of a structured level: the promised counts of units, and that the smaller model's parameters are the section's, or
    what all levels share, bit for bit, and no others.

    Raises: CheckpointError: if elastic_config.json itself cannot be read.
    """
    checkpoint = ElasticCheckpoint(checkpoint_folder(path, **hub))
    levels = [level for level in checkpoint.ladder.levels if checkpoint.is_complete(level)]
    structured = [level for level in checkpoint.structured if checkpoint.is_complete(level)]
    checks = [_attempt("files: sizes, hashes, headers", lambda: _check_files(checkpoint, [*levels, *structured]))]
    if not checks[0].passed:
        return checks
    reading = _Reading(checkpoint, levels)
    steps: list[tuple[str, Callable[[], str]]] = []
    if levels:
        steps.append(("nested: a sparser mask lies inside every denser one", reading.check_nested))
        steps.append(("exact counts a row, N:M along the inputs", reading.check_counts))
    steps += [
        (f"{level.title}: loaded weights = (W + sum B A) * M, bit for bit", partial(reading.check_slice, level))
        for level in levels
    ]
    steps += [
        (f"{level.title}: loaded weights = the section's, bit for bit", partial(_check_structured, checkpoint, level))
        for level in structured
    ]
    for number, (name, step) in enumerate(steps):
        checks.append(_attempt(name, step))
        if progress is not None:
            progress("verifying", number + 1, len(steps))
    return checks


def _attempt(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name=name, passed=True, detail=step())
    except ElasticSparsityError as error:
        return Check(name=name, passed=False, detail=str(error))


def _check_files(checkpoint: ElasticCheckpoint, levels: list[AnyLevel]) -> str:
    checkpoint.check_extras()
    for level in levels:
        checkpoint.open_level(level)
    present = checkpoint.check_present()
    if not levels:
        raise CheckpointError(f"{checkpoint.folder}: no level is complete here.")
    total = sum(len(entries) for entries in checkpoint.manifest.files.values())
    return f"{present} of {total} files of tensors are here"


def _load(checkpoint: ElasticCheckpoint, section: str) -> dict[str, Tensor]:
    """A section's tensors by the library's own reader."""
    found: dict[str, Tensor] = {}
    for entry in checkpoint.manifest.files[section]:
        found.update(load_file(checkpoint.folder / entry.file))
    return found


def _check_structured(checkpoint: ElasticCheckpoint, level: StructuredLevel) -> str:
    """The smaller model a user gets against the bytes."""
    model = load_level(checkpoint, level, checkpoint.dtype)  # checks names, shapes, dtypes and numbers of units
    section = _load(checkpoint, level.name)
    units = {name: tensor for name, tensor in section.items() if name.endswith(".units")}
    expected = _load(checkpoint, "shared") | {name: section[name] for name in section.keys() - units.keys()}
    weights = total = 0
    for name, spec in checkpoint.linears.items():
        stored = expected[f"{name}.weight"]
        weights, total = weights + stored.numel(), total + spec.size
        expected[f"{name}.weight"] = stored.T if spec.transposed else stored
    found = dict(model.named_parameters())
    for name in expected.keys() | found.keys():
        if name not in found or name not in expected or not torch.equal(found[name].detach(), expected[name]):
            raise CheckpointError(f"{name}: level {level.name}: the loaded parameter is not the promised one.")
    prefix, depth = f"{architecture_of(model.config.model_type).blocks}.", len(decoder_blocks(model))
    for name, bits in units.items():
        stays, down = sum(byte.bit_count() for byte in bits.tolist()), f".{wiring_of(model.config).down}.units"
        heads, channels = level.counts(depth)
        if stays != (channels if name.endswith(down) else heads)[int(name.removeprefix(prefix).partition(".")[0])]:
            raise CheckpointError(f"{name}: level {level.name} keeps {stays} units, another number than promised.")
    return f"{weights:,} of {total:,} weights, {len(units)} choices of units"


class _Reading:
    """All tensors of the levels that are here, read by other code than a level's usual way."""

    def __init__(self, checkpoint: ElasticCheckpoint, levels: list[Level]) -> None:
        self.checkpoint, self.levels = checkpoint, levels
        self.counted = f"{len(checkpoint.linears)} linears, {len(levels)} of {len(checkpoint.ladder.levels)} levels"
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for section in dict.fromkeys(s for level in levels for s in checkpoint.manifest.sections_of(level)):
            self.tensors[section] = _load(checkpoint, section)

    def shell(self, name: str, number: int) -> tuple[Tensor, Tensor]:
        """The positions a shell lists, as a flat mask, and its values."""
        spec = self.checkpoint.linears[name]
        tensors = self.tensors[f"shell-{shell_names(self.checkpoint.ladder)[number]}"]
        shell = shell_of(tensors, name, spec, number)
        return listed_mask(shell, spec, number), shell["values"]

    def level(self, name: str, level: Level) -> tuple[Tensor, Tensor]:
        """Base values and mask of one linear, (O, I)."""
        spec = self.checkpoint.linears[name]
        weight = torch.zeros(spec.size, dtype=self.checkpoint.dtype, device="cpu")
        held = torch.zeros(spec.size, dtype=torch.bool, device="cpu")
        mask = held
        for number in range(num_shells(self.checkpoint.ladder, level)):
            listed, values = self.shell(name, number)
            new = listed & ~held
            if int(new.sum()) != values.numel():
                raise CheckpointError(f"{name}: shell {number} places {int(new.sum())} of its {values.numel()} values.")
            weight[new] = values
            held |= listed
            mask = listed if number >= len(spec.kept) else held.clone()
        return weight.view(spec.shape), mask.view(spec.shape)

    def check_nested(self) -> str:
        chain = [level for level in self.levels if level.pattern is None]
        for name in self.checkpoint.linears:
            for denser, sparser in itertools.pairwise(chain):
                if (self.level(name, sparser)[1] & ~self.level(name, denser)[1]).any():
                    raise CheckpointError(f"{name}: level {sparser.name} keeps what {denser.name} drops.")
        return self.counted

    def check_counts(self) -> str:
        for name, spec in self.checkpoint.linears.items():
            for level in self.levels:
                mask = self.level(name, level)[1]
                if level.pattern is None:
                    good = (mask.sum(dim=1) == spec.kept[level.index]).all()
                else:
                    good = (mask.reshape(-1, level.pattern[1]).sum(dim=1) <= level.pattern[0]).all()
                if not good:
                    raise CheckpointError(f"{name}: level {level.name} keeps another number than promised.")
        return self.counted

    def check_slice(self, level: Level) -> str:
        """The model a user gets against the definition."""
        model = load_level(self.checkpoint, level, self.checkpoint.dtype)
        zeros = total = 0
        held = [self.tensors[f"adapters-{group}"] for group in self.checkpoint.active_groups(level)]
        for name, spec in self.checkpoint.linears.items():
            weight, mask = self.level(name, level)
            expected = weight.float()
            if held:
                lora_A = torch.cat([group[f"{name}.lora_A"] for group in held]).float()
                lora_B = torch.cat([group[f"{name}.lora_B"] for group in held], dim=1).float()
                expected = torch.addmm(expected, lora_B, lora_A)  # the same summation as `merge`, or last bits differ
            expected = torch.where(mask, expected, 0.0).to(self.checkpoint.dtype)
            found = weight_OI(model.get_submodule(name)).detach()
            if not torch.equal(found, expected) or torch.count_nonzero(found[~mask]):
                raise CheckpointError(f"{name}: level {level.name}: the loaded weight is not the promised one.")
            zeros, total = zeros + int(torch.count_nonzero(found == 0)), total + spec.size
        return f"{100 * zeros / total:.2f} % zeros of {total:,} weights"
