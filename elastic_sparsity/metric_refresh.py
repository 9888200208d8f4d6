"""Importance after a linear's inputs were changed, from statistics measured before: no pass over the text. torch only.

Source: arXiv 2602.21652, eq. 9 to 11: with X' = D X, diag(X' X'^T) = s^2 diag(X X^T), so that Wanda's norms cost one
product a channel. What we changed: shifts (eq. 10 leaves them out), and any matrix between values and output, from the
whole X X^T. Eq. 3 of the paper divides the input by s, its eq. 10 multiplies; here a factor is what X is multiplied by.

Exact where the inputs really become D (X - shift) or A X: behind every exact fold, for everything before the mask.
Where something upstream changes the function (masks, factors of q and k that RoPE does not pass), X' = D (X + E), and a
channel's norm is off by at most `relative_bound`.
"""

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError


def scaled_square_sum(
    square_sum_I: Tensor,
    factors_I: Tensor,
    *,
    shift_I: Tensor | None = None,
    sum_I: Tensor | None = None,
    num_tokens: int = 0,
) -> Tensor:
    """Sums of squares of s (x - shift): s^2 (sum x^2 - 2 shift sum x + tokens shift^2) (eq. 10, with eq. 3's shift).

    Args:
        square_sum_I: of x over the calibration tokens.
        factors_I: s, of either sign.
        shift_I: needs `sum_I`, the sums of x, and `num_tokens`, best all float64: the three terms cancel where the
            shift is near the mean.
    Returns: (I,) in the widest of the dtypes given.
    Raises: ShapeError.
    """
    _check_widths(square_sum_I, factors_I, shift_I, sum_I)
    total_I = square_sum_I
    if shift_I is not None:
        if sum_I is None or num_tokens < 1:
            raise ShapeError(
                "shift: found no sums of the inputs; expected sum_I and num_tokens (InputStatistics means)."
            )
        total_I = (square_sum_I - 2 * shift_I * sum_I + num_tokens * shift_I.square()).clamp_min(0)
    return total_I * factors_I.square()


def mixed_square_sum(gram_II: Tensor, matrix_JI: Tensor) -> Tensor:
    """Sums of squares of A x: diag(A (sum x x^T) A^T).

    Args:
        gram_II: sum of x x^T over the calibration tokens.
        matrix_JI: A, one for all, or one a head: (..., J, I) against (..., I, I).
    Returns: (..., J) in the wider of both dtypes, not below zero.
    Raises: ShapeError.
    """
    if gram_II.shape[-1] != matrix_JI.shape[-1] or gram_II.shape[-1] != gram_II.shape[-2]:
        raise ShapeError(
            f"gram {tuple(gram_II.shape)} against matrix {tuple(matrix_JI.shape)}: expected A of its width."
        )
    dtype = torch.promote_types(gram_II.dtype, matrix_JI.dtype)
    matrix_JI = matrix_JI.to(dtype)
    return ((matrix_JI @ gram_II.to(dtype)) * matrix_JI).sum(-1).clamp_min(0)


def refreshed_scores(weight_OI: Tensor, norm_I: Tensor, factors_I: Tensor) -> Tensor:
    """Wanda's scores of an unchanged weight for inputs times s: |W| (norm |s|) (eq. 11).

    If the weight took 1 / s in exchange, as an exact fold makes it, the scores stay what they were.

    Args:
        norm_I: L2 norms of the inputs before.
    Returns: (O, I) float32.
    Raises: ShapeError.
    """
    _check_widths(norm_I, factors_I)
    if weight_OI.shape[1:] != norm_I.shape:
        raise ShapeError(f"scores: weight {tuple(weight_OI.shape)} against norms {tuple(norm_I.shape)}.")
    return weight_OI.float().abs().mul_((norm_I * factors_I.abs()).float())


def relative_bound(change_square_sum_I: Tensor, square_sum_I: Tensor) -> Tensor:
    """How far a refreshed norm or score of a channel can be off, relative to it, if the inputs became s (x + e).

    By the triangle inequality | |s (x + e)| - |s x| | <= |s e|, whatever s is.

    Args:
        change_square_sum_I: of e over the calibration tokens.
        square_sum_I: of x.
    Returns: (I,) sqrt(sum e^2 / sum x^2); infinite where x never was active and e is.
    Raises: ShapeError.
    """
    _check_widths(square_sum_I, change_square_sum_I)
    return torch.where(change_square_sum_I == 0, 0.0, (change_square_sum_I / square_sum_I).sqrt())


def _check_widths(first_I: Tensor, *others: Tensor | None) -> None:
    shapes = {tuple(x.shape) for x in (first_I, *others) if x is not None}
    if len(shapes) > 1 or first_I.ndim != 1:
        raise ShapeError(f"statistics: found shapes {sorted(shapes)}; expected one number for every input channel.")
