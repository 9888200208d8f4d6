"""Elementwise parts of training in one pass each, by the compiled library: no temporaries, vectorised exponentials.

Each function says that it did not apply (None or False) for what the library does not serve: tensors on a GPU, other
dtypes, strides, a build without it or (with a warning) of another version. Callers then use torch's code, of which the
results here differ by float32 rounding only. They do not depend on the number of threads.
Letters: B samples, H heads, T tokens, D width, N = B * T, V vocabulary.
"""

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.native import TORCH, VARIABLE, Kernels, has_threads, kernels, library_problem

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)


def fused_kl_(student_NV: Tensor, teacher_NV: Tensor, grad_NV: Tensor) -> Tensor | None:
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
    # Not losses.sum(): of many rows its order is that of torch's threads.
    return torch.tensor(sum(losses.tolist()), dtype=torch.float64, device="cpu")


def fused_causal_softmax_(scores: Tensor) -> bool:
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


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        found = _serving(x, weight_D)
        assert found is not None
        y, rows, width = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
        factors = torch.empty(rows, device="cpu")
        found.run("es_rms_norm", None, rows, width, x, weight_D, eps, y, factors)
        ctx.save_for_backward(x, weight_D, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, factors = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        found = _serving(x, grad)
        assert found is not None
        out = torch.empty_like(x)
        found.run("es_rms_norm_backward", None, factors.numel(), x.shape[-1], x, weight_D, grad, factors, out)
        return out, None, None


def fused_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """x weight / sqrt(mean of x^2 over the last dimension + eps), differentiable in x.

    Args:
        x: (..., D) float32.
        weight_D: float32, without gradient.
    Raises: ShapeError: the widths differ.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ShapeError(f"RMSNorm: width {x.shape[-1]} and a weight of {tuple(weight_D.shape)}.")
    serves = x.dtype == torch.float32 and not weight_D.requires_grad and x.numel() and _serving(x, weight_D)
    y: Tensor | None = _RmsNorm.apply(x, weight_D, eps) if serves else None
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _rotated(x_BHTD, cos_BTD, sin_BTD, torch.empty(x_BHTD.shape, dtype=x_BHTD.dtype, device="cpu"), False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos_BTD, sin_BTD = ctx.saved_tensors
        grad = grad_outputs[0] if grad_outputs[0].stride(-1) == 1 else grad_outputs[0].contiguous()
        samples, heads, tokens, width = grad.shape
        # In memory as the linear before wrote it, whose gradient then needs no copy.
        out = torch.empty(samples, tokens, heads, width, dtype=grad.dtype, device="cpu").transpose(1, 2)
        return _rotated(grad, cos_BTD, sin_BTD, out, True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, transposed: bool) -> Tensor:
    found, angle_stride = _usable(), 0 if cos.shape[0] == 1 else cos.stride(0)
    assert found is not None
    found.run(
        "es_rotary", x.dtype, *x.shape, x.data_ptr(), *x.stride()[:3], cos, sin, angle_stride,
        out.data_ptr(), *out.stride()[:3], int(transposed),
    )  # fmt: skip
    return out


def fused_rotary(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor | None:
    """x cos + (-second half of x, first half of x) sin, differentiable in x; in float32, rounded once to x's dtype.

    Args:
        x_BHTD: float32 or bfloat16, D even; any strides but the last.
        cos_BTD, sin_BTD: (B or 1, T, D) float32, without gradient.
    Returns: (B, H, T, D) contiguous.
    Raises: ShapeError: the shapes do not fit.
    """
    samples, _, tokens, width = x_BHTD.shape
    if (
        cos_BTD.shape != sin_BTD.shape
        or tuple(cos_BTD.shape) not in [(n, tokens, width) for n in (1, samples)]
        or width % 2
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (x_BHTD, cos_BTD, sin_BTD))
        raise ShapeError(f"rotary: shapes do not fit: {shapes}.")
    plain = x_BHTD.dtype in _DTYPES and x_BHTD.stride(-1) == 1 and _plain(x_BHTD)
    learned = cos_BTD.requires_grad or sin_BTD.requires_grad
    angles = cos_BTD.dtype == torch.float32 and not learned and _serving(cos_BTD, sin_BTD)
    y: Tensor | None = _Rotary.apply(x_BHTD, cos_BTD, sin_BTD) if plain and angles and x_BHTD.numel() else None
    return y


def _serving(*tensors: Tensor) -> Kernels | None:
    """The library, if it serves these tensors and has the threads that torch would use."""
    dtype = tensors[0].dtype
    fits = dtype in _DTYPES and all(x.dtype == dtype and x.is_contiguous() and _plain(x) for x in tensors)
    return _usable() if fits and (has_threads() or torch.get_num_threads() == 1) else None


def _usable() -> Kernels | None:
    """The library. What lies there in another version is an error to the packed runtime, but only slower training."""
    if os.environ.get(VARIABLE) == TORCH:
        return None
    problem = library_problem()
    if problem is not None:
        _warn(problem)
        return None
    return kernels()


@cache  # once
def _warn(problem: str) -> None:
    log.warning("%s Until then training uses torch's slower code.", problem)


def _plain(tensor: Tensor) -> bool:
    """No subclass, which may have no memory of its own."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def _causal(scores: Tensor) -> tuple[int, int]:
    queries, keys = scores.shape[-2:]
    if keys < queries:
        raise ShapeError(f"softmax: {queries} queries, but only {keys} keys.")
    return queries, keys


def _same_shape(what: str, *tensors: Tensor) -> None:
    if len({x.shape for x in tensors}) > 1:
        raise ShapeError(f"{what}: shapes differ: {', '.join(str(tuple(x.shape)) for x in tensors)}.")
