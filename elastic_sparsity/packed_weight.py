"""A sparse matrix as a bitmask and its kept values, row by row: what stays in memory in the packed runtime.

Tensors only. The functions here are torch's own, slow and obvious: the oracle of the compiled ones (native.py), and
what runs where those could not be built. Letters: O outputs, I inputs, W = ceil(I / 64) words, T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_sparsity.packing import pack_bits, positions_of, unpack_bits
from elastic_sparsity.precision import as_integers

SLACK = 64  # elements behind the last value that a kernel may read, and never uses


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """Attributes:
    shape: (O, I).
    mask_OW: int64; bit i % 64 of word i // 64 (least significant first) is set if a row keeps input i.
    values: (kept + SLACK,) bfloat16 or float32, row by row in ascending order of inputs; the last SLACK are zero.
    starts: (O + 1,) int64; row o has values[starts[o] : starts[o + 1]].
    """

    shape: tuple[int, int]
    mask_OW: Tensor
    values: Tensor
    starts: Tensor

    def __post_init__(self) -> None:
        rows, width = self.shape
        parts = (self.mask_OW, torch.int64), (self.values, self.values.dtype), (self.starts, torch.int64)
        for tensor, dtype in parts:  # compiled code takes their addresses
            assert tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
        assert tuple(self.mask_OW.shape) == (rows, -(-width // 64)) and self.starts.numel() == rows + 1

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.dtype.itemsize for t in (self.mask_OW, self.values, self.starts))


def words_of(mask: Tensor) -> Tensor:
    """A bool mask of any shape as flat 64-bit words, least significant bit first, the last one padded with zeros."""
    packed = pack_bits(mask)
    return torch.cat([packed, packed.new_zeros(-packed.numel() % 8)]).view(torch.int64)


def mask_of_words(words: Tensor, count: int) -> Tensor:
    """Inverse of `words_of`: the first `count` bits as a flat bool tensor."""
    return unpack_bits(words.view(torch.uint8)[: -(-count // 8)], count)


def pack_weight(weight_OI: Tensor, mask_OI: Tensor, dtype: torch.dtype) -> PackedWeight:
    """What `mask_OI` keeps of a weight, rounded to `dtype`."""
    rows, width = weight_OI.shape
    padded = torch.zeros(rows, -(-width // 64) * 64, dtype=torch.bool, device="cpu")
    padded[:, :width] = mask_OI
    kept = weight_OI.contiguous().view(-1)[positions_of(mask_OI.contiguous().view(-1))].to(dtype)
    starts = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")
    starts[1:] = mask_OI.sum(dim=1).cumsum(0)
    return PackedWeight(
        shape=(rows, width),
        mask_OW=words_of(padded).view(rows, -1),
        values=torch.cat([kept, kept.new_zeros(SLACK)]),
        starts=starts,
    )


def unpack_rows(weight: PackedWeight, begin: int, end: int) -> Tensor:
    """Rows [begin, end) as (end - begin, I) with zeros."""
    width = weight.shape[1]
    words = weight.mask_OW[begin:end].reshape(-1)
    mask = mask_of_words(words, words.numel() * 64).view(end - begin, -1)[:, :width]
    dense = torch.zeros(end - begin, width, dtype=weight.values.dtype, device="cpu")
    first, last = int(weight.starts[begin]), int(weight.starts[end])
    positions = positions_of(mask.reshape(-1))
    as_integers(dense).view(-1).scatter_(0, positions, as_integers(weight.values[first:last]))
    return dense


def product(weight: PackedWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias through the dense weight. Returns: (T, O)."""
    return F.linear(x_TI, unpack_rows(weight, 0, weight.shape[0]), bias_O)
