"""DSnoT (arXiv 2310.08915): moves kept weights, without training, until a row's mean output is the dense one's.

By the paper's criteria; its code has no licence, nothing of it was copied. torch only. Two departures: a row stops at
the first move that does not bring its error closer to zero (the paper goes on up to a fixed number of moves), and all
linears are moved (the public code leaves the feed-forward ones by default).
"""

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError

TOLERANCE = 0.1 / 2048  # the paper's 0.1, which its public code counts over the 2,048 tokens of a sample


def moved_mask(
    weight_OI: Tensor,
    mask_OI: Tensor,
    mean_I: Tensor,
    variance_I: Tensor,
    norm_I: Tensor,
    *,
    pattern: tuple[int, int] | None = None,
    moves: int = 50,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """A mask with as many kept weights a row (and a group of M), nearer to the dense mean output.

    Each move of a row grows the pruned weight that lowers its expected error sum(pruned weight * mean) most for its
    input's variance (eq. 4), and prunes the kept weight of least |weight| norm among those that lower it too (eq. 5).
    A weight moves once at most.

    Args:
        mask_OI: bool, the start; not modified.
        mean_I, variance_I, norm_I: of every input channel over the calibration tokens.
        pattern: (N, M): what is pruned lies in the group of M of what is grown; its sign is then free, as the group
            seldom has one of the wanted sign.
        moves: at most, a row.
        tolerance: rows whose expected error is smaller stay.
    Returns: (O, I) bool.
    Raises: ShapeError.
    """
    _check(weight_OI, mask_OI, mean_I, variance_I, norm_I, pattern)
    weight, mask = weight_OI.float(), mask_OI.clone()
    share = weight * mean_I.float()  # what a weight adds to the mean output
    gain = share / variance_I.float().clamp_min(torch.finfo(torch.float32).tiny)
    cost = weight.abs() * norm_I.float()
    fixed = torch.zeros_like(mask)  # moved once already
    row = torch.arange(weight.shape[0], device=weight.device)
    error = (share * ~mask).double().sum(dim=1)
    active = error.abs() > tolerance
    for _ in range(moves):
        if not active.any():
            break
        sign = error.sign().float()[:, None]
        grown, growable = _best(gain * sign, ~mask & ~fixed & (share * sign > 0))
        allowed = mask & ~fixed & (share * sign < 0 if pattern is None else _group_of(grown, mask, pattern[1]))
        pruned, prunable = _best(-cost, allowed)
        after = error - share[row, grown].double() + share[row, pruned].double()
        active &= growable & prunable & (after.abs() < error.abs())
        rows = row[active]
        mask[rows, grown[active]], mask[rows, pruned[active]] = True, False
        fixed[rows, grown[active]] = fixed[rows, pruned[active]] = True
        error = torch.where(active, after, error)
        active &= error.abs() > tolerance
    return mask


def _best(score_OI: Tensor, allowed_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(O,) index of the highest allowed score, and whether there is one."""
    return score_OI.masked_fill(~allowed_OI, float("-inf")).argmax(dim=1), allowed_OI.any(dim=1)


def _group_of(index_O: Tensor, mask_OI: Tensor, size: int) -> Tensor:
    """(O, I) bool: the group of `size` neighbours around an index of every row."""
    groups_I = torch.arange(mask_OI.shape[1], device=mask_OI.device) // size
    return groups_I == (index_O // size)[:, None]


def _check(
    weight: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, pattern: tuple[int, int] | None
) -> None:
    width = weight.shape[-1]
    shapes = [tuple(x.shape) for x in (mean, variance, norm)]
    if weight.ndim != 2 or mask.shape != weight.shape or any(shape != (width,) for shape in shapes):
        raise ShapeError(f"mask moves: weight {tuple(weight.shape)}, mask {tuple(mask.shape)}, statistics {shapes}.")
    if pattern is not None and width % pattern[1]:
        raise ShapeError(f"mask moves: input width {width} is no multiple of {pattern[1]}.")
