"""A model's RMSNorm and rotary embedding by the compiled library while it trains, where they are the usual ones.

Both are found by name, and used only if they give what their formula gives on a small example: layers of the same name
with another formula (a weight counted from one, interleaved rotation) stay as they are.
Letters: B samples, H heads, T tokens, D width.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.fused import fused_rms_norm, fused_rotary

_ROTARY = "apply_rotary_pos_emb"  # transformers' name, in every model's own module


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Inside, a frozen model's norms and rotary embedding take one pass each."""
    norms = [module for module in model.modules() if _is_usual_norm(module)]
    for norm in norms:
        norm.forward = partial(_norm, norm, norm.forward)
    home = sys.modules[type(model).__module__]
    rotary: Any = getattr(home, _ROTARY, None)
    is_usual = _is_usual_rotary(rotary)
    if is_usual:
        setattr(home, _ROTARY, partial(_rotate, rotary))
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # the class's own again
        if is_usual:
            setattr(home, _ROTARY, rotary)


def _norm(module: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = fused_rms_norm(x, module.weight, module.variance_epsilon)
    return original(x) if found is None else found


@torch.no_grad()
def _is_usual_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon") or weight is None:
        return False
    if weight.device.type != "cpu" or weight.ndim != 1 or weight.dtype != torch.float32:
        return False
    x = torch.linspace(-1, 2, 2 * weight.numel()).view(2, -1)
    expected = x * weight / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return torch.allclose(module(x), expected, rtol=1e-5, atol=1e-6)


def _rotate(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    fits = not args and not kwargs and cos.ndim == 3 and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0])
    fits = fits and cos.shape[2] == q.shape[3] == k.shape[3] and cos.shape[1] == q.shape[2] == k.shape[2]
    if fits and torch.is_autocast_enabled(q.device.type):  # else float32 angles make a float32 result
        rotated = fused_rotary(q, cos, sin), fused_rotary(k, cos, sin)
        if rotated[0] is not None and rotated[1] is not None:
            return rotated
    return original(q, k, cos, sin, *args, **kwargs)


def _is_usual_rotary(rotary: Any) -> bool:
    if rotary is None or list(inspect.signature(rotary).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=random) for shape in ((2, 3, 4, 8), (2, 1, 4, 8), *[(1, 4, 8)] * 2))
    found = rotary(q, k, cos, sin)
    return all(torch.allclose(y, _by_formula(x, cos, sin), atol=1e-6) for x, y in zip((q, k), found, strict=True))


def _by_formula(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_BTD[:, None] + torch.cat([-second, first], dim=-1) * sin_BTD[:, None]
