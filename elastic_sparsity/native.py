"""The compiled library (kernels/) through ctypes: which instruction paths run here, and its functions on tensors.

The library has a C interface, so it needs neither Python's nor torch's headers. Its threads are torch's: it gets the
entry point of the OpenMP runtime that torch loaded. Where it was not built, `kernels()` is None and callers use torch's
code.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from elastic_sparsity.errors import ConfigError, ShapeError
from elastic_sparsity.packed_weight import SLACK, PackedWeight

VARIABLE = "ELASTIC_SPARSITY_KERNELS"  # names the path to use, for tests and for comparing; default: the best
KNOWN_PATHS = {
    "avx512": "needs an x86 CPU with AVX-512 VBMI2 and BF16 (Zen 4, Sapphire Rapids or later)",
    "avx2": "needs an x86 CPU with AVX2, FMA and POPCNT",
    "neon": "needs a 64-bit Arm CPU",
    "portable": "",
}
TORCH = "torch"
_NAME = "_kernels.so"
_VERSION = 2  # of es_version() in kernels/api.cpp
_REINSTALL = "pip install --force-reinstall --no-cache-dir --no-deps elastic-sparsity"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CODES = {"p": _POINTER, "i": _INT32, "l": _INT64, "I": ctypes.c_uint32, "d": ctypes.c_double}
_SIGNATURES = {  # name: arguments, result
    "es_version": ("", _INT32),
    "es_path_count": ("", _INT32),
    "es_path_name": ("i", ctypes.c_char_p),
    "es_path_usable": ("i", _INT32),
    "es_product": ("ipiillppppl" + "pp", None),
    "es_expand_rows": ("ipiilllppppp", None),
    "es_place_core": ("iplipl" + "pp", _INT64),
    "es_place_bitmap": ("plipl" + "ppp", _INT64),
    "es_place_positions": ("plliippp", _INT64),
    "es_count_bits": ("pl", _INT64),
    "es_wrong_rows": ("plll", _INT64),
    "es_wrong_groups": ("plii", _INT64),
    "es_all_finite": ("pliI", _INT32),
    "es_finish": ("iplpip", _INT32),
    "es_pack_rows": ("pllpippp", _INT64),
    "es_kl": ("ipiillpppp", None),
    "es_causal_softmax": ("ipiilllp", None),
    "es_rms_norm": ("ipillppdpp", None),
    "es_rms_norm_backward": ("ipillppppp", None),
    "es_rotary": ("ipiillllplllpplpllli", None),
}


@dataclass(frozen=True, slots=True)
class InstructionPath:
    """One way of running the kernels; `problem` says why it cannot run here, None if it can."""

    name: str
    problem: str | None


def instruction_paths() -> tuple[InstructionPath, ...]:
    """Every path the package knows, best first, "torch" (no compiled code) last."""
    library = None if library_problem() else _library()
    if library is None:
        missing = library_problem() or f"the compiled library is not there ({_why_missing()})"
        found = [InstructionPath(name, missing) for name in KNOWN_PATHS]
    else:
        usable = _usable(library)
        found = [
            InstructionPath(name, None if usable.get(name) else f"{why or 'not in this build'}")
            for name, why in KNOWN_PATHS.items()
        ]
    return (*found, InstructionPath(TORCH, None))


def active_path() -> str | None:
    """The path in use: the best one here, or the one that ELASTIC_SPARSITY_KERNELS names; "torch": nothing compiled.

    None if what is compiled is of no use and "torch" was not asked for: then the packed runtime refuses.

    Raises: ConfigError: ELASTIC_SPARSITY_KERNELS names a path that cannot run here.
    """
    if library_problem() is not None and os.environ.get(VARIABLE, "auto") != TORCH:
        return None
    found = kernels()
    return TORCH if found is None else found.name


def kernels() -> "Kernels | None":
    """The functions of the path in use; None for "torch".

    Raises: ConfigError: ELASTIC_SPARSITY_KERNELS names a path that cannot run here.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == TORCH:
        return None
    library = _library()
    names = [] if library is None else [name for name, usable in _usable(library).items() if usable]
    if wanted == "auto":
        return kernels_of(names[0]) if names else None
    if wanted not in names:
        raise ConfigError(f"{VARIABLE}: {wanted!r} cannot run here; it may be auto, {', '.join([*names, TORCH])}.")
    return kernels_of(wanted)


@cache
def kernels_of(name: str) -> "Kernels":
    """The functions of one path, which must be usable."""
    library = _library()
    assert library is not None
    return Kernels(library, name, list(_usable(library)).index(name))


