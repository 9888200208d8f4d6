"""One linear of a level, from shells and adapters to its finished weight: dense, or packed as it stays in memory.

Compiled functions where they were built, else torch's; the same bits either way (tests/test_decoding.py), since both
add the adapters by the same matrix product. Shells in, tensors out: no file, no model. Letters: O outputs, I inputs.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_sparsity.adapters import merge
from elastic_sparsity.errors import CheckpointError, ShapeError
from elastic_sparsity.ladder import Level
from elastic_sparsity.native import Kernels
from elastic_sparsity.packed_weight import PackedWeight, pack_weight
from elastic_sparsity.packing import low_bits_of
from elastic_sparsity.precision import as_integers
from elastic_sparsity.shells import LinearSpec, Shell, decode_shells

Pairs = Sequence[tuple[Tensor, Tensor]]  # (A (r, I), B (O, r)) of the groups to add, in group order
_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}  # bits that are all ones in NaN
FLOATS = frozenset(_EXPONENTS)


class Decoder:
    """Decodes the linears of one level, in any number of threads.

    Args:
        kernels: None = torch code.
    """

    def __init__(self, level: Level, kernels: Kernels | None) -> None:
        self._level, self._kernels = level, kernels
        self._scratch = threading.local()  # fresh memory would cost more, in page faults, than the decoding

    def write_(self, shells: Sequence[Shell], spec: LinearSpec, pairs: Pairs, out: Tensor, where: str) -> None:
        """Fills `out` with (W + sum B A) * mask, rounded once to its dtype, +0 outside the mask.

        Args:
            out: `spec.stored_shape`, any float dtype, any device.
        Raises: CheckpointError: damaged shells (see `decode_shells`), or a weight that is not finite in `out`'s dtype;
            `out` may hold anything then.
        """
        out_OI = out.T if spec.transposed else out
        if self._kernels is None:
            weight, mask = decode_shells(shells, spec, self._level, where)
            merge(weight, pairs, mask, out_OI)
            check_finite(out, where, None)
            if (as_integers(out_OI.cpu()).numpy().astype(bool) > mask.numpy()).any():
                raise CheckpointError(
                    f"{where}: weights outside the mask are not zero after the merge; report this bug."
                )
            return
        merged, bits = self._merged(shells, spec, pairs, where)
        if out.device.type == "cpu" and out_OI.is_contiguous() and out.dtype != torch.float16:
            finished = out_OI
        else:
            dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
            finished = torch.empty(spec.shape, dtype=dtype, device="cpu")
        if not self._kernels.finish_(merged, bits, finished):
            raise _not_finite(where, out.dtype)
        if finished is not out_OI:
            out_OI.copy_(finished)
        if out.dtype == torch.float16:
            check_finite(out, where, self._kernels)

    def pack(
        self, shells: Sequence[Shell], spec: LinearSpec, pairs: Pairs, dtype: torch.dtype, where: str
    ) -> PackedWeight:
        """The same, packed.

        Args:
            dtype: float32 or bfloat16.
        Raises: CheckpointError.
        """
        if self._kernels is None:
            weight, mask = decode_shells(shells, spec, self._level, where)
            packed: PackedWeight | None = pack_weight(merge(weight, pairs, mask), mask, dtype)
            assert packed is not None
            check_finite(packed.values, where, None)
            return packed
        merged, bits = self._merged(shells, spec, pairs, where)
        packed = self._kernels.pack(merged.view(spec.shape), bits, dtype)
        if packed is None:
            raise _not_finite(where, dtype)
        return packed

    def _merged(self, shells: Sequence[Shell], spec: LinearSpec, pairs: Pairs, where: str) -> tuple[Tensor, Tensor]:
        """Base values plus adapters, flat float32, not masked yet; and the level's mask as 64-bit words."""
        merged, covered, pattern = self._buffers(spec.size)
        for number, shell in enumerate(shells):
            try:
                placed = self._place(shell, spec, number, merged, covered, pattern)
            except ShapeError as error:
                raise CheckpointError(f"{where}: shell {number}: {error}") from None
            if placed != shell["values"].numel():
                raise CheckpointError(
                    f"{where}: shell {number} with {shell['values'].numel()} values places {placed} weights; "
                    "the file is damaged."
                )
            if number + 1 == min(len(shells), len(spec.kept)):
                self._check_rows(covered, spec, spec.kept[-1 - number], where)
        bits = covered
        if self._level.pattern is not None:
            bits = pattern
            self._check_groups(bits, spec, *self._level.pattern, where)
        if pairs:
            lora_A, lora_B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
            merged.view(spec.shape).addmm_(lora_B.float(), lora_A.float())  # as `merge` does: the definition
        return merged, bits

    def _place(
        self, shell: Shell, spec: LinearSpec, number: int, merged: Tensor, covered: Tensor, pattern: Tensor
    ) -> int:
        assert self._kernels is not None
        values = shell["values"].float() if shell["values"].dtype == torch.float16 else shell["values"]
        for part, shape in spec.shell_shapes(number).items():  # compiled code would read beyond a shorter one
            if tuple(shell[part].shape) != shape:
                raise ShapeError(f"{part}: found {tuple(shell[part].shape)}, expected {shape}.")
        if "positions" in shell:
            if not values.numel():
                return 0
            low_bits = low_bits_of(values.numel(), spec.size)
            return self._kernels.place_positions_(shell["positions"], low_bits, values, covered, merged)
        is_pattern = number >= len(spec.kept)
        if number == 0:
            placed = self._kernels.place_core_(shell["mask"], values, covered, merged)
            if is_pattern:
                pattern.copy_(covered)
            return placed
        return self._kernels.place_bitmap_(shell["mask"], values, covered, pattern if is_pattern else None, merged)

    def _check_rows(self, covered: Tensor, spec: LinearSpec, kept: int, where: str) -> None:
        assert self._kernels is not None
        wrong = self._kernels.wrong_rows(covered, *spec.shape, kept)
        if wrong:
            raise CheckpointError(
                f"{where}: {wrong} rows keep another number than {kept}; shells are damaged or overlap."
            )

    def _check_groups(self, bits: Tensor, spec: LinearSpec, kept: int, size: int, where: str) -> None:
        assert self._kernels is not None
        wrong = self._kernels.wrong_groups(bits, spec.size, kept, size)
        if wrong:
            raise CheckpointError(f"{where}: {wrong} groups keep more than {kept} of {size}; the shell is damaged.")

    def _buffers(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """This thread's float32 (size,), and two masks of 64-bit words."""
        words = -(-size // 64)
        held: Tensor | None = getattr(self._scratch, "merged", None)
        if held is None or held.numel() < size:
            # dtype and device said: a process's defaults may be others, also just while another model loads
            self._scratch.merged = torch.empty(size, dtype=torch.float32, device="cpu")
            self._scratch.masks = torch.empty(2, words, dtype=torch.int64, device="cpu")
        masks: Tensor = self._scratch.masks
        return self._scratch.merged[:size], masks[0, :words], masks[1, :words]


def check_finite(weight: Tensor, where: str, kernels: Kernels | None) -> None:
    """Raises: CheckpointError: if a value is NaN or infinite."""
    exponent = _EXPONENTS[weight.dtype]
    if kernels is not None and weight.device.type == "cpu" and weight.is_contiguous():
        if not kernels.all_finite(weight, exponent):
            raise _not_finite(where, weight.dtype)
        return
    for part in weight.reshape(-1).split(1 << 16):  # what the comparison needs would otherwise stay with the process
        bits = as_integers(part.cpu()).numpy()
        if np.any((bits & exponent) == exponent):  # all ones: NaN or infinity
            raise _not_finite(where, weight.dtype)


def _not_finite(where: str, dtype: torch.dtype) -> CheckpointError:
    return CheckpointError(f"{where}: weights are NaN or infinite in {dtype}; try another dtype.")
