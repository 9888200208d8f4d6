"""Importance scores of a weight, and the running input statistics they need. torch only; higher = keep.

Sources: Wanda (arXiv 2306.11695, eq. 1); RIA ("Plug-and-Play", ICLR 2024, eq. 3 and 4); the optimal-brain-surgeon
saliency as used by SparseGPT (arXiv 2301.00774, eq. 3). Unlike the EPTS code, statistics are fp32 (fp16 squares
overflow from 256 on), are taken on the stream the level will really see, and are refreshed for every block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elastic_sparsity.errors import NumericsError, ShapeError


class InputStatistics:
    """Streaming statistics of a linear's input: float32 within a batch, float64 over batches.

    (float64, so that sums over several workers round to the same float32 as one worker's.)

    Args:
        width: input features I.
        gram: also accumulate the (I, I) matrix sum x xT, needed by Hessian-aware scores and SparseGPT.
        means: also accumulate the sum of x, needed by DSnoT and structured pruning.
    """

    def __init__(self, width: int, *, gram: bool, means: bool = False, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.num_tokens = 0
        self._square_sum_I = torch.zeros(width, dtype=torch.float64, device=device)
        self.gram_II = torch.zeros(width, width, dtype=torch.float32, device=device) if gram else None
        self._sum_I = torch.zeros(width, dtype=torch.float64, device=device) if means else None

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs of shape (..., I)."""
        if x.shape[-1] != self.width:
            raise ShapeError(f"input statistics: expected {self.width} features, found shape {tuple(x.shape)}.")
        x_TI = x.detach().reshape(-1, self.width).float()
        self.num_tokens += x_TI.shape[0]
        if self._sum_I is not None:
            self._sum_I += x_TI.sum(dim=0)
        if self.gram_II is None:
            self._square_sum_I += x_TI.square().sum(dim=0)
            return
        with torch.autocast(x.device.type, enabled=False):  # autocast would accumulate in bfloat16
            self.gram_II.addmm_(x_TI.T, x_TI)

    @property
    def square_sum_I(self) -> Tensor:
        """(I,) float32: sum of squares of every channel."""
        return self._square_sum_I.float() if self.gram_II is None else self.gram_II.diagonal().clone()

    @property
    def mean_I(self) -> Tensor:
        """(I,) float64: mean of every channel; only with `means`."""
        assert self._sum_I is not None
        return self._sum_I / self.num_tokens

    @property
    def variance_I(self) -> Tensor:
        """(I,) float64: variance of every channel over the tokens; only with `means`."""
        return (self.square_sum_I.double() / self.num_tokens - self.mean_I.square()).clamp_min(0)

    def reduce(self, sum_: Callable[[list[Tensor]], None]) -> None:
        """Adds up the statistics of several workers. `sum_` sums tensors in place over all of them."""
        count = torch.tensor([self.num_tokens], dtype=torch.float64, device=self._square_sum_I.device)
        sum_([count, self._square_sum_I])
        self.num_tokens = int(count)
        sum_([x for x in (self._sum_I, self.gram_II) if x is not None])

    def checked(self, where: str) -> "InputStatistics":
        """Itself, if it is finite and not empty.

        Raises: NumericsError: naming `where`.
        """
        if not self.num_tokens:
            raise NumericsError(f"{where}: saw no calibration token.")
        if not torch.isfinite(self.square_sum_I).all():
            bad = int((~torch.isfinite(self.square_sum_I)).sum())
            raise NumericsError(
                f"{where}: calibration statistics of {bad} of {self.width} input channels are NaN or infinite; "
                "check the base model's weights, or run in float32 (recipe: precision = 'float32')."
            )
        return self


def magnitude_scores(weight_OI: Tensor) -> Tensor:
    """|weight| as (O, I) float32."""
    return weight_OI.float().abs()


def wanda_scores(weight_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """|weight| times the L2 norm of its input channel (arXiv 2306.11695, eq. 1).

    Args:
        square_sum_I: float32, sum of squares of every input over all calibration tokens.
    Returns: (O, I) float32, comparable within a row only.
    Raises: ShapeError.
    """
    if square_sum_I.shape != weight_OI.shape[1:]:
        raise ShapeError(f"wanda: weight {tuple(weight_OI.shape)} against statistics {tuple(square_sum_I.shape)}.")
    return weight_OI.float().abs() * square_sum_I.sqrt()


def ria_scores(weight_OI: Tensor, square_sum_I: Tensor, power: float = 0.5) -> Tensor:
    """Relative importance and activations: (|w| / its input's sum + |w| / its row's sum) times norm of the input^power.

    Args:
        square_sum_I: float32, sum of squares of every input over all calibration tokens.
        power: of the input's L2 norm; the paper's 0.5.
    Returns: (O, I) float32, comparable within the whole matrix. A weight of an all-zero row or column scores 0.
    Raises: ShapeError.
    """
    if square_sum_I.shape != weight_OI.shape[1:]:
        raise ShapeError(f"ria: weight {tuple(weight_OI.shape)} against statistics {tuple(square_sum_I.shape)}.")
    size, tiny = weight_OI.float().abs(), torch.finfo(torch.float32).tiny
    relative = size / size.sum(dim=0).clamp_min(tiny) + size / size.sum(dim=1, keepdim=True).clamp_min(tiny)
    return relative * square_sum_I.sqrt().pow(power)


def inverse_hessian(gram_II: Tensor, damping: float, where: str = "gram") -> Tensor:
    """Inverse of `gram + damping * mean(diag) * identity`; channels that were never active get a unit diagonal.

    Raises: NumericsError: if it does not factor, naming `where` and the damping.
    """
    hessian = gram_II.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info) or not torch.isfinite(factor).all():
        raise NumericsError(
            f"{where}: the input covariance does not factor with damping {damping}; "
            "raise `scores.damping` or use more calibration tokens."
        )
    return torch.cholesky_inverse(factor)


def obs_scores(weight_OI: Tensor, gram_II: Tensor, damping: float, where: str = "gram") -> Tensor:
    """weight^2 / diag(inverse Hessian): the loss of removing one weight and repairing the rest of its row.

    Returns: (O, I) float32, comparable within a row; 0 for channels that were never active, as removing their weights
        costs nothing.
    """
    inverse_diagonal_I = inverse_hessian(gram_II, damping, where).diagonal()
    return (weight_OI.float().square() / inverse_diagonal_I).masked_fill_(gram_II.diagonal() == 0, 0.0)


def importance_scores(
    method: str,
    weight_OI: Tensor,
    statistics: InputStatistics,
    damping: float,
    where: str,
    channel_scale_I: Tensor | None = None,
) -> Tensor:
    """Scores by name: "magnitude", "wanda", "ria" or "obs" (which needs a gram).

    Args:
        channel_scale_I: learned scale of every input channel's importance (arXiv 2602.21652, eq. 11; see `induction`).
            "obs" scores are squares and so take its square.
    Raises: ShapeError: if the scale has another width than the weight.
    """
    if method == "magnitude":
        scores = magnitude_scores(weight_OI)
    elif method == "wanda":
        scores = wanda_scores(weight_OI, statistics.square_sum_I)
    elif method == "ria":
        scores = ria_scores(weight_OI, statistics.square_sum_I)
    else:
        assert method == "obs" and statistics.gram_II is not None
        scores = obs_scores(weight_OI, statistics.gram_II, damping, where)
    if channel_scale_I is None:
        return scores
    if channel_scale_I.shape != weight_OI.shape[1:]:
        raise ShapeError(
            f"{where}: weight {tuple(weight_OI.shape)} against channel scale {tuple(channel_scale_I.shape)}."
        )
    scale_I = channel_scale_I.to(weight_OI.device, torch.float32)
    return scores.mul_(scale_I.square() if method == "obs" else scale_I)
