"""Elementwise parts of training in one pass each, by the compiled library: no temporaries, vectorised exponentials.

Each function says that it did not apply (None or False) for what the library does not serve: tensors on a GPU, other
dtypes, strides, a build without it. Callers then use torch's code, of which the results here differ by float32 rounding
only. They do not depend on the number of threads.
Letters: O outputs, I inputs, R rank, N tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.native import Kernels, has_threads, kernels

_DTYPES = (torch.float32, torch.bfloat16)


def kl_(student_NV: Tensor, teacher_NV: Tensor, grad_NV: Tensor) -> Tensor | None:
    """Sum of KL(teacher || student) over rows of logits; the gradient of the student's goes to `grad_NV`.

    Args:
        student_NV, teacher_NV, grad_NV: all float32 or all bfloat16; computed in float32.
    Returns: () float64, NaN or infinite where torch's formula is.
    Raises: ShapeError: the shapes differ.
    """
    _same_shape("KL", student_NV, teacher_NV, grad_NV)
    found = _serving(student_NV, teacher_NV, grad_NV)
    if found is None or student_NV.ndim != 2:
        return None
    rows, width = student_NV.shape
    losses = torch.empty(rows, dtype=torch.float64, device="cpu")
    found.run("es_kl", student_NV.dtype, rows, width, student_NV, teacher_NV, grad_NV, losses)
    return losses.sum()


def causal_softmax_(scores: Tensor) -> bool:
    """In place of (..., queries, keys): query i sees all keys but the last queries - 1 - i, the others get zeros.

    What they hold is not read: a NaN there is no NaN here.
    Raises: ShapeError: fewer keys than queries.
    """
    queries, keys = _causal(scores)
    found = _serving(scores)
    if found is None or not scores.numel():
        return False
    found.run("es_causal_softmax", scores.dtype, scores.numel() // (queries * keys), queries, keys - queries, scores)
    return True


def causal_softmax_backward_(grad: Tensor, shares: Tensor) -> bool:
    """Gradient of the scores in place of `grad`, that of `shares`, which `causal_softmax_` made.

    Raises: ShapeError: the shapes differ, or fewer keys than queries.
    """
    _same_shape("softmax", grad, shares)
    queries, keys = _causal(grad)
    found = _serving(grad, shares)
    if found is None or not grad.numel():
        return False
    count = grad.numel() // (queries * keys)
    found.run("es_causal_softmax_backward", grad.dtype, count, queries, keys - queries, grad, shares)
    return True


def merge(weight_OI: Tensor, lora_A: Tensor, lora_B: Tensor, mask_OI: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(weight + B A) * mask, summed in float32 and rounded once; +0 outside the mask whatever is there.

    Args:
        weight_OI, lora_A (R, I), lora_B (O, R): float32; columns of B may be part of a wider matrix.
        mask_OI: bool.
        dtype: float32 or bfloat16.
    Returns: a new (O, I) tensor.
    Raises: ShapeError: the shapes do not fit.
    """
    rank, wanted = lora_A.shape[0], (weight_OI.shape[0], lora_A.shape[0])
    if mask_OI.shape != weight_OI.shape or lora_A.shape[1:] != weight_OI.shape[1:] or lora_B.shape != wanted:
        shapes = [tuple(x.shape) for x in (weight_OI, lora_A, lora_B, mask_OI)]
        raise ShapeError(f"merge: shapes of weight, A, B and mask do not fit: {shapes}.")
    found = _serving(weight_OI, lora_A)
    rows_of_B = lora_B.stride(1) == 1 and _plain(lora_B)
    floats = {x.dtype for x in (weight_OI, lora_A, lora_B)} == {torch.float32}
    if found is None or not (floats and rows_of_B and _is_mask(mask_OI)) or dtype not in _DTYPES:
        return None
    out = torch.empty(weight_OI.shape, dtype=dtype, device="cpu")
    found.run(
        "es_merge", dtype, *weight_OI.shape, rank, weight_OI, lora_A, lora_B.data_ptr(), lora_B.stride(0), mask_OI, out
    )
    return out


def mask_gradient_(grad_OI: Tensor, mask_OI: Tensor) -> Tensor | None:
    """+0 outside the mask in `grad_OI` (bfloat16), and the same in a new float32 tensor.

    Raises: ShapeError: the shapes differ.
    """
    _same_shape("masked gradient", grad_OI, mask_OI)
    found = _serving(grad_OI)
    if found is None or grad_OI.dtype != torch.bfloat16 or not _is_mask(mask_OI):
        return None
    wide = torch.empty(grad_OI.shape, dtype=torch.float32, device="cpu")
    found.run("es_mask_gradient", None, grad_OI.numel(), mask_OI, grad_OI, wide)
    return wide


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: "torch.autograd.function.FunctionCtx", x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        found, y = _serving(x), torch.empty_like(x)
        assert found is not None
        found.run("es_silu", x.dtype, x.numel(), x, y)
        return y

    @staticmethod
    def backward(ctx: "torch.autograd.function.FunctionCtx", *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grad_outputs[0].to(x.dtype).contiguous()
        found, out = _serving(x, grad), torch.empty_like(x)
        if found is None:
            return torch.ops.aten.silu_backward(grad, x)
        found.run("es_silu_backward", x.dtype, x.numel(), x, grad, out)
        return out


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of x's dtype, differentiable once; torch's where the library does not serve x."""
    if _serving(x) is None:
        return nn.functional.silu(x)
    y: Tensor = _Silu.apply(x)
    return y


@contextmanager
def fused_silu(model: nn.Module) -> Iterator[None]:
    """Inside, the model's SiLU modules compute `silu`."""
    found = [m for m in model.modules() if isinstance(m, nn.SiLU) or type(m).__name__ == "SiLUActivation"]
    for module in found:
        module.forward = silu
    try:
        yield
    finally:
        for module in found:
            del module.forward  # the class's own again


def _serving(*tensors: Tensor) -> Kernels | None:
    """The library, if it serves these tensors and has the threads that torch would use."""
    dtype = tensors[0].dtype
    fits = dtype in _DTYPES and all(x.dtype == dtype and x.is_contiguous() and _plain(x) for x in tensors)
    return kernels() if fits and (has_threads() or torch.get_num_threads() == 1) else None


def _plain(tensor: Tensor) -> bool:
    """No subclass, which may have no memory of its own."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.is_contiguous() and _plain(mask)


def _causal(scores: Tensor) -> tuple[int, int]:
    queries, keys = scores.shape[-2:]
    if keys < queries:
        raise ShapeError(f"softmax: {queries} queries, but only {keys} keys.")
    return queries, keys


def _same_shape(what: str, *tensors: Tensor) -> None:
    if len({x.shape for x in tensors}) > 1:
        raise ShapeError(f"{what}: shapes differ: {', '.join(str(tuple(x.shape)) for x in tensors)}.")
