"""Scores into nested masks and N:M masks. Tensors and numbers only; knows no model and no config.

Conventions: score higher = keep; mask True = keep; level 0 = densest. O = output rows, I = inputs of a linear.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elastic_sparsity.errors import NumericsError, ShapeError

SORTED_AT_ONCE = 1 << 22  # numbers

WHOLE_MATRIX = ("magnitude", "ria")  # compared within the matrix, as their public code does; the others within a row


def _checked(scores_OI: Tensor) -> Tensor:
    if scores_OI.ndim != 2:
        raise ShapeError(f"scores: expected a matrix (outputs, inputs), found shape {tuple(scores_OI.shape)}.")
    if torch.isnan(scores_OI).any():
        raise NumericsError("scores: found NaN; check the weights and the calibration statistics.")
    return scores_OI


def drop_levels(scores_OI: Tensor, keep_counts: Sequence[int]) -> Tensor:
    """For every weight the first level at which it is gone; `len(keep_counts)` if it is kept at all of them.

    One stable descending order a row decides all levels, so masks are nested by construction, counts are exact and
    ties are broken by index on every device.

    Args:
        scores_OI: float, no NaN.
        keep_counts: weights kept a row at each level; non-increasing, each in [1, I].
    Returns: (O, I) uint8.
    Raises: ShapeError, NumericsError.
    """
    width = _checked(scores_OI).shape[1]
    counts = list(keep_counts)
    if any(not 1 <= c <= width for c in counts) or counts != sorted(counts, reverse=True) or len(counts) > 254:
        raise ShapeError(f"keep_counts: {counts} must be non-increasing, within [1, {width}] and at most 254 long.")
    ranked_I = torch.zeros(width, dtype=torch.uint8, device=scores_OI.device)
    for count in counts:
        ranked_I[:count] += 1
    result_OI = torch.empty_like(scores_OI, dtype=torch.uint8)
    for scores, result in _row_slices(scores_OI, result_OI):
        order = scores.argsort(dim=1, descending=True, stable=True)
        result.scatter_(1, order, ranked_I.expand_as(order))
    return result_OI


def _row_slices(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of several matrices: an order takes 8 bytes a number, too much of a large matrix."""
    rows = max(1, SORTED_AT_ONCE // matrices[0].shape[1])
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def mask_at(drop_level_OI: Tensor, level: int) -> Tensor:
    """Boolean mask of one unstructured level."""
    kept = torch.empty_like(drop_level_OI, dtype=torch.uint8)  # comparing into bool itself takes 10 times as long
    return torch.gt(drop_level_OI, level, out=kept).view(torch.bool)


def matrix_mask(scores_OI: Tensor, sparsity: float) -> Tensor:
    """Keeps the highest scores of the whole matrix, however many that are in a row; ties are broken by index.

    Args:
        sparsity: fraction of zeros; int(number of weights * sparsity) weights go.
    Returns: (O, I) bool.
    """
    kept = matrix_count(_checked(scores_OI).numel(), sparsity)
    order = scores_OI.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores_OI.numel(), dtype=torch.bool, device=scores_OI.device)
    mask[order[:kept]] = True
    return mask.view(scores_OI.shape)


def matrix_count(size: int, sparsity: float) -> int:
    """How many of a matrix's weights `matrix_mask` keeps."""
    return size - int(size * sparsity)


def pattern_mask(scores_OI: Tensor, kept: int, group_size: int, within_OI: Tensor | None = None) -> Tensor:
    """N:M mask: the `kept` highest scores of every `group_size` neighbours along the input dimension.

    Args:
        scores_OI: float, no NaN.
        within_OI: bool; weights outside it are never kept, so a group may then keep fewer than `kept`.
    Returns: (O, I) bool.
    Raises: ShapeError: if the input width is no multiple of `group_size`.
    """
    rows, width = _checked(scores_OI).shape
    if width % group_size:
        raise ShapeError(
            f"pattern {kept}:{group_size}: input width {width} is no multiple of {group_size}; "
            f"leave this linear out or drop the pattern from the ladder."
        )
    result_OI = torch.zeros(rows, width, dtype=torch.bool, device=scores_OI.device)
    allowed_OI = torch.ones(1, 1, dtype=torch.bool).expand(rows, width) if within_OI is None else within_OI
    for scores, allowed, result in _row_slices(scores_OI, allowed_OI, result_OI):
        groups = scores.float().reshape(scores.shape[0], -1, group_size)
        if within_OI is not None:
            groups = groups.masked_fill(~allowed.reshape(groups.shape), float("-inf"))
        order = groups.argsort(dim=2, descending=True, stable=True)[..., :kept]
        result.view(groups.shape).scatter_(2, order, True)
        if within_OI is not None:
            result &= allowed
    return result_OI
