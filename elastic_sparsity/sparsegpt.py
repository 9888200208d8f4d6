"""SparseGPT (arXiv 2301.00774): prune one weight matrix with exact block-wise OBS error propagation. torch only.

Follows the paper's algorithm 1: columns are processed left to right; the error of every pruned column is carried to
the columns not yet processed by the rows of the Cholesky factor of the inverse Hessian. As in the public
implementation the unstructured mask is chosen in blocks of 128 columns, over all rows of a block together.
"""

import torch
from torch import Tensor

from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.importance import inverse_hessian


def _block_mask(weight_OB: Tensor, divisor_B: Tensor, sparsity: float) -> Tensor:
    """True = keep; the lowest-saliency share of the whole block goes."""
    saliency = weight_OB.square() / divisor_B.square()
    drop = int(saliency.numel() * sparsity)
    if not drop:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold = saliency.flatten().sort().values[drop - 1]
    return saliency > threshold


def sparsegpt(
    weight_OI: Tensor,
    gram_II: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    keep_OI: Tensor | None = None,
    where: str = "weight",
) -> Tensor:
    """The pruned and compensated weight.

    Args:
        weight_OI: any float dtype; not modified.
        gram_II: sum of x xT over calibration tokens, float32.
        sparsity: fraction of zeros, used when `pattern` is None; exact per block up to ties, not per row.
        pattern: (N, M) keeps N of every M along the input dimension.
        keep_OI: bool mask, chosen before; then neither sparsity nor pattern chooses. None = chosen on the way, as the
            paper does, from weights that carry the errors of the columns before.
    Returns: (O, I) float32.
    Raises: NumericsError: if the Hessian does not factor. ShapeError: if the mask does not fit. Both name `where`.
    """
    weight = weight_OI.float().clone()
    weight[:, gram_II.diagonal() == 0] = 0.0
    inverse = inverse_hessian(gram_II, damping, where)
    factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(info):
        raise NumericsError(f"{where}: the inverse Hessian does not factor with damping {damping}; raise it.")
    width = weight.shape[1]
    divisor_I = factor.diagonal().clone()  # saliency is (weight / divisor)^2
    if keep_OI is not None and keep_OI.shape != weight.shape:
        raise ShapeError(f"{where}: {tuple(weight.shape)} against a mask of {tuple(keep_OI.shape)}.")
    if pattern is not None:  # a group of M must not straddle two blocks
        block_size -= block_size % pattern[1]
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        local = factor[start:end, start:end]
        block = weight[:, start:end].clone()
        errors = torch.zeros_like(block)
        keep = torch.zeros_like(block, dtype=torch.bool) if keep_OI is None else keep_OI[:, start:end]
        if keep_OI is None and pattern is None:
            keep = _block_mask(block, divisor_I[start:end], sparsity)
        for j in range(end - start):
            if keep_OI is None and pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                saliency = block[:, group].square() / divisor_I[start:end][group].square()
                best = saliency.argsort(dim=1, descending=True, stable=True)[:, : pattern[0]]
                keep[:, group] = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, best, True)
            column = block[:, j]
            pruned = torch.where(keep[:, j], column, 0.0)
            error = (column - pruned) / local[j, j]
            block[:, j] = pruned
            block[:, j + 1 :] -= torch.outer(error, local[j, j + 1 :])
            errors[:, j] = error
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight
