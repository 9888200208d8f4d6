"""One weight as a bitmask and its non-zero values, in the tensor layout of the old `sparse-bitmask` checkpoints.

SparseML, and compressed-tensors until it dropped the format, stored NAME.weight as four tensors: `NAME.compressed`
(what is not zero, row by row), `NAME.bitmask` (a row's bits padded to bytes, least significant bit first),
`NAME.shape`, and `NAME.row_offsets` (where in `compressed` each row starts). Own code; tensors only, no file.
Letters: R rows, C columns of the weight as its module stores it (outputs and inputs, but for GPT-2's `Conv1D`).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError, brief
from elastic_sparsity.packing import positions_of
from elastic_sparsity.precision import DTYPES, as_integers

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def compress(weight_RC: Tensor) -> dict[str, Tensor]:
    """The four tensors of one weight.

    A kept -0 counts as a value (theirs counted it as zero), so that `restore` gives every bit back.

    Args:
        weight_RC: float16, bfloat16 or float32.
    Returns: `compressed` (n,) in the weight's dtype, `bitmask` (R, ceil(C / 8)) uint8, `shape` (2,) and `row_offsets`
        (R,) int64, on the CPU.
    """
    weight = weight_RC.detach().cpu().contiguous()
    mask = as_integers(weight) != 0
    counts = mask.sum(dim=1)
    return {
        "compressed": weight.view(-1)[positions_of(mask)],
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little")),
        "shape": torch.tensor(weight.shape),
        "row_offsets": counts.cumsum(0) - counts,
    }


def restore(parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight (R, C) again, bit for bit; inverse of `compress`.

    Raises: ShapeError: if a part is missing, or they contradict each other.
    """
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise ShapeError(f"no {', '.join(missing)}; a bitmask weight has {', '.join(PARTS)}.")
    compressed, bitmask, offsets = parts["compressed"], parts["bitmask"], parts["row_offsets"]
    if parts["shape"].dtype != torch.int64 or parts["shape"].shape != (2,) or parts["shape"].min() < 1:
        raise ShapeError(f"shape: found {brief(parts['shape'].tolist())}, expected two positive sizes.")
    rows, columns = parts["shape"].tolist()
    if compressed.dtype not in DTYPES.values():
        raise ShapeError(f"compressed: found {compressed.dtype}, expected {', '.join(DTYPES)}.")
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-columns // 8)):
        raise ShapeError(
            f"bitmask: found {tuple(bitmask.shape)} {bitmask.dtype}, expected {(rows, -(-columns // 8))} uint8."
        )
    bits = np.unpackbits(bitmask.numpy(), axis=1, bitorder="little")
    if bits[:, columns:].any():
        raise ShapeError("bitmask: padding bits after a row's last weight are set.")
    mask = torch.from_numpy(bits[:, :columns].astype(bool))
    counts = mask.sum(dim=1)
    if compressed.shape != (int(counts.sum()),) or not torch.equal(offsets, counts.cumsum(0) - counts):
        raise ShapeError(
            f"compressed: {tuple(compressed.shape)} values for {int(counts.sum())} bits, "
            "or row_offsets that do not fit them; the file is damaged."
        )
    weight = torch.zeros(rows * columns, dtype=compressed.dtype)
    as_integers(weight).scatter_(0, positions_of(mask), as_integers(compressed))
    return weight.view(rows, columns)