@cache
def _library() -> ctypes.CDLL | None:
    path = library_file()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_CODES[code] for code in arguments], result
        version: object = library.es_version()
    except (OSError, AttributeError) as error:
        version = error
    if version != _VERSION:
        raise ConfigError(
            f"{path}: found a library of another build or machine ({version}), expected version {_VERSION}; "
            f"reinstall the package ({_REINSTALL}), or set {VARIABLE}={TORCH}."
        )
    return library


@cache
def library_problem() -> str | None:
    """Why the compiled library that lies here is of no use (another build, damaged); None also if there is none."""
    try:
        _library()
    except ConfigError as error:
        return str(error)
    return None


def library_file() -> Path | None:
    """Where the compiled library is, None if it was not built, or cannot serve this machine."""
    if sys.byteorder != "little":
        return None
    import elastic_sparsity  # its folders: an editable install has the library in another than the sources

    files = [Path(folder) / _NAME for folder in elastic_sparsity.__path__]
    with suppress(PackageNotFoundError):  # sources that lie before an installed package, as in a checkout's tests
        files.append(Path(str(distribution("elastic-sparsity").locate_file(f"elastic_sparsity/{_NAME}"))))
    return next((file for file in files if file.is_file()), None)


def _why_missing() -> str:
    if sys.byteorder != "little":
        return "a big-endian machine"
    return f"installed without a supported C++ compiler; install g++ or clang, then {_REINSTALL}"


@cache
def _usable(library: ctypes.CDLL) -> Mapping[str, bool]:
    """Paths of this build in the library's order, and whether the CPU has their instructions."""
    count = range(library.es_path_count())
    return {library.es_path_name(i).decode(): bool(library.es_path_usable(i)) for i in count}


@cache
def _fork() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch loaded; None where torch uses another: one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _POINTER).value
    except (AttributeError, OSError, TypeError):
        return None


def has_threads() -> bool:
    """Whether the kernels can use torch's threads."""
    return _fork() is not None


