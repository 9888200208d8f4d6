"""One linear as shells and back: which weights a level adds, as positions and values. Tensors only, no file.

Shells go from sparse to dense: the core (what the sparsest level keeps), one increment per denser level, then what
only an N:M level needs. A level reads a prefix of them. Values are in row-major order of the positions a shell adds.
Letters: O outputs, I inputs.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic_sparsity.errors import CheckpointError, ShapeError
from elastic_sparsity.ladder import Ladder, Level
from elastic_sparsity.masks import mask_at
from elastic_sparsity.packing import (
    pack_bits,
    pack_positions,
    packed_positions_size,
    positions_of,
    unpack_bits,
    unpack_positions,
)
from elastic_sparsity.precision import as_integers

Shell = Mapping[str, Tensor]  # "values" with "mask" (bitmap) or "positions" (Elias-Fano)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecord:
    """What training leaves of one linear.

    Attributes:
        weight_OI: base values; only those that some level keeps are stored.
        drop_level_OI: uint8, None if the ladder has no unstructured level.
        pattern_masks: bool (O, I), one an N:M pattern.
        pairs: (A (r, I), B (O, r)) of every group.
        transposed: the model stores this weight as (inputs, outputs).
    """

    weight_OI: Tensor
    drop_level_OI: Tensor | None
    pattern_masks: Sequence[Tensor]
    pairs: Sequence[tuple[Tensor, Tensor]]
    transposed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """What elastic_config.json says of one linear; fixes the shape of every tensor its shells hold.

    Attributes:
        shape: (O, I).
        transposed: the model stores this weight as (inputs, outputs).
        kept: weights a row keeps at each unstructured level, densest first.
        pattern_values: values in each pattern's shell, i.e. positions no earlier shell holds.
    """

    shape: tuple[int, int]
    transposed: bool
    kept: tuple[int, ...]
    pattern_values: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, width = self.shape
        counts = (width, *self.kept, 1)
        if rows < 1 or any(a < b for a, b in itertools.pairwise(counts)):
            raise ShapeError(f"shape {self.shape} with {list(self.kept)} kept a row is not nested.")
        if any(not 0 <= n <= rows * width for n in self.pattern_values):
            raise ShapeError(f"shape {self.shape} with {list(self.pattern_values)} values for patterns.")

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight in its module."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def num_values(self, shell: int) -> int:
        """How many values the shell with this number (file order) holds."""
        steps = (*reversed(self.kept),)
        if shell >= len(steps):
            return self.pattern_values[shell - len(steps)]
        return self.shape[0] * (steps[shell] - (steps[shell - 1] if shell else 0))

    def is_bitmap(self, shell: int) -> bool:
        """The core and patterns are bitmaps; an increment is one if the list of positions would be longer."""
        if shell == 0 or shell >= len(self.kept):
            return True
        return packed_positions_size(self.num_values(shell), self.size) >= -(-self.size // 8)

    def shell_shapes(self, shell: int) -> dict[str, tuple[int]]:
        """Shape of every tensor in a shell; all are flat, masks and positions uint8."""
        shapes = {"values": (self.num_values(shell),)}
        if self.is_bitmap(shell):
            return {"mask": (-(-self.size // 8),), **shapes}
        return {"positions": (packed_positions_size(self.num_values(shell), self.size),), **shapes}


@dataclass(frozen=True, slots=True)
class LoadedLinear:
    """One linear at one level: base values (to be masked), mask, and the adapters' (A, B) pairs that level uses."""

    weight_OI: Tensor
    mask_OI: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    transposed: bool


def shell_names(ladder: Ladder) -> list[str]:
    """Shells in file order: sparsest level first ("core"), then denser increments, then patterns."""
    unstructured = [f"level-{level.name}" for level in reversed(ladder.levels) if level.pattern is None]
    if unstructured:
        unstructured[0] = "core"
    return [*unstructured, *(f"pattern-{p.replace(':', 'of')}" for p in ladder.patterns)]


def num_shells(ladder: Ladder, level: Level) -> int:
    """How many shells, from the core on, a level reads."""
    if level.pattern is None:
        return ladder.num_unstructured - level.index
    return level.index + 1


def spec_of(record: LinearRecord, ladder: Ladder) -> LinearSpec:
    """The counts of a linear; every row of a level must keep the same number.

    Raises: ShapeError: if rows differ.
    """
    kept = []
    for level in range(ladder.num_unstructured):
        assert record.drop_level_OI is not None
        counts = mask_at(record.drop_level_OI, level).sum(dim=1)
        if counts.min() != counts.max():
            raise ShapeError(f"level {level}: rows keep {int(counts.min())} to {int(counts.max())} weights.")
        kept.append(int(counts[0]))
    covered = torch.zeros(record.weight_OI.shape, dtype=torch.bool, device="cpu")
    if record.drop_level_OI is not None:
        covered |= mask_at(record.drop_level_OI.cpu(), 0)
    new = []
    for mask in record.pattern_masks:
        new.append(int((mask.cpu() & ~covered).sum()))
        covered |= mask.cpu()
    rows, width = record.weight_OI.shape
    return LinearSpec(shape=(rows, width), transposed=record.transposed, kept=tuple(kept), pattern_values=tuple(new))


