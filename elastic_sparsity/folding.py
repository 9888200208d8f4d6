"""Parameters edited in float64 and rounded once to their own dtype, and the gate that a fold kept the function.

Knows modules with a weight and a bias, and numbers; which fold is exact for which model is `absorption`'s business.
"""

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import is_transposed
from elastic_sparsity.errors import AbsorptionError, NumericsError, ShapeError, brief

# Relative errors of logits. A fold that is exact on paper only rounds: 1e-15 and 1e-6 on tiny models. SmolLM2-135M, all
# folds one after another: 6e-6 in float32, so that of a much deeper model float64 is the judge.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


class Draft:
    """Float64 copies of a module's parameters, edited in place and written back all at once or not at all."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._copies: dict[str, Tensor] = {}

    def parameter(self, path: str, name: str) -> Tensor | None:
        """The copy of `path`'s parameter `name`; None if the module has none. The same tensor at every call."""
        parameter = getattr(self._root.get_submodule(path), name, None)
        if parameter is None:
            return None
        key = f"{path}.{name}"
        if key not in self._copies:
            # detach().to() of a float64 parameter would be the parameter itself
            self._copies[key] = parameter.detach().to(torch.float64, copy=True)
        return self._copies[key]

    def weight_OI(self, path: str) -> Tensor:
        """The copy of a linear's weight as (outputs, inputs); a view, so edits stay."""
        weight = self.parameter(path, "weight")
        assert weight is not None, path
        return weight.T if is_transposed(self._root.get_submodule(path)) else weight

    @torch.no_grad()
    def write_(self) -> None:
        """Rounds every copy to its parameter's dtype and writes it.

        Raises: NumericsError: if a value does not fit the dtype; then nothing is written.
        """
        parameters = {key: self._root.get_parameter(key) for key in self._copies}
        rounded = {key: copy.to(parameters[key].dtype) for key, copy in self._copies.items()}
        bad = [key for key, values in rounded.items() if not torch.isfinite(values).all()]
        if bad:
            raise NumericsError(
                f"{', '.join(bad[:5])}: folding gives NaN or infinity in {parameters[bad[0]].dtype}; expected finite "
                "weights. Nothing was changed; use values nearer to 1, or fold in float32."
            )
        for key, values in rounded.items():
            parameters[key].copy_(values)


def real_values(values: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """`values` as float64, detached.

    Raises: ShapeError, NumericsError: naming `where`; AbsorptionError: if they are not real floats.
    """
    if values.shape != shape:
        raise ShapeError(f"{where}: found shape {tuple(values.shape)}; expected {shape}.")
    if not values.is_floating_point():
        raise AbsorptionError(f"{where}: found {values.dtype}; expected real floats, best float64.")
    return finite(values.detach().double(), where)


def finite(values: Tensor, where: str) -> Tensor:
    """Itself. Raises: NumericsError: naming `where`, if a value is NaN or infinite."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NumericsError(
            f"{where}: {bad} of {values.numel()} values are NaN or infinite; expected finite ones. "
            "Check what they were computed from."
        )
    return values


def checked_permutation(order: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """`order`, whose last dimension holds every index below its length once.

    Raises: ShapeError, AbsorptionError: naming `where`.
    """
    if order.shape != shape:
        raise ShapeError(f"{where}: found shape {tuple(order.shape)}; expected {shape}.")
    expected = torch.arange(shape[-1], device=order.device)
    if order.dtype != torch.int64 or not (order.sort(dim=-1).values == expected).all():
        raise AbsorptionError(
            f"{where}: found {brief(order.flatten()[:8].tolist())} ... of {order.dtype}; expected int64 with every "
            f"index from 0 to {shape[-1] - 1} once (torch.randperm, argsort)."
        )
    return order


def relative_error(before: Tensor, after: Tensor) -> float:
    """Largest |after - before| over the largest |before|, in float64.

    Raises: ShapeError, NumericsError.
    """
    if before.shape != after.shape or not before.numel():
        raise ShapeError(f"logits: found {tuple(after.shape)} after {tuple(before.shape)}; expected equal shapes.")
    reference, found = finite(before.double(), "logits before"), finite(after.double(), "logits after")
    scale = float(reference.abs().max())
    if not scale:
        raise NumericsError("logits before: all are zero; expected a model that says something.")
    return float((found - reference).abs().max()) / scale


def check_function_kept(before: Tensor, after: Tensor, dtype: torch.dtype) -> float:
    """The gate after every fold: the same tokens give the same logits.

    Args:
        before, after: logits of the same tokens, any shape.
        dtype: of the computation; float64 (1e-10) or float32 (1e-5). transformers casts RMS norms and softmax to
            float32 whatever the model's dtype is; a float64 model run as it stands is a float32 computation.
    Returns: the relative error: largest difference over the largest logit before.
    Raises: AbsorptionError: if it is above the tolerance, or the dtype has none; ShapeError, NumericsError.
    """
    if dtype not in TOLERANCES:
        raise AbsorptionError(f"logits: found {dtype}, too coarse to judge; expected float32 or float64 logits.")
    error = relative_error(before, after)
    if error > TOLERANCES[dtype]:
        raise AbsorptionError(
            f"logits: a fold changed them by {error:.2e} relative to the largest; expected at most "
            f"{TOLERANCES[dtype]:.0e} in {dtype}. Load the model again; use values nearer to 1, or report the model."
        )
    return error