class Kernels:
    """The library's functions by one instruction path. All tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL, name: str, index: int) -> None:
        self._library, self.name, self._index, self._fork = library, name, index, _fork()

    def __deepcopy__(self, memo: object) -> "Kernels":
        return self  # models are copied, code is not

    def __reduce__(self) -> tuple[Callable[[], "Kernels | None"], tuple[()]]:
        return kernels, ()  # the best path of the machine it comes to

    def product(self, weight: PackedWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias; sums in float32, in another order than torch's.

        Args:
            x_TI, bias_O: of the values' dtype.
        Returns: (T, O) in that dtype.
        """
        rows, width = weight.shape
        y = torch.empty(x_TI.shape[0], rows, dtype=x_TI.dtype, device="cpu")
        bias = None if bias_O is None else _pointer(bias_O, x_TI.dtype)
        self._library.es_product(
            self._index, self._fork, torch.get_num_threads(), _DTYPES[weight.values.dtype], rows, width,
            weight.mask_OW.data_ptr(), weight.values.data_ptr(), weight.starts.data_ptr(),
            _pointer(x_TI, weight.values.dtype), x_TI.shape[0], bias, y.data_ptr(),
        )  # fmt: skip
        return y

    def unpack_rows_(self, weight: PackedWeight, begin: int, out_RI: Tensor) -> None:
        """Fills `out_RI` with rows from `begin` on, zeros included."""
        values = weight.values
        self._library.es_expand_rows(
            self._index, self._fork, torch.get_num_threads(), values.dtype.itemsize, begin, begin + out_RI.shape[0],
            weight.shape[1], weight.mask_OW.data_ptr(), values.data_ptr(), weight.starts.data_ptr(),
            values.data_ptr() + values.numel() * values.dtype.itemsize, _pointer(out_RI, values.dtype),
        )  # fmt: skip

    def place_core_(self, mask: Tensor, values: Tensor, covered: Tensor, out: Tensor) -> int:
        """Values of the first shell into `out`, zeros elsewhere; `covered` gets its bits.

        Args:
            mask: (ceil(n / 8),) uint8 bitmap.
            values: float32 or bfloat16.
            covered: (ceil(n / 64),) int64.
            out: (n,) float32.
        Returns: how many values were placed; all were there.
        Raises: ShapeError: padding bits are set, or there are more bits than values.
        """
        return _placed(
            self._library.es_place_core(
                self._index, _pointer(mask, torch.uint8), out.numel(), _DTYPES[values.dtype],
                _pointer(values, *_DTYPES), values.numel(), _pointer(covered, torch.int64),
                _pointer(out, torch.float32),
            ),
            values.numel(),
        )  # fmt: skip

    def place_bitmap_(self, mask: Tensor, values: Tensor, covered: Tensor, pattern: Tensor | None, out: Tensor) -> int:
        """Values of a later shell with a bitmap; with `pattern` (which gets the bits), only of bits not yet covered."""
        to_pattern = None if pattern is None else _pointer(pattern, torch.int64)
        return _placed(
            self._library.es_place_bitmap(
                _pointer(mask, torch.uint8), out.numel(), _DTYPES[values.dtype], _pointer(values, *_DTYPES),
                values.numel(), _pointer(covered, torch.int64), to_pattern, _pointer(out, torch.float32),
            ),
            values.numel(),
        )  # fmt: skip

    def place_positions_(self, positions: Tensor, low_bits: int, values: Tensor, covered: Tensor, out: Tensor) -> int:
        """Values of a shell with Elias-Fano positions (packing.pack_positions), `low_bits` planes of low parts."""
        return _placed(
            self._library.es_place_positions(
                _pointer(positions, torch.uint8), values.numel(), out.numel(), low_bits, _DTYPES[values.dtype],
                _pointer(values, *_DTYPES), _pointer(covered, torch.int64), _pointer(out, torch.float32),
            ),
            values.numel(),
        )  # fmt: skip

    def wrong_rows(self, bits: Tensor, rows: int, width: int, kept: int) -> int:
        """How many rows have another number of bits than `kept`."""
        return self._library.es_wrong_rows(_pointer(bits, torch.int64), rows, width, kept)

    def wrong_groups(self, bits: Tensor, count: int, kept: int, size: int) -> int:
        """How many groups of `size` neighbours (at most 64) have more bits than `kept`."""
        return self._library.es_wrong_groups(_pointer(bits, torch.int64), count, kept, size)

    def all_finite(self, tensor: Tensor, exponent: int) -> bool:
        """Whether no element has all bits of `exponent` set, as NaN and infinity have."""
        size = tensor.dtype.itemsize
        return bool(self._library.es_all_finite(_pointer(tensor, tensor.dtype), tensor.numel(), size, exponent))

    def finish_(self, merged: Tensor, bits: Tensor, out: Tensor) -> bool:
        """`merged` (n,) float32 rounded into `out` (float32 or bfloat16), +0 where bits are clear.

        Returns: False if a kept value is NaN or infinite in that dtype.
        """
        return bool(
            self._library.es_finish(
                self._index,
                _pointer(bits, torch.int64),
                out.numel(),
                _pointer(merged, torch.float32),
                _DTYPES[out.dtype],
                _pointer(out, *_DTYPES),
            )
        )

    def pack(self, merged_OI: Tensor, bits: Tensor, dtype: torch.dtype) -> PackedWeight | None:
        """`merged_OI` (float32) where bits are set, rounded and packed; None if one is NaN or infinite then."""
        rows, width = merged_OI.shape
        num_kept = self._library.es_count_bits(_pointer(bits, torch.int64), bits.numel())
        weight = PackedWeight(
            shape=(rows, width),
            mask_OW=torch.empty(rows, -(-width // 64), dtype=torch.int64, device="cpu"),
            values=torch.empty(num_kept + SLACK, dtype=dtype, device="cpu"),
            starts=torch.empty(rows + 1, dtype=torch.int64, device="cpu"),
        )
        placed = self._library.es_pack_rows(
            _pointer(bits, torch.int64), rows, width, _pointer(merged_OI, torch.float32), _DTYPES[dtype],
            weight.mask_OW.data_ptr(), weight.starts.data_ptr(), weight.values.data_ptr(),
        )  # fmt: skip
        assert placed in (num_kept, -1), (placed, num_kept)
        return weight if placed >= 0 else None

    def run(self, name: str, dtype: torch.dtype | None, *arguments: float | Tensor) -> None:
        """A function of training_api.cpp by torch's threads; `dtype` = None: it serves one only. For fused.py."""
        given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        codes = [] if dtype is None else [_DTYPES[dtype]]
        getattr(self._library, name)(self._index, self._fork, torch.get_num_threads(), *codes, *given)


def _pointer(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """Address of a tensor that compiled code may use: on the CPU, contiguous, of one of the dtypes."""
    assert tensor.dtype in dtypes and tensor.device.type == "cpu" and tensor.is_contiguous(), (tensor.dtype, dtypes)
    return tensor.data_ptr()


def _placed(result: int, available: int) -> int:
    """Raises: ShapeError: what a shell's bytes are not."""
    if result == -1:
        raise ShapeError("padding bits after the last one are set.")
    if result == -2:
        raise ShapeError(f"more positions than its {available} values.")
    if result == -3:
        raise ShapeError("packed positions: not increasing, or beyond the weight.")
    if result == -4:
        raise ShapeError(f"packed positions: not {available} of them.")
    return result
