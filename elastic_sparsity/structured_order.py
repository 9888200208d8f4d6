"""In which order structured units (heads, MLP channels) go, and the best weights of those that stay. Tensors only.

Source: optimal brain surgeon for groups of inputs with the inverse Hessian downdated after every removal, as in ZipLM
(arXiv 2302.04089) and Tyr-the-Pruner (arXiv 2503.09657, section 3). What we changed: the units are ordered once, and
one Cholesky factor in that order gives the least-squares weights and the error of every prefix, so a supernet is an
order and not a copy of the weights a sparsity. Fluctuation scores: FLAP
(arXiv 2312.11983, its weighted variance of input features).
With H = L LT in the order and Z = L^-1 H WT = LT WT, the first k inputs alone do best with L_kk^-T Z[:k], and lose
sum_{j >= k} ||Z_j||^2.
Letters: I inputs, O outputs, U units, C inputs of a unit. All in float64: an inverse Hessian that is downdated a
thousand times in float32 loses its definiteness.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_sparsity.errors import NumericsError, ShapeError


def damped_hessian(
    gram_II: Tensor, damping: float, *, mean_I: Tensor | None = None, num_tokens: int = 0, where: str = "gram"
) -> Tensor:
    """(I, I) float64: sum x xT, plus damping times its mean diagonal; of x minus its mean if that is given.

    A linear with a bias can take any mean of its input into the bias, so that only the rest costs anything.

    Raises: NumericsError: if it holds no input at all, or NaN.
    """
    hessian_II = gram_II.to(torch.float64, copy=True)
    if mean_I is not None:
        hessian_II -= num_tokens * torch.outer(mean_I, mean_I).to(hessian_II)
    scale = float(hessian_II.diagonal().mean())
    if not 0 < scale < float("inf"):
        raise NumericsError(f"{where}: the mean square of its inputs is {scale}; no unit can be told from another.")
    hessian_II.diagonal().add_(damping * scale)
    return hessian_II


def _factor(matrix: Tensor, where: str) -> Tensor:
    """Lower Cholesky factors of a matrix, or of a batch of them."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any() or not torch.isfinite(factor).all():
        raise NumericsError(f"{where}: the input covariance does not factor; raise damping or use more text.")
    return factor


def obs_order(
    hessian_II: Tensor, weight_OI: Tensor, units_UC: Tensor, *, at_once: int = 1, where: str = "weight"
) -> Tensor:
    """Greedy order of the units: again and again those go whose removal, the rest refitted, costs least.

    The cost of unit u is tr(W_u^T [H^-1]_uu^-1 W_u), W and H^-1 being those of what is left (arXiv 2302.04089).

    Args:
        hessian_II: positive definite, from `damped_hessian`.
        units_UC: int64 inputs of every unit, each input in one unit.
        at_once: units that go before costs are computed again; the cheapest first, ties by index.
    Returns: (U,) int64, the unit that stays longest first. Every prefix is nested in the longer ones.
    Raises: ShapeError. NumericsError: if the Hessian does not factor, naming `where`.
    """
    width = weight_OI.shape[1]
    whole = torch.equal(units_UC.flatten().sort().values.cpu(), torch.arange(width))
    if hessian_II.shape != (width, width) or not whole:
        raise ShapeError(
            f"{where}: {width} inputs against a Hessian {tuple(hessian_II.shape)} and units {tuple(units_UC.shape)}; "
            "expected every input in one unit."
        )
    units_UC = units_UC.to(hessian_II.device)
    inverse_II = torch.cholesky_inverse(_factor(hessian_II.double(), where))
    weight_IO = weight_OI.T.to(inverse_II.device, torch.float64, copy=True)
    left, gone = torch.arange(len(units_UC), device=units_UC.device), []
    while len(left):
        ranked = _costs(inverse_II, weight_IO, units_UC[left], where).argsort(stable=True)
        worst = left[ranked[:at_once]]
        left = left[ranked[at_once:].sort().values]
        _remove_(inverse_II, weight_IO, units_UC[worst].flatten(), where)
        gone.append(worst)
    return torch.cat(gone).flip(0)


