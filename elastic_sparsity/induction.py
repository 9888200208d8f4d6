"""Sparsity induction: a scale for every input channel's importance, learned before anything is pruned.

Source: arXiv 2602.21652, eq. 9 to 11: scaling a linear's input channels by s scales the metric of Wanda by s, without
recomputing it. Absorbed exactly into the weights, as the paper's text has it, such a scale changes neither Wanda's
masks nor the pruned function; what can help is the scale *in the metric*. So we learn that one: weights are frozen,
masks are hard in the forward pass and relaxed in the backward pass (`soft_mask`), and the loss is the KL between the
dense and the masked model's logits, one level of the ladder a step (the paper: mean squared error of features).
The scales are shared by all levels, so that one order of weights still serves the whole ladder.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import replace_module_
from elastic_sparsity.arch import linears_of, weight_OI
from elastic_sparsity.blocks import input_hooks
from elastic_sparsity.distill import Share, cosine, own_samples
from elastic_sparsity.end_to_end import HeadFn, balanced_order, kl_to_dense
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.feature_stage import LEAST_GAIN, BlockResult
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.ladder import Ladder, Level, keep_count
from elastic_sparsity.soft_mask import Choice, channel_gradient, hard_mask, thresholds

log = logging.getLogger(__name__)
ATTEMPTS = 3  # at using what was learned: whole, by half, by a quarter


@dataclass(frozen=True, kw_only=True, slots=True)
class InductionSettings:
    """Numbers of the stage; see the recipe's `induction` section."""

    steps: int
    batch_size: int
    lr: float
    temperature: float
    samples: int
    held_out: int
    warmup: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Induced:
    """What was learned.

    Attributes:
        scales: positive float32 (I,) by linear name, geometric mean 1; all ones if learning did not help.
        input_norms: (I,) float32, L2 norms of the dense model's inputs over the tokens they were taken from.
        kl_before, kl_after: mean KL to the dense model (nats a token) by level on held-out samples, with scores as
            they were and scaled.
        used: whether the scales lowered it (the mean of its logarithm over the levels).
        blocks: what folds and absorbed scales gave, block by block; see `fold_choice` and `absorbed_stage`.
    """

    scales: dict[str, Tensor]
    input_norms: dict[str, Tensor]
    kl_before: dict[str, float]
    kl_after: dict[str, float]
    used: bool
    blocks: tuple[BlockResult, ...] = ()


class _MaskedProduct(torch.autograd.Function):
    """x @ (weight * mask)^T; towards the log scale it returns `channel_gradient`, and nothing towards the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _log_scale_I: Tensor, linear: "ScaledLinear") -> Tensor:
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        masked_OI, thresholds_OG1 = linear.masked_weight()
        x, masked_OI = x.to(dtype), masked_OI.to(dtype)
        ctx.linear = linear
        ctx.save_for_backward(x, masked_OI, thresholds_OG1)
        return x @ masked_OI.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, masked_OI, thresholds_OG1 = ctx.saved_tensors
        grad, linear = grad_outputs[0].to(x.dtype), ctx.linear
        to_input = grad @ masked_OI if ctx.needs_input_grad[0] else None
        gradient_OI = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float()
        saliency_OI = gradient_OI.mul_(weight_OI(linear.linear))
        found = channel_gradient(saliency_OI, linear.scores(), thresholds_OG1, linear.choice, linear.temperature)
        return to_input, found, None


class ScaledLinear(nn.Module):
    """A frozen linear whose mask follows learned scales; dense while `choice` is None.

    Args:
        base_scores: makes the (O, I) scores that the scales multiply; called at every use, so that no matrix is kept.
    """

    def __init__(self, linear: nn.Module, base_scores: Callable[[], Tensor], temperature: float) -> None:
        super().__init__()
        self.linear, self.base_scores, self.temperature = linear, base_scores, temperature
        self.log_scale_I = nn.Parameter(torch.zeros(weight_OI(linear).shape[1], device=weight_OI(linear).device))
        self.choice: Choice | None = None

    def set_level_(self, level: Level | None) -> None:
        """The level to mask at; None = dense."""
        width = self.log_scale_I.shape[0]
        self.choice = Choice(*(level.pattern or (keep_count(width, level.sparsity), width))) if level else None

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(O, I) float32."""
        return self.base_scores().mul_(self.log_scale_I.exp())

    @torch.no_grad()
    def masked_weight(self) -> tuple[Tensor, Tensor]:
        """(O, I), and the thresholds of its mask (O, G, 1)."""
        assert self.choice is not None
        scores = self.scores()
        found = thresholds(scores, self.choice)
        return weight_OI(self.linear) * hard_mask(scores, found, self.choice), found

    def forward(self, x: Tensor) -> Tensor:
        if self.choice is None:
            return self.linear(x)
        product: Tensor = _MaskedProduct.apply(x, self.log_scale_I, self)
        return product if self.linear.bias is None else product + self.linear.bias.to(product.dtype)  # type: ignore[operator]


