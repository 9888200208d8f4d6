"""Hierarchical LoRA on one linear, under nested masks (arXiv 2606.25285: W_k = (W + sum_{j<=k} B_j A_j) * M_k).

All groups of a linear live in one stacked pair A (R, I), B (O, R); a level activates a few row ranges of it. The mask
is applied to the sum of weight and update, in training exactly as in the merge, so a merged level keeps every zero.
(The EPTS code masks weight and update separately and differs from its own merge unless its scale is one.)
Letters: O outputs, I inputs, R stacked rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_sparsity.arch import is_transposed, weight_OI
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.ladder import Ladder, Level, rank_slices
from elastic_sparsity.masks import mask_at
from elastic_sparsity.precision import as_integers


def merge(
    weight_OI: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    mask_OI: Tensor,
    out_OI: Tensor | None = None,
) -> Tensor:
    """(weight + sum of B A over `pairs`) * mask, computed in float32: the one place where a level's weight is defined.

    Args:
        weight_OI: any float dtype.
        pairs: (A (r, I), B (O, r)) of the active groups, in group order.
        mask_OI: bool.
        out_OI: where to put the result, rounded once to its dtype; None = a new float32 tensor.
    Returns: (O, I) with exact zeros outside the mask.
    """
    merged = weight_OI.to(torch.float32, copy=True)
    if pairs:
        lora_A, lora_B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        merged.addmm_(lora_B.float(), lora_A.float())
    result = merged if out_OI is None else out_OI.copy_(merged)
    # As integers: exact +0 also for -0, NaN and infinity, at a tenth of where()'s time.
    as_integers(result).mul_(mask_OI.to(result.device))
    return result


class _MaskedLinear(torch.autograd.Function):
    """x W_kT with W_k = (weight + B A) * mask (bool); for the backward pass it keeps W_k in x's dtype and the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            effective = _effective_weight(weight, lora_A, lora_B, mask, x.dtype)
            ctx.save_for_backward(x, lora_A, lora_B, mask, effective)
            return F.linear(x, effective)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, mask, effective = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_x = grad_W = grad_A = grad_B = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad_output @ effective
            if any(ctx.needs_input_grad[1:4]):
                rows = grad_output.reshape(-1, grad_output.shape[-1])
                product = rows.T @ x.reshape(-1, x.shape[-1])
                grad_W, grad_A, grad_B = _weight_gradients(product, lora_A, lora_B, mask, ctx.needs_input_grad[1:4])
        return grad_x, grad_W, grad_A, grad_B, None