def _costs(inverse_II: Tensor, weight_IO: Tensor, units_UC: Tensor, where: str) -> Tensor:
    """(U,): what the removal of each unit alone would add to the error."""
    blocks_UCC = inverse_II[units_UC[:, :, None], units_UC[:, None, :]]
    weights_UCO = weight_IO[units_UC]
    if units_UC.shape[1] == 1:
        return weights_UCO[:, 0].square().sum(dim=1) / blocks_UCC[:, 0, 0]
    return torch.linalg.solve_triangular(_factor(blocks_UCC, where), weights_UCO, upper=False).square().sum(dim=(1, 2))


def _remove_(inverse_II: Tensor, weight_IO: Tensor, gone_N: Tensor, where: str) -> None:
    """Refits the weights to inputs without `gone_N`, and takes these out of the inverse Hessian."""
    factor_NN = _factor(inverse_II[gone_N][:, gone_N], where)
    gain_NI = torch.cholesky_solve(inverse_II[gone_N], factor_NN)
    weight_IO -= gain_NI.T @ weight_IO[gone_N]
    inverse_II -= inverse_II[:, gone_N] @ gain_NI
    weight_IO[gone_N] = 0  # not only nearly
    inverse_II[gone_N] = 0
    inverse_II[:, gone_N] = 0


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """The least-squares weights that keep the first inputs of an order, for every number of them.

    Attributes:
    order_I: int64 inputs, the ones that stay longest first.
    factor_II: lower Cholesky factor of the Hessian in that order, float64.
    rotated_IO: Z of the module's docstring, float64.
    """

    order_I: Tensor
    factor_II: Tensor
    rotated_IO: Tensor

    def weight_OI(self, kept: int) -> Tensor:
        """(O, I) float64: the best weights of the first `kept` inputs in their places, zero elsewhere."""
        factor_NN = self.factor_II[:kept, :kept]
        weight_NO = torch.linalg.solve_triangular(factor_NN.T, self.rotated_IO[:kept], upper=True)
        weight_IO = torch.zeros_like(self.rotated_IO)
        weight_IO[self.order_I[:kept]] = weight_NO
        return weight_IO.T

    def errors(self) -> Tensor:
        """(I + 1,) float64: squared error that keeping the first 0, 1, ..., I inputs leaves (damping included)."""
        squares_I = self.rotated_IO.square().sum(dim=1)
        tails_I = squares_I.flip(0).cumsum(0).flip(0)
        return torch.cat([tails_I, tails_I.new_zeros(1)])


def prefixes(hessian_II: Tensor, weight_OI: Tensor, order_I: Tensor, *, where: str = "weight") -> Prefixes:
    """All prefixes of an order from one Cholesky factor.

    Raises: NumericsError: if the Hessian does not factor, naming `where`.
    """
    order_I = order_I.to(hessian_II.device)
    factor_II = _factor(hessian_II.double()[order_I][:, order_I], where)
    weight_IO = weight_OI.T.to(factor_II.device, torch.float64)
    return Prefixes(order_I, factor_II, factor_II.T @ weight_IO[order_I])


def fluctuation_scores(variance_I: Tensor, weight_OI: Tensor, units_UC: Tensor) -> Tensor:
    """(U,) float64: variance of an input times the squares of its weights, mean over a unit (arXiv 2312.11983).

    Args:
        variance_I: of every input over the calibration tokens.
    """
    scores_I = variance_I.double().clamp_min(0) * weight_OI.double().square().sum(dim=0)
    return scores_I[units_UC.to(scores_I.device)].mean(dim=1)


def descending(scores_U: Tensor) -> Tensor:
    """(U,) int64: the unit of highest score first, ties by index."""
    return scores_U.argsort(descending=True, stable=True)
