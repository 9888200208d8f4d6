"""In which dtype matrices are multiplied. Masters, statistics and losses are float32 everywhere."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """As DTYPES names it, and of any other dtype torch's own name."""
    return str(dtype).removeprefix("torch.")


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bfloat16(device_type: str) -> bool:
    """True if the device has native bfloat16 products (emulated ones are slower than float32)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16", "bf16"))


def resolve_precision(precision: str, device_type: str) -> str:
    """ "float32" or "bfloat16" for a recipe's "auto"."""
    if precision != "auto":
        return precision
    return "bfloat16" if multiplies_bfloat16(device_type) else "float32"


def computing_dtype(stored: torch.dtype, precision: str, device_type: str) -> torch.dtype:
    """The dtype of a model's weights while it is trained or measured, of a resolved precision.

    float32 for float32 products, else as stored. But float16 becomes float32 on a CPU, whose norms refuse it where
    products in bfloat16 have made the hidden states float32.
    """
    if precision == "float32" or (stored == torch.float16 and device_type == "cpu"):
        return torch.float32
    return stored


def to_computing_dtype_(model: Any, precision: str) -> None:
    """Casts a model to `computing_dtype`, which loses nothing."""
    if computing_dtype(model.dtype, precision, model.device.type) != model.dtype:
        model.float()


def autocast_factory(precision: str, device_type: str) -> Callable[[], Any]:
    """A function that makes the autocast context of a resolved precision."""
    return partial(torch.autocast, device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def weights_in(linears: Iterable[nn.Module], precision: str) -> Iterator[None]:
    """Inside, the linears' weights are in `precision`: autocast alone would cast a frozen weight at every call.

    They are other parameters meanwhile, so that an embedding which shares one keeps its own.
    """
    kept = [(linear, linear.weight) for linear in linears]
    for linear, weight in kept:
        cast = weight.detach().to(DTYPES[precision])  # type: ignore[union-attr, operator]
        linear.weight = nn.Parameter(cast, requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in kept:
            linear.weight = weight


@contextmanager
def weights_under(autocast: Callable[[], Any], linears: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, weights are in the dtype that an autocast would cast each of them to at every call; else as they are."""
    linears = list(linears)
    device = next(linears[0].parameters()).device.type
    with autocast():
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    names = {value: name for name, value in DTYPES.items()}
    with weights_in(linears, names[dtype]) if enabled else nullcontext():
        yield


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model's floating parameters, in place; shared ones stay shared.

    Buffers keep their dtype, unlike by `.to`: rotary frequencies are float32 in a model of any dtype.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size, which move and compare several times faster."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