def _effective_weight(weight_OI: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`merge` for training: the same sum, rounded once to `dtype`, with the mask as bool."""
    merged = torch.addmm(weight_OI.float(), lora_B, lora_A) if lora_A.shape[0] else weight_OI
    effective = merged.to(dtype, copy=merged is weight_OI)
    as_integers(effective).mul_(mask)  # casting the mask to `dtype` would cost more than the product
    return effective


def _weight_gradients(
    grad_OI: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Float32 gradients of (weight, A, B) from the effective weight's `grad_OI`, which is overwritten.

    Products are in the precision of `grad_OI`, as all products of the backward pass.
    """
    as_integers(grad_OI).mul_(mask)
    return (
        grad_OI.float() if needed[0] else None,
        (lora_B.to(grad_OI.dtype).T @ grad_OI).float() if needed[1] else None,
        (grad_OI @ lora_A.to(grad_OI.dtype).T).float() if needed[2] else None,
    )


class ElasticLinear(nn.Module):
    """A linear that computes any level of the ladder, or its dense original.

    Args:
        linear: `nn.Linear` or GPT-2's `Conv1D`; its bias is kept as it is.
        ladder: levels and groups.
        ranks: adapter rank of each group; 0 = no adapters.
        inheritance: "shared" (a sparser level's loss also moves the adapters it inherits, as the EPTS code does),
            "detached" (only its own, as the paper's figure shows) or "none" (independent groups).
        drop_level_OI: uint8 from `masks.drop_levels`; None if the ladder has no unstructured level.
        pattern_masks: one bool (O, I) mask per N:M pattern of the ladder.
        train_base: keep a float32 master of the weight that training may move (every level inherits it).
        teacher_dtype: dtype of the dense original's copy.
        generator: seeds A; B starts at zero, so an untrained level is the masked base.
    """

    def __init__(
        self,
        linear: nn.Module,
        ladder: Ladder,
        ranks: Sequence[int],
        *,
        inheritance: str,
        drop_level_OI: Tensor | None,
        pattern_masks: Sequence[Tensor],
        train_base: bool,
        teacher_dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        dense = weight_OI(linear).detach()
        outputs, inputs = dense.shape
        if len(ranks) != ladder.num_groups or len(pattern_masks) != len(ladder.patterns):
            raise ShapeError(
                f"adapter: {len(ranks)} ranks and {len(pattern_masks)} pattern masks for a ladder of "
                f"{ladder.num_groups} groups and {len(ladder.patterns)} patterns."
            )
        self.ladder = ladder
        self.inheritance = inheritance
        self.transposed = is_transposed(linear)
        self.slices = rank_slices(ranks)
        self.level: Level | None = None
        self.held: list[Tensor] | None = None
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.dense = dense.to(teacher_dtype).contiguous() if train_base else dense
        self.weight = nn.Parameter(
            dense.to(torch.float32, copy=True).contiguous() if train_base else dense, requires_grad=train_base
        )
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform(a=sqrt 5), as peft initialises A
        start_A = torch.rand(sum(ranks), inputs, generator=generator) * (2 * bound) - bound
        self.lora_A = nn.Parameter(start_A.to(dense.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, sum(ranks), device=dense.device))
        self.drop_level = drop_level_OI
        self.pattern_masks = list(pattern_masks)

    def active_groups(self, level: Level) -> list[int]:
        return self.ladder.active_groups(level, self.inheritance)

    def mask(self, level: Level) -> Tensor:
        """(O, I) bool mask of a level."""
        if level.pattern is not None:
            return self.pattern_masks[level.index - self.ladder.num_unstructured]
        assert self.drop_level is not None
        return mask_at(self.drop_level, level.index)

    def group_pair(self, group: int) -> tuple[Tensor, Tensor]:
        """(A, B) of one group."""
        return self.lora_A[self.slices[group]], self.lora_B[:, self.slices[group]]

    def _active_pair(self, level: Level) -> tuple[Tensor, Tensor]:
        groups, pairs = self.active_groups(level), []
        if self.inheritance != "detached" and groups == list(range(groups[0], groups[-1] + 1)):
            # Neighbours in the stack, the usual case: a view, whose gradient is one tensor and not one a group.
            part = slice(self.slices[groups[0]].start, self.slices[groups[-1]].stop)
            return self.lora_A[part], self.lora_B[:, part]
        for group in groups:
            a, b = self.group_pair(group)
            frozen = self.inheritance == "detached" and group != level.group
            pairs.append((a.detach(), b.detach()) if frozen else (a, b))
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    def merged(self, level: Level) -> Tensor:
        """(O, I) float32 weight of a level, as `merge` defines it."""
        with torch.no_grad():
            return merge(self.weight, [self.group_pair(g) for g in self.active_groups(level)], self.mask(level))

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.level is None:
            return F.linear(x, self.dense.to(x.dtype), bias)
        a, b = self._active_pair(self.level)
        if self.held is not None:
            if not self.held:
                self.held.append(_effective_weight(self.weight, a, b, self.mask(self.level), x.dtype))
            return F.linear(x, self.held[0], bias)
        y: Tensor = _MaskedLinear.apply(x, self.weight, a, b, self.mask(self.level))
        return y if bias is None else y + bias


@contextmanager
def merged_once(linears: Sequence[ElasticLinear]) -> Iterator[None]:
    """Inside, every linear merges its level's weight at its first call only; neither level nor weights may change."""
    for linear in linears:
        linear.held = []
    try:
        with torch.no_grad():
            yield
    finally:
        for linear in linears:
            linear.held = None


def elastic_linears(module: nn.Module) -> Iterator[tuple[str, ElasticLinear]]:
    """(name, linear) of every elastic linear below `module`."""
    for name, child in module.named_modules():
        if isinstance(child, ElasticLinear):
            yield name, child


def set_level_(module: nn.Module, level: Level | None) -> None:
    """Makes every elastic linear below `module` compute `level`; None = the dense original."""
    for _, linear in elastic_linears(module):
        linear.level = level


def replace_module_(root: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where `path` is below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
