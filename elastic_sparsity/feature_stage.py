"""The stage of arXiv 2602.21652 block by block: a few free vectors trained on features, the backbone frozen.

Shared by its readings A (`absorbed_stage`) and C (`gains`). Where the paper is silent we take OmniQuant (2308.13137),
whose equations it uses: AdamW at 5e-3 without decay, one sample a step, a block at a time. The loss is eq. 6: features
against the dense block's, and a penalty: the spectral one of eq. 8, or what a reading puts in its place. Nothing is
kept that does not lower the error of samples that were held out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.functional_fold import call_with, outputs_inputs
from elastic_sparsity.ladder import Level, keep_count
from elastic_sparsity.soft_mask import Choice
from elastic_sparsity.spectral_loss import SpectralNorms, feature_loss, finite_parameters, spectral_penalty

LEAST_GAIN = 1e-3  # of the error: below it a gain is rounding
ROUNDING = 1e-6  # relative squared error: below it there is nothing but rounding, also of bfloat16 products


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSettings:
    """Numbers of the stage.

    Attributes:
        steps: of every block, one sample and one level each.
        held_out: samples, the last ones, that judge.
        spectral: lambda of eq. 6; 0 = features alone.
        penalty: what lambda multiplies: "spectral" (eq. 8), or "entropy" of the importances (reading A only).
        temperature: of the relaxed masks, in units of the scores' logarithm.
        paper_start: begin at eq. 5 where it says something (reading A only); else at 1, where nothing is changed.
    """

    steps: int
    held_out: int
    lr: float = 5e-3
    spectral: float = 0.01
    penalty: str = "spectral"
    temperature: float = 0.5
    paper_start: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """Held-out feature error of a block, by level, before and after; and whether what was learned is used."""

    before: dict[str, float]
    after: dict[str, float]
    used: bool


# A level and whether a gradient is wanted, to the block's parameters with that level's masks.
ParametersAt = Callable[[Level, bool], dict[str, Tensor]]


def choice_of(level: Level, width: int) -> Choice:
    """What a level keeps of a row of `width` inputs."""
    return Choice(*(level.pattern or (keep_count(width, level.sparsity), width)))


def check_samples(count: int, held_out: int) -> None:
    """Raises: ConfigError: if none are left to learn from."""
    if held_out >= count:
        raise ConfigError(f"held_out: {held_out} of {count} calibration samples leave none to learn from; lower it.")


@torch.no_grad()
def feature_errors(
    block: nn.Module,
    call: Callable[[Tensor], Tensor],
    inputs_STD: Tensor,
    targets_STD: Tensor,
    levels: Sequence[Level],
    parameters_at: ParametersAt,
    autocast: Callable[[], Any] = nullcontext,
) -> dict[str, float]:
    """Mean error over samples by level."""
    found = {}
    for level in levels:
        parameters = parameters_at(level, False)
        with autocast():
            errors = [
                float(feature_loss(call_with(block, call, parameters, x[None]), y[None]))
                for x, y in zip(inputs_STD, targets_STD, strict=True)
            ]
        found[level.name] = sum(errors) / len(errors)
    return found


def train_(
    free: Sequence[Tensor],
    block: nn.Module,
    call: Callable[[Tensor], Tensor],
    inputs_STD: Tensor,
    targets_STD: Tensor,
    order: Sequence[Level],
    parameters_at: ParametersAt,
    settings: StageSettings,
    autocast: Callable[[], Any],
    where: str,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """AdamW on the free vectors.

    Args:
        order: the level of every step.
        penalty: stands in for eq. 8; None = eq. 8, of the level's masked matrices.
    Raises: NumericsError: a loss or vector that is not finite, naming `where` and the level.
    """
    optimizer = torch.optim.AdamW(list(free), lr=settings.lr, weight_decay=0.0)
    spectral = _Spectral(block)
    for step, level in enumerate(order):
        with torch.enable_grad():
            parameters = parameters_at(level, True)
            sample = step % len(inputs_STD)
            with autocast():
                output = call_with(block, call, parameters, inputs_STD[sample, None])
            loss = feature_loss(output, targets_STD[sample, None])
            if settings.spectral:
                loss = loss + settings.spectral * (spectral(parameters) if penalty is None else penalty())
            loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(float(loss.detach())) or not finite_parameters(x.grad for x in free if x.grad is not None):
            raise NumericsError(
                f"{where}: at step {step} the loss at level {level.name} is {float(loss.detach())}, and it or a "
                "gradient is not finite; lower the learning rate, or set precision = 'float32'."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class _Spectral:
    """Eq. 8 of a block's changed matrices; alpha is one over the sum of their norms at the first call."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.alpha = block, 0.0
        self.norms: SpectralNorms | None = None

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        weights = _matrices(self.block, parameters)
        self.norms = self.norms or SpectralNorms(weights)
        found = self.norms(weights)
        total = float(found.detach().sum())
        self.alpha = self.alpha or (1 / total if total else 0.0)  # of zeros, whose norm no scale changes
        return spectral_penalty(found, self.alpha)


def better(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the mean logarithm of the errors fell by more than rounding.

    Errors below `ROUNDING`, of a level that keeps everything, do not count: they can only change by any factor.
    """
    gains = [math.log(max(after[name], ROUNDING) / max(before[name], ROUNDING)) for name in before]
    return sum(gains) / len(gains) < -LEAST_GAIN


def _matrices(block: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: outputs_inputs(block, name.removesuffix(".weight"), value)
        for name, value in parameters.items()
        if name.endswith(".weight") and value.ndim == 2
    }