def learn_channel_scales(
    model: Any,
    head: HeadFn,
    ladder: Ladder,
    token_ids_ST: Tensor,
    method: str,
    settings: InductionSettings,
    generator: torch.Generator,
    autocast: Callable[[], Any],
    share: Share,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    sum_: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> Induced:
    """Learns one scale an input channel and linear; the model comes back as it was.

    Args:
        model: causal LM, frozen, whole in memory.
        head: final hidden states to logits.
        token_ids_ST: calibration samples. The last `held_out` of them judge the result, the others train.
        method: "magnitude" or "wanda": the scores that are scaled ("obs" takes what was learned for "wanda").
        share: this worker's part of every batch.
        sum_: adds up tensors over all workers, in place.
    Raises: ConfigError: too few samples. NumericsError: statistics or a loss that is not finite.
    """
    train_ST, held_ST = _split(token_ids_ST, settings)
    norms = input_statistics(model, train_ST[: settings.samples], share, settings.batch_size, autocast, sum_)
    with _scaled(model, method, norms, settings.temperature) as linears:
        before = _held_out_kl(model, linears, head, ladder, held_ST, share, settings.batch_size, autocast)
        if method == "magnitude":  # closed form: the scale that makes magnitude Wanda's score
            for name, linear in linears.items():
                start_I = norms[name].square_sum_I.clamp_min(torch.finfo(torch.float32).tiny).log() / 2
                linear.log_scale_I.data.copy_(start_I - start_I.mean())
        _train_(model, linears, head, ladder, train_ST, settings, generator, autocast, share, on_step)
        if not all(torch.isfinite(linear.log_scale_I).all() for linear in linears.values()):
            raise NumericsError("induction: the scales are not finite any more; lower induction.lr.")
        after, used = _weakened_to_gain_(
            linears,
            before,
            lambda: _held_out_kl(model, linears, head, ladder, held_ST, share, settings.batch_size, autocast),
        )
        scales = {name: _normalised(linear.log_scale_I) if used else torch.ones_like(linear.log_scale_I.detach())
                  for name, linear in linears.items()}  # fmt: skip
    shown = " ".join(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in before)
    log.info("induction: KL to dense on held-out samples: %s%s", shown, "" if used else "; no gain, not used")
    input_norms = {name: statistics.square_sum_I.sqrt() for name, statistics in norms.items()}
    return Induced(scales=scales, input_norms=input_norms, kl_before=before, kl_after=after, used=used)


def _split(token_ids_ST: Tensor, settings: InductionSettings) -> tuple[Tensor, Tensor]:
    trained = token_ids_ST.shape[0] - settings.held_out
    if trained < max(1, settings.batch_size):
        raise ConfigError(
            f"induction.held_out: {settings.held_out} of {token_ids_ST.shape[0]} calibration samples leave too few for "
            f"a batch of {settings.batch_size}; raise calibration.samples or lower it."
        )
    return token_ids_ST[:trained], token_ids_ST[trained:]


def _weakened_to_gain_(
    linears: Mapping[str, ScaledLinear], before: Mapping[str, float], judge: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], bool]:
    """Halves the log scales until no level loses: what helps most of them may be too much for one.

    Returns: KL by level, and True; or that of the scales as learned, and False, if they help nobody or hurt somebody
        even when they are a quarter as strong.
    """
    first: dict[str, float] = {}
    for attempt in range(ATTEMPTS):
        if attempt:
            for linear in linears.values():
                linear.log_scale_I.data.mul_(0.5)
        after = judge()
        first = first or after
        if _is_gain(before, after):
            return after, True
    return first, False


