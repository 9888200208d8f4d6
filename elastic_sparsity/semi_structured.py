"""2:4 weights as NVIDIA's sparse tensor cores take them: packing on any machine, products where the GPU can.

The layout is the one `torch.sparse.to_sparse_semi_structured` makes for CUTLASS: `packed` holds the two kept values of
every four, `meta` their two 2-bit indices, four bits a group of four, in words of 16 bits (float16, bfloat16) or 32
(int8), interleaved as the GPU's threads read them (CUTLASS, tools/util/host_reorder.h and layout/matrix.h). Own code,
as reshapes; a test compares it with torch's. float32 has another layout (1:2), which a 2:4 level does not fit. The
products themselves have never run here: no GPU was at hand. Letters: O outputs, I inputs, W words a row.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_sparsity.arch import is_transposed
from elastic_sparsity.errors import ConfigError, ShapeError, UnsupportedModelError

WORDS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int32}
# Rows and columns a weight must be multiples of for the kernels; the layout alone needs half as many columns.
TILES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}
# By the four bits "is not zero", bit 0 the first: index of the first and of the second kept value. With fewer than two
# values any pair that contains them is right; these are the pairs torch takes. Three or four values have none.
_PAIRS = {
    0b0000: (2, 3), 0b0001: (0, 2), 0b0010: (1, 2), 0b0100: (2, 3), 0b1000: (2, 3), 0b0011: (0, 1), 0b0101: (0, 2),
    0b1001: (0, 3), 0b0110: (1, 2), 0b1010: (1, 3), 0b1100: (2, 3),
}  # fmt: skip


def pack_2of4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of a 2:4 weight.

    Args:
        weight_OI: float16, bfloat16 or int8, on the CPU; at most 2 of 4 neighbours along I are not zero (a kept -0
            counts as a value, so that nothing changes by packing).
    Returns: packed (O, I / 2) in the weight's dtype; meta (O, W), int16 with W = I / 16, or int32 with W = I / 32.
    Raises: ShapeError: another dtype, sizes the layout cannot hold, or not 2:4.
    """
    rows, columns, word = _check_layout(weight_OI.dtype, tuple(weight_OI.shape))
    groups = weight_OI.detach().contiguous().view(rows, columns // 4, 4)
    kept = groups.view(torch.int8 if word == torch.int32 else torch.int16) != 0
    code = (kept * torch.tensor([1, 2, 4, 8])).sum(dim=-1)
    table = torch.full((16, 2), -1)
    for bits, pair in _PAIRS.items():
        table[bits] = torch.tensor(pair)
    pairs = table[code]
    if (pairs < 0).any():
        row, group = (int(x) for x in (pairs[..., 0] < 0).nonzero()[0])
        raise ShapeError(
            f"not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold {int(kept[row, group].sum())} values; "
            "expected at most 2 of 4."
        )
    packed = groups.gather(-1, pairs).reshape(rows, columns // 2)
    per_word = word.itemsize * 2
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).view(rows, -1, per_word)
    words = (nibbles << torch.arange(0, 4 * per_word, 4)).sum(dim=-1)
    half = 1 << (4 * per_word - 1)
    return packed, _interleave((words + half) % (2 * half) - half, word).to(word)  # as two's complement


def unpack_2of4(packed: Tensor, meta: Tensor) -> Tensor:
    """The dense weight (O, I) again, bit for bit; inverse of `pack_2of4`.

    Raises: ShapeError: if the two do not fit each other.
    """
    if packed.ndim != 2:
        raise ShapeError(f"packed: found {tuple(packed.shape)}, expected two sizes.")
    rows, columns, word = _check_layout(packed.dtype, (packed.shape[0], 2 * packed.shape[1]))
    per_word = word.itemsize * 2
    if meta.dtype != word or tuple(meta.shape) != (rows, columns // (4 * per_word)):
        raise ShapeError(
            f"meta: found {tuple(meta.shape)} {meta.dtype}, expected {(rows, columns // (4 * per_word))} {word} "
            f"for packed {tuple(packed.shape)} {packed.dtype}."
        )
    words = _straighten(meta.long(), word)
    nibbles = (words[..., None] >> torch.arange(0, 4 * per_word, 4) & 0b1111).view(rows, columns // 4)
    pairs = torch.stack((nibbles & 0b11, nibbles >> 2), dim=-1)
    if (pairs[..., 0] >= pairs[..., 1]).any():
        raise ShapeError("meta: a group's second index is not above its first; the file is damaged.")
    weight = torch.zeros(rows, columns // 4, 4, dtype=packed.dtype)
    return weight.scatter_(-1, pairs, packed.view(rows, columns // 4, 2)).view(rows, columns)


def _check_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int, torch.dtype]:
    """Rows, columns and the dtype of a word."""
    if dtype not in WORDS:
        known = ", ".join(str(x).removeprefix("torch.") for x in WORDS)
        raise ShapeError(f"dtype {dtype}: the 2:4 layout holds {known}; cast the weight first.")
    rows, columns = TILES[dtype][0], TILES[dtype][1] // 2
    if len(shape) != 2 or min(shape) < 1 or shape[0] % rows or shape[1] % columns:
        raise ShapeError(f"shape {shape}: the 2:4 layout of {dtype} takes multiples of {(rows, columns)}.")
    return shape[0], shape[1], WORDS[dtype]


def _interleave(words_OW: Tensor, word: torch.dtype) -> Tensor:
    """Words by (row, column) -> in memory order.

    A row is (block, a1, a0, b) with 8 values of b, in blocks of 32 (16-bit words) or of 16 (32-bit, no a1); a column is
    (c1, c0). Memory order is c1, block, b, a1, then the 2 x 2 words of a0 and c0, transposed.
    """
    rows, columns = words_OW.shape
    a1 = 2 if word == torch.int16 else 1
    parts = words_OW.view(rows // (16 * a1), a1, 2, 8, columns // 2, 2)
    return parts.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns).contiguous()


def _straighten(words_OW: Tensor, word: torch.dtype) -> Tensor:
    """Inverse of `_interleave`."""
    rows, columns = words_OW.shape
    a1 = 2 if word == torch.int16 else 1
    parts = words_OW.view(columns // 2, rows // (16 * a1), 8, a1, 2, 2)
    return parts.permute(1, 3, 5, 2, 0, 4).reshape(rows, columns)


def fits_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether torch's 2:4 kernels take a weight (O, I) of this shape."""
    return dtype in TILES and all(size > 0 and size % tile == 0 for size, tile in zip(shape, TILES[dtype], strict=True))


def semi_structured_problem(device: str | torch.device = "cuda") -> str | None:
    """Why a device cannot run 2:4 products in torch; None if it can. Says nothing of speed: see `time_2of4`."""
    found = torch.device(device)
    if not hasattr(torch.sparse, "to_sparse_semi_structured"):
        return f"torch {torch.__version__} has no to_sparse_semi_structured; install torch >= 2.8."
    if found.type != "cuda":
        return f"{found} is no NVIDIA GPU; only those have 2:4 products in torch, elsewhere the zeros are multiplied."
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU; elsewhere the zeros of 2:4 are multiplied."
    if torch.version.hip is not None:
        return "torch is built for ROCm, whose 2:4 products this package has not been tried with."
    capability = torch.cuda.get_device_capability(found)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(found)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 2:4 products need 8.0 (Ampere)."
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Dense against 2:4 product of one weight shape (O, I) and batch (rows of the input); medians."""

    shape: tuple[int, int]
    batch: int
    dense_seconds: float
    sparse_seconds: float

    @property
    def ratio(self) -> float:
        """Above 1: the 2:4 product is faster."""
        return self.dense_seconds / self.sparse_seconds


@torch.no_grad()
def time_2of4(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    *,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device = "cuda",
    repeats: int = 50,
) -> list[Timing]:
    """Measures whether 2:4 pays here: dense and sparse product of random weights, taking turns, for every pair.

    Batch 1 and other small ones usually lose (PyTorch issue 111339), so measure the batches you will serve.

    Raises: ConfigError: if the device cannot run 2:4 (`semi_structured_problem`) or the kernels not take a shape.
    """
    problem = semi_structured_problem(device)
    if problem is not None:
        raise ConfigError(f"2:4 products cannot be timed: {problem}")
    wrong = [shape for shape in shapes if not fits_kernel(shape, dtype)]
    if wrong:
        raise ConfigError(f"2:4 shapes {wrong}: the kernels of {dtype} take multiples of {TILES.get(dtype)}.")
    rows = []
    for shape in shapes:
        dense = torch.randn(shape, dtype=dtype, device=device)
        dense.view(-1, 4)[:, 2:] = 0
        sparse = torch.sparse.to_sparse_semi_structured(dense)
        for batch in batches:
            inputs = torch.randn(batch, shape[1], dtype=dtype, device=device)
            calls = [partial(F.linear, inputs, weight) for weight in (dense, sparse)]
            seconds = median_seconds(calls, repeats, partial(torch.cuda.synchronize, device))
            rows.append(Timing(shape=shape, batch=batch, dense_seconds=seconds[0], sparse_seconds=seconds[1]))
    return rows


def median_seconds(
    calls: Sequence[Callable[[], object]], repeats: int, synchronize: Callable[[], object] = lambda: None
) -> list[float]:
    """Median time of every call, taking turns, after three rounds that are not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_number in range(repeats + 3):
        for number, call in enumerate(calls):
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            if round_number >= 3:
                seconds[number].append(time.perf_counter() - begin)
    return [statistics.median(times) for times in seconds]


@torch.no_grad()
def to_semi_structured_(model: nn.Module, names: Sequence[str]) -> None:
    """Swaps the named linears' 2:4 weights for torch's semi-structured tensors, so that the GPU skips their zeros.

    Inference only, and only on NVIDIA GPUs from Ampere on. Nothing is changed if one linear does not fit.

    Args:
        names: e.g. of `ElasticCheckpoint.linears`.
    Raises: ConfigError: the device cannot run 2:4. UnsupportedModelError: a name is no `nn.Linear`. ShapeError: listing
        every linear of another dtype or shape than the kernels', or that is not 2:4.
    """
    linears = {}
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise UnsupportedModelError(f"{name}: no such linear in the model.") from None
        if is_transposed(linear) or not isinstance(linear, nn.Linear):
            raise UnsupportedModelError(
                f"{name}: found {type(linear).__name__}, expected nn.Linear; GPT-2's transposed weights stay dense."
            )
        linears[name] = linear
    for device in {linear.weight.device for linear in linears.values()}:
        problem = semi_structured_problem(device)
        if problem is not None:
            raise ConfigError(f"to_semi_structured_: {problem}")
    check_2of4({name: linear.weight for name, linear in linears.items()})
    for linear in linears.values():
        sparse = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
        linear.weight = nn.Parameter(sparse, requires_grad=False)


def check_2of4(weights: dict[str, Tensor]) -> None:
    """Raises: ShapeError: listing every weight (O, I) that the kernels cannot take, or that is not 2:4."""
    wrong = []
    for name, weight in weights.items():
        if not fits_kernel(tuple(weight.shape), weight.dtype):
            wrong.append(f"{name} is {tuple(weight.shape)} {weight.dtype}")
        elif ((weight.detach().reshape(-1, 4) != 0).sum(dim=1) > 2).any():
            wrong.append(f"{name} keeps more than 2 of 4")
    if wrong:
        raise ShapeError(
            f"{len(wrong)} linears do not fit 2:4 products: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}; "
            "expected float16 or bfloat16 in multiples of (32, 64), at most 2 of 4 neighbours not zero."
        )
