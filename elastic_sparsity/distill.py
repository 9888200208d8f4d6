"""The block phase: one decoder block's adapters (and, if asked, its base values) against the dense block's output.

It gets a callable block, tensors and elastic linears; never a whole model, never a recipe. EPTS (arXiv 2606.25285)
sums squared errors over tokens and mixes in a term toward its densest level; we add the per-token relative loss,
because with a plain mean the massive activations of a few tokens drown all others.
Letters: S samples, T tokens, D width, K adapter groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_sparsity.adapters import ElasticLinear, merged_once
from elastic_sparsity.blocks import BlockCall
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.ladder import Ladder, Level
from elastic_sparsity.mixer import FeatureMixer


def relative_loss(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2."""
    error = (output_BTD.float() - target_BTD.float()).square().sum(-1)
    energy = target_BTD.float().square().sum(-1)
    return (error / (energy + 1e-6 * energy.mean() + 1e-12)).mean()


def mse_loss(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Plain mean squared error, up to a constant what the EPTS code minimises."""
    return (output_BTD.float() - target_BTD.float()).square().mean()


BLOCK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"relative": relative_loss, "mse": mse_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSettings:
    """Numbers of the block phase; see the recipe's `block` section for what each means."""

    steps: int
    batch_size: int
    adapter_lr: float
    base_lr: float
    mixer_lr: float
    loss: str
    densest_weight: float


def cosine(step: int, num_steps: int, warmup: float) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up over the first `warmup` share of steps, then cosine to zero."""
    ramp = min(1.0, (step + 1) / max(1.0, warmup * num_steps))
    return ramp * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def draw_levels(ladder: Ladder, generator: torch.Generator) -> list[Level]:
    """One level of every group, uniformly; with one level a group that is the ladder itself."""
    served = [ladder.levels_of(group) for group in range(ladder.num_groups)]
    return [levels[int(torch.randint(len(levels), (), generator=generator))] for levels in served]


def _parameter_groups(linears: Sequence[ElasticLinear], mixer: FeatureMixer, s: BlockSettings) -> list[dict]:
    groups = [{"params": [p for e in linears for p in (e.lora_A, e.lora_B)], "lr": s.adapter_lr}]
    if s.base_lr:
        groups.append({"params": [e.weight for e in linears], "lr": s.base_lr})
    if mixer.mode == "learned":
        groups.append({"params": [mixer.logits], "lr": s.mixer_lr})
    return groups


def train_block_(
    call: BlockCall,
    linears: Sequence[ElasticLinear],
    ladder: Ladder,
    streams: Sequence[Tensor],
    dense_STD: Tensor,
    target_STD: Tensor,
    mixer: FeatureMixer,
    settings: BlockSettings,
    generator: torch.Generator,
    where: str,
    autocast: Callable[[], torch.autocast],
) -> dict[str, float]:
    """Trains all groups of one block together.

    Args:
        call: the block; its linears are `linears`.
        streams: K tensors (S, T, D), the block's input at each group's level.
        dense_STD: the block's input in the dense model (used by the "dense" mixer only).
        target_STD: the dense block's output on the dense stream.
        where: name for error messages.
    Returns: mean loss of every level name over the last quarter of the steps.
    Raises: NumericsError: if a loss is not finite.
    """
    loss_of = BLOCK_LOSSES[settings.loss]
    for linear in linears:
        linear.weight.requires_grad_(bool(settings.base_lr))
    groups = _parameter_groups(linears, mixer, settings)
    optimizer = torch.optim.Adam(groups)
    top_rates = [group["lr"] for group in optimizer.param_groups]
    sums: dict[str, list[float]] = {}
    for step in range(settings.steps):
        for group, rate in zip(optimizer.param_groups, top_rates, strict=True):
            group["lr"] = rate * cosine(step, settings.steps, warmup=0.05)
        chosen = torch.randint(target_STD.shape[0], (settings.batch_size,), generator=generator)
        inputs = [stream[chosen] for stream in streams]
        densest: Tensor | None = None
        for level in draw_levels(ladder, generator):
            for linear in linears:
                linear.level = level
            with autocast():
                output = call(mixer(inputs, dense_STD[chosen], level.group))
            loss = loss_of(output, target_STD[chosen])
            if densest is None:
                densest = output.detach()
            elif settings.densest_weight:
                w = settings.densest_weight
                loss = (1 - w) * loss + w * loss_of(output, densest)
            if not torch.isfinite(loss):
                raise NumericsError(
                    f"{where}: loss of level {level.name} is {float(loss.detach())} at step {step}; lower "
                    "block.adapter_lr or block.base_lr, or set precision = 'float32'."
                )
            loss.backward()
            if step >= settings.steps * 3 // 4:
                sums.setdefault(level.name, []).append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def block_outputs(
    call: BlockCall,
    map_call: Callable[[BlockCall, Tensor], Tensor],
    linears: Sequence[ElasticLinear],
    ladder: Ladder,
    streams: Sequence[Tensor],
    dense_STD: Tensor,
    target_STD: Tensor,
    mixer: FeatureMixer,
    generator: torch.Generator,
) -> list[Tensor]:
    """The next block's streams: this block's output at one level of every group, each on that group's input."""
    if mixer.mode == "dense":
        return [target_STD] * ladder.num_groups
    outputs: list[Tensor] = []
    with torch.no_grad():
        for level in draw_levels(ladder, generator):
            for linear in linears:
                linear.level = level
            with merged_once(linears):
                outputs.append(map_call(call, mixer(streams, dense_STD, level.group)))
        if mixer.mode == "fixed":  # one stream serves all groups; keep one tensor, not K
            mixed = mixer(outputs, dense_STD, 0)
            outputs = [mixed] * len(outputs)
    for linear in linears:
        linear.level = None
    return outputs