def _is_gain(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether KLs fall on average, by their logarithm, and at no level rise by more than rounding."""
    changes = [math.log(max(after[name], 1e-30) / max(before[name], 1e-30)) for name in before]
    return sum(changes) < 0 and max(changes) <= LEAST_GAIN


def _normalised(log_scale_I: Tensor) -> Tensor:
    """A common factor of a linear's scales changes no mask."""
    log_scale = log_scale_I.detach().float()
    return (log_scale - log_scale.mean()).exp()


@torch.no_grad()
def input_statistics(
    model: Any,
    token_ids_ST: Tensor,
    share: Share,
    batch_size: int,
    autocast: Callable[[], Any],
    sum_: Callable[[list[Tensor]], None],
) -> dict[str, InputStatistics]:
    """Input statistics of all linears in the dense model, in batches of `batch_size` shared out among the workers.

    Unlike `block_statistics`, an object each, made before: a worker that has no sample of a small batch adds zeros.
    """
    linears = linears_of(model)
    found = {
        name: InputStatistics(weight_OI(x).shape[1], gram=False, device=weight_OI(x).device)
        for name, x in linears.items()
    }

    def observe(names: tuple[str, ...], x: Tensor) -> None:
        for name in names:
            found[name].update(x)

    with autocast(), input_hooks(linears, observe):
        for start in range(0, token_ids_ST.shape[0], batch_size):
            places = [start + place for place in share.places if start + place < token_ids_ST.shape[0]]
            if places:
                model.base_model(token_ids_ST[places], use_cache=False)
    for name, statistics in found.items():
        statistics.reduce(sum_)
        statistics.checked(name)
    return found


@contextmanager
def _scaled(
    model: Any, method: str, norms: Mapping[str, InputStatistics], temperature: float
) -> Iterator[dict[str, ScaledLinear]]:
    """Inside, the model's linears are scaled ones, dense at first."""
    made: dict[str, ScaledLinear] = {}
    try:
        for name, statistics in norms.items():
            linear = model.get_submodule(name)

            def base_scores(linear: nn.Module = linear, statistics: InputStatistics = statistics) -> Tensor:
                return importance_scores(method, weight_OI(linear), statistics, 0.0, "induction")

            made[name] = ScaledLinear(linear, base_scores, temperature)
            replace_module_(model, name, made[name])
        yield made
    finally:
        for name, scaled in made.items():
            replace_module_(model, name, scaled.linear)


def _loss(
    model: Any,
    linears: Mapping[str, ScaledLinear],
    head: HeadFn,
    ids_BT: Tensor,
    level: Level,
    autocast: Callable[[], Any],
) -> Tensor:
    def switch_(to: Level | None) -> None:
        for linear in linears.values():
            linear.set_level_(to)

    return kl_to_dense(model, head, ids_BT, level, autocast, switch_)


@torch.no_grad()
def _held_out_kl(
    model: Any,
    linears: Mapping[str, ScaledLinear],
    head: HeadFn,
    ladder: Ladder,
    held_ST: Tensor,
    share: Share,
    batch_size: int,
    autocast: Callable[[], Any],
) -> dict[str, float]:
    """Every level's mean KL over the held-out samples, split among the workers."""
    mine = own_samples(held_ST.shape[0], share.places, batch_size)
    found = {}
    for level in ladder.levels:
        losses = [float(_loss(model, linears, head, held_ST[s, None], level, autocast)) for s in mine]
        total, count = share.mean([sum(losses), len(losses)])
        found[level.name] = total / count
    return found


def _train_(
    model: Any,
    linears: Mapping[str, ScaledLinear],
    head: HeadFn,
    ladder: Ladder,
    token_ids_ST: Tensor,
    settings: InductionSettings,
    generator: torch.Generator,
    autocast: Callable[[], Any],
    share: Share,
    on_step: Callable[[int, int], None],
) -> None:
    """Adam on the log scales, one level a step."""
    parameters: list[Tensor] = [linear.log_scale_I for linear in linears.values()]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    for step, level in enumerate(balanced_order(ladder.levels, settings.steps, generator)):
        optimizer.param_groups[0]["lr"] = settings.lr * cosine(step, settings.steps, settings.warmup)
        chosen = (step * settings.batch_size + torch.tensor(share.places)) % token_ids_ST.shape[0]
        loss = _loss(model, linears, head, token_ids_ST[chosen], level, autocast)
        loss.backward()
        share.mean_gradients_(parameters)
        (value,) = share.mean([float(loss.detach())])
        if not math.isfinite(value):
            raise NumericsError(
                f"induction: loss of level {level.name} is {value} at step {step}; lower induction.lr, or set "
                "precision = 'float32'."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, settings.steps)