def encode_shells(record: LinearRecord, ladder: Ladder, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Every shell of one linear, in file order.

    An unstructured shell lists the positions it adds; a pattern's bitmap is its whole mask, and its values are those
    no earlier shell holds.
    """
    spec = spec_of(record, ladder)
    weight = record.weight_OI.detach().cpu().to(dtype).flatten()
    covered = torch.zeros(spec.size, dtype=torch.bool, device="cpu")
    shells = []
    for number, level in enumerate(reversed(range(ladder.num_unstructured))):
        assert record.drop_level_OI is not None
        new = mask_at(record.drop_level_OI.cpu().flatten(), level) & ~covered
        positions = positions_of(new)
        is_bitmap = spec.is_bitmap(number)
        where = {"mask": pack_bits(new)} if is_bitmap else {"positions": pack_positions(positions, spec.size)}
        shells.append({**where, "values": weight[positions]})
        covered |= new
    for pattern in record.pattern_masks:
        mask = pattern.cpu().flatten()
        shells.append({"mask": pack_bits(mask), "values": weight[positions_of(mask & ~covered)]})
        covered |= mask
    return shells


def shell_of(tensors: Mapping[str, Tensor], name: str, spec: LinearSpec, number: int) -> dict[str, Tensor]:
    """One linear's part of a section's tensors; without "values" if they are not there."""
    parts = ((part, f"{name}.{part}") for part in spec.shell_shapes(number))
    return {part: tensors[full] for part, full in parts if part != "values" or full in tensors}


def listed_mask(shell: Shell, spec: LinearSpec, number: int) -> Tensor:
    """What a shell lists, as a flat mask: an increment's own positions, or a whole pattern. Needs no "values".

    Raises: ShapeError.
    """
    if spec.is_bitmap(number):
        return unpack_bits(shell["mask"], spec.size)
    listed = torch.zeros(spec.size, dtype=torch.bool, device="cpu")  # whatever torch's default device is
    return listed.index_fill_(0, unpack_positions(shell["positions"], spec.num_values(number), spec.size), True)


def decode_shells(shells: Sequence[Shell], spec: LinearSpec, level: Level, where: str) -> tuple[Tensor, Tensor]:
    """Base values and mask of a level, from its prefix of shells.

    Outside the mask the values are zero, or, for a pattern, whatever the unstructured levels keep there.

    Args:
        shells: shapes and dtypes as `spec.shell_shapes` says.
    Returns: (O, I) in the values' dtype, (O, I) bool.
    Raises: CheckpointError: if bits and values disagree, shells overlap, or a row's count is not the promised one.
    """
    weight = torch.zeros(spec.size, dtype=shells[0]["values"].dtype, device="cpu")
    covered = torch.zeros(0, dtype=torch.bool, device="cpu")
    mask = covered
    for number, shell in enumerate(shells):
        try:
            mask, new = _placed(shell, spec, number, covered)
        except ShapeError as error:
            raise CheckpointError(f"{where}: shell {number}: {error}") from None
        if new.numel() != shell["values"].numel():
            raise CheckpointError(
                f"{where}: shell {number} with {shell['values'].numel()} values places {new.numel()} weights; "
                "the file is damaged."
            )
        as_integers(weight).scatter_(0, new, as_integers(shell["values"]))
        covered = mask if number == 0 else covered.index_fill_(0, new, True)
        if number + 1 == min(len(shells), len(spec.kept)):
            _check_rows(covered.view(spec.shape), spec.kept[-1 - number], where)
    if level.pattern is None:
        mask = covered
    else:
        _check_pattern(mask, *level.pattern, where)
    return weight.view(spec.shape), mask.view(spec.shape)


def _placed(shell: Shell, spec: LinearSpec, number: int, covered: Tensor) -> tuple[Tensor, Tensor]:
    """A shell's bitmap (if it has one), and the positions of its values."""
    if "positions" in shell:
        return covered, unpack_positions(shell["positions"], shell["values"].numel(), spec.size)
    mask = unpack_bits(shell["mask"], spec.size)
    is_pattern = number >= len(spec.kept)
    return mask, positions_of(mask & ~covered if is_pattern and number else mask)


def _check_rows(covered_OI: Tensor, kept: int, where: str) -> None:
    """Counts are exact only if no shell repeats a position of another."""
    bits = covered_OI.numpy().view(np.uint8)  # numpy's row sums take a quarter of torch's time
    wrong = np.count_nonzero(np.add.reduce(bits, axis=1, dtype=np.uint32) != kept)
    if wrong:
        raise CheckpointError(f"{where}: {wrong} rows keep another number than {kept}; shells are damaged or overlap.")


def _check_pattern(mask: Tensor, kept: int, size: int, where: str) -> None:
    bits = mask.numpy()
    if size in (2, 4, 8):  # eight at a time
        packed = np.packbits(bits, bitorder="little")
        lanes = [packed >> shift & ((1 << size) - 1) for shift in range(0, 8, size)]
        wrong = sum(np.count_nonzero(np.bitwise_count(lane) > kept) for lane in lanes)
    else:
        counts = np.add.reduce(bits.view(np.uint8).reshape(-1, size), axis=1, dtype=np.uint8)
        wrong = np.count_nonzero(counts > kept)
    if wrong:
        raise CheckpointError(f"{where}: {wrong} groups keep more than {kept} of {size}; the shell is damaged.")
