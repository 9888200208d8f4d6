"""Start and loss of the paper's sparsity induction: eq. 5 and eq. 6 to 8 of arXiv 2602.21652. torch only.

What the paper leaves out, and what we read into it: g is the identity; p = 2, the spectral norm its name promises;
alpha is one over the sum of the norms at the start, or exp() would be zero for any real model; the mean squared error
is taken relative to the dense outputs' energy, so that lambda means the same for every block. Eq. 8 falls as norms
grow: it pushes the largest singular value up against the error, and says nothing about the others.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-2  # as OmniQuant (arXiv 2308.13137) cuts its scales; eq. 5 is zero for symmetric outputs
ITERATIONS = 20


def initial_scales(outputs_TO: Tensor) -> Tensor:
    """(median - mean)^2 of every output channel over the tokens (eq. 5) over their median, within [1e-2, 1e2].

    Args:
        outputs_TO: of the linear whose outputs the scales divide, before anything is changed.
    Returns: (O,) float32.
    """
    outputs_TO = outputs_TO.float()
    found_O = (outputs_TO.median(dim=0).values - outputs_TO.mean(dim=0)).square()
    logs_O = found_O.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (logs_O - logs_O.median()).exp().clamp(SMALLEST_SCALE, 1 / SMALLEST_SCALE)


class SpectralNorms:
    """Largest singular values of matrices that change little from call to call: power iterations, warm."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._vectors_I = {
            name: torch.randn(weight.shape[1], generator=generator).to(weight.device)
            for name, weight in weights.items()
        }
        self._warm = False

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(len(weights),), differentiable; below the true ones until the iterations have settled."""
        found = []
        for name, weight_OI in weights.items():
            with torch.no_grad():
                plain_OI, vector_I = weight_OI.detach().float(), self._vectors_I[name]
                for _ in range(1 if self._warm else ITERATIONS):
                    vector_I = torch.nn.functional.normalize(plain_OI.T @ (plain_OI @ vector_I), dim=0)
                self._vectors_I[name] = vector_I
            found.append((weight_OI.float() @ vector_I).norm())
        self._warm = True
        return torch.stack(found)


def spectral_penalty(norms_L: Tensor, alpha: float) -> Tensor:
    """exp(-alpha sum of the norms) (eq. 8)."""
    return (-alpha * norms_L.sum()).exp()


def feature_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error (eq. 7) over the target's mean square."""
    target = target.float()
    return (output.float() - target).square().mean() / target.square().mean().clamp_min(1e-12)


def stable_rank(weight_OI: Tensor) -> float:
    """Squared Frobenius norm over the squared spectral norm: directions that a matrix fills; 0 for zeros."""
    spectrum = torch.linalg.svdvals(weight_OI.detach().float())
    return float(spectrum.square().sum() / spectrum[0].square()) if spectrum[0] else 0.0


def finite_parameters(parameters: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
