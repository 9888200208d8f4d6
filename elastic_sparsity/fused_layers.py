"""A model's RMSNorm and rotary embedding by the compiled library while it trains, where they are the usual ones.

Both are found by name, and used only if they give what their formula gives on a small example: layers of the same name
with another formula (a weight counted from one, interleaved rotation) stay as they are.
Letters: B samples, H heads, T tokens, D width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.fused import fused_rms_norm, fused_rotary

_ROTARY = "apply_rotary_pos_emb"  # transformers' name, in every model's own module


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Inside, a frozen model's norms and rotary embedding take one pass each.

    Norms by their classes: of a model that is read block by block, the blocks come later.
    """
    home = sys.modules.get(type(model).__module__)
    rotary: Any = getattr(home, _ROTARY, None)
    with ExitStack() as undo:
        for kind in _usual_norms(model):
            _replace(undo, kind, "forward", _norm(kind.forward))
        if _is_usual_rotary(rotary):
            _replace(undo, home, _ROTARY, partial(_rotate, rotary))
        yield


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    own = vars(owner).get(name)  # of a class's forward: None, if it is inherited
    undo.callback(delattr, owner, name) if own is None else undo.callback(setattr, owner, name, own)
    setattr(owner, name, value)


def _norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        fits = len(args) == 1 and not kwargs and args[0].shape[-1:] == module.weight.shape
        found = fused_rms_norm(args[0], module.weight, module.variance_epsilon) if fits else None
        return original(module, *args, **kwargs) if found is None else found

    return forward


def _usual_norms(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of norms of which all that have their weights here, and at least one, are the usual ones."""
    found: dict[type[nn.Module], list[bool]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            found.setdefault(type(module), []).append(_is_usual_norm(module))
    return [kind for kind, usual in found.items() if all(usual)]


@torch.no_grad()
def _is_usual_norm(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float) or weight is None:
        return False
    if weight.device.type != "cpu" or weight.ndim != 1 or weight.dtype != torch.float32:
        return False
    x = torch.linspace(-1, 2, 2 * weight.numel()).view(2, -1)
    x[1] *= 1e-3  # where epsilon counts
    expected = x * weight / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    with suppress(Exception):  # another signature or result: another layer
        return torch.allclose(module.forward(x), expected, rtol=1e-5, atol=1e-6)
    return False


def _rotate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    plain = len(args) == 4 and not kwargs and all(isinstance(x, Tensor) for x in args)
    if not plain or [x.ndim for x in args] != [4, 4, 3, 3]:
        return original(*args, **kwargs)
    q, k, cos, sin = args
    fits = q.shape[0] == k.shape[0] and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0])
    fits = (
        fits
        and cos.shape[2] % 2 == 0
        and cos.shape[2] == q.shape[3] == k.shape[3]
        and cos.shape[1] == q.shape[2] == k.shape[2]
    )
    if fits and torch.is_autocast_enabled(q.device.type):  # else float32 angles make a float32 result
        rotated = fused_rotary(q, cos, sin), fused_rotary(k, cos, sin)
        if rotated[0] is not None and rotated[1] is not None:
            return rotated
    return original(*args, **kwargs)


def _is_usual_rotary(rotary: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=random) for shape in ((2, 3, 4, 8), (2, 1, 4, 8), *[(1, 4, 8)] * 2))
    with suppress(Exception):  # there is none, or with another signature or result: another rotation
        found = rotary(q, k, cos, sin)
        return all(torch.allclose(y, _by_formula(x, cos, sin), atol=1e-6) for x, y in zip((q, k), found, strict=True))
    return False


def _by_formula(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_BTD[:, None] + torch.cat([-second, first], dim=-1) * sin_BTD[:, None]
