"""Hard masks in the forward pass, a relaxed top-k in the backward pass: how a mask's scores are learned. torch only.

Every row is cut in groups of which `kept` weights stay: a whole row for unstructured sparsity, M neighbours for N:M.
Letters: O output rows, I inputs, G groups of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Choice:
    """`kept` of every `group_size` neighbours of a row.

    Raises: ShapeError: from the functions below, if a width is no multiple of `group_size`.
    """

    kept: int
    group_size: int

    def groups(self, matrix_OI: Tensor) -> Tensor:
        """(O, G, group_size)."""
        rows, width = matrix_OI.shape
        if width % self.group_size or not 0 < self.kept <= self.group_size:
            raise ShapeError(f"keeping {self.kept} of {self.group_size}: does not divide rows of {width} inputs.")
        return matrix_OI.reshape(rows, -1, self.group_size)


def thresholds(scores_OI: Tensor, choice: Choice) -> Tensor:
    """Between the last score that is kept and the first that is not, (O, G, 1): their geometric mean.

    Args:
        scores_OI: non-negative.
    """
    groups = choice.groups(scores_OI)
    if choice.kept == choice.group_size:
        return torch.full_like(groups[..., :1], -1.0)
    if choice.group_size <= 64:
        ordered = groups.sort(dim=2, descending=True).values
        kept, dropped = ordered[..., choice.kept - 1, None], ordered[..., choice.kept, None]
    else:  # selecting takes a third of the time of sorting
        dropped = groups.kthvalue(choice.group_size - choice.kept, dim=2, keepdim=True).values
        kept = torch.where(groups > dropped, groups, torch.inf).amin(dim=2, keepdim=True)
        kept = torch.where(kept.isinf(), dropped, kept)  # ties: nothing is above the last one dropped
    return (kept * dropped).sqrt_()


def hard_mask(scores_OI: Tensor, thresholds_OG1: Tensor, choice: Choice) -> Tensor:
    """(O, I) bool: the scores above their group's threshold; where scores tie there, the first of them, as in `masks`.

    Ties are common: weights that were quantised to four bits have few values.
    """
    groups = choice.groups(scores_OI)
    mask = groups > thresholds_OG1
    wrong = mask.sum(dim=2) != choice.kept
    if wrong.any():
        order = groups[wrong].argsort(dim=1, descending=True, stable=True)[:, : choice.kept]
        mask[wrong] = torch.zeros_like(mask[wrong]).scatter_(1, order, True)
    return mask.reshape(scores_OI.shape)


def channel_gradient(
    saliency_OI: Tensor, scores_OI: Tensor, thresholds_OG1: Tensor, choice: Choice, temperature: float
) -> Tensor:
    """Gradient of a loss towards the logarithm of every input channel's scale, through a relaxed mask.

    The mask is relaxed to Phi((log score - log threshold) / temperature), Phi the normal distribution function, with
    each group's threshold moving so that its mask still sums to `kept`. A channel whose scale grows thus gains where
    its weights are near the threshold, and their neighbours lose.

    Args:
        saliency_OI: derivative of the loss towards the mask: the masked weight's gradient times the dense weight.
        scores_OI: non-negative, as `thresholds` saw them.
        temperature: of the relaxation, in units of the scores' logarithm.
    Returns: (I,) float32.
    """
    tiny = torch.finfo(torch.float32).tiny
    margins = (choice.groups(scores_OI) / thresholds_OG1.clamp_min(tiny)).clamp_min_(tiny).log_()
    nearness = margins.div_(temperature).square_().mul_(-0.5).exp_()  # Phi's derivative; its constant is put in below
    saliency = choice.groups(saliency_OI)
    total = nearness.sum(dim=2, keepdim=True).clamp_min_(tiny)
    mean = (saliency * nearness).sum(dim=2, keepdim=True) / total
    found = ((saliency - mean) * nearness).reshape(saliency_OI.shape).sum(dim=0)
    return found / (temperature * (2 * torch.pi) ** 0.5)


def straight_through(scores_OI: Tensor, choice: Choice, temperature: float) -> Tensor:
    """The hard mask as 0.0 and 1.0 whose gradient is that of the relaxed one; each group's threshold counts as fixed.

    Args:
        scores_OI: non-negative, with a graph behind them.
    Returns: (O, I) in the scores' dtype.
    """
    with torch.no_grad():
        found = thresholds(scores_OI, choice).clamp_min(torch.finfo(torch.float32).tiny)
        hard = hard_mask(scores_OI, found, choice).to(scores_OI.dtype)
    tiny = torch.finfo(scores_OI.dtype).tiny
    margins = (choice.groups(scores_OI) / found).clamp_min(tiny).log() / temperature
    soft = torch.special.ndtr(margins).reshape(scores_OI.shape)
    return hard + (soft - soft.detach())
