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

from elastic_sparsity.activations import Activations
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A worker's part of the training, as plain data and functions: these modules know no process group.

    Attributes:
        places: its places in every batch; all of them if it is alone.
        num_samples: calibration samples of all workers together.
        mean: numbers to their means over all workers.
        mean_gradients_: averages the parameters' gradients over all workers.
    """

    places: range
    num_samples: int
    mean: Callable[[list[float]], list[float]] = list
    mean_gradients_: Callable[[list[Tensor]], None] = lambda parameters: None


def own_samples(num_samples: int, places: range, batch_size: int) -> list[int]:
    """The samples of a worker: sample s belongs to place s % batch_size of every batch."""
    return [sample for sample in range(num_samples) if sample % batch_size in places]


def draw_samples(share: Share, batch_size: int, generator: torch.Generator) -> Tensor:
    """One sample for each of the worker's places, as numbers among its own samples.

    Each place draws from its own samples only: what a step sees does not depend on how many workers share the places,
    nor does what the generator gives next. With fewer samples than places any place may draw any of them.
    """
    total = share.num_samples
    counts = [len(range(place, total, batch_size)) if total >= batch_size else total for place in range(batch_size)]
    drawn = [int(torch.randint(count, (), generator=generator)) for count in counts]
    if total < batch_size:
        return torch.tensor([drawn[place] for place in share.places])
    # Every round of batch_size samples holds one for each of the worker's places, in order (see `own_samples`).
    return torch.tensor([drawn[place] * len(share.places) + i for i, place in enumerate(share.places)])


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
    streams: Sequence[Activations],
    dense_STD: Activations,
    target_STD: Activations,
    mixer: FeatureMixer,
    settings: BlockSettings,
    generator: torch.Generator,
    where: str,
    autocast: Callable[[], torch.autocast],
    share: Share,
) -> dict[str, float]:
    """Trains all groups of one block together.

    Args:
        call: the block; its linears are `linears`.
        streams: K tensors (S, T, D), the block's input at each group's level.
        dense_STD: the block's input in the dense model (used by the "dense" mixer only).
        target_STD: the dense block's output on the dense stream.
        where: name for error messages.
        share: this worker's part of the work; `streams` hold its samples only.
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
        chosen = draw_samples(share, settings.batch_size, generator)
        inputs, dense, target = [stream[chosen] for stream in streams], dense_STD[chosen], target_STD[chosen]
        losses: dict[str, Tensor] = {}
        densest: Tensor | None = None
        for level in draw_levels(ladder, generator):
            for linear in linears:
                linear.level = level
            with autocast():
                output = call(mixer(inputs, dense, level.group))
            loss = loss_of(output, target)
            if densest is None:
                densest = output.detach()
            elif settings.densest_weight:
                w = settings.densest_weight
                loss = (1 - w) * loss + w * loss_of(output, densest)
            loss.backward()
            losses[level.name] = loss.detach()
        for name, value in zip(losses, share.mean([float(x) for x in losses.values()]), strict=True):
            if not math.isfinite(value):
                raise NumericsError(
                    f"{where}: loss of level {name} is {value} at step {step}; lower block.adapter_lr or "
                    "block.base_lr, or set precision = 'float32'."
                )
            if step >= settings.steps * 3 // 4:
                sums.setdefault(name, []).append(value)
        share.mean_gradients_([p for group in groups for p in group["params"]])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class _Mixed:
    """A group's input, mixed from all streams as it is read."""

    def __init__(self, mixer: FeatureMixer, streams: Sequence[Activations], dense: Activations, group: int) -> None:
        self.mixer, self.streams, self.dense, self.group = mixer, streams, dense, group

    def __getitem__(self, samples: slice) -> Tensor:
        if self.mixer.mode == "own":  # the others need not be read
            return self.streams[self.group][samples]
        return self.mixer([stream[samples] for stream in self.streams], self.dense[samples], self.group)


@torch.no_grad()
def block_outputs(
    call: BlockCall,
    batches: Sequence[slice],
    linears: Sequence[ElasticLinear],
    ladder: Ladder,
    streams: Sequence[Activations],
    dense_STD: Activations,
    target_STD: Activations,
    mixer: FeatureMixer,
    generator: torch.Generator,
    new: Callable[[int], Activations],
) -> list[Activations]:
    """The next block's streams: this block's output at one level of every group, each on that group's input.

    Args:
        batches: sample ranges that cover all samples.
        new: makes room for a group's output.
    Returns: one a group; equal objects where groups share a stream.
    """
    if mixer.mode == "dense":
        return [target_STD] * ladder.num_groups
    levels = draw_levels(ladder, generator)
    inputs = [_Mixed(mixer, streams, dense_STD, level.group) for level in levels]

    def set_level(level: Level) -> None:
        for linear in linears:
            linear.level = level

    if mixer.mode == "fixed":  # one stream serves all groups; keep one, not K
        mixed = new(0)
        for batch in batches:
            found = []
            for level, source in zip(levels, inputs, strict=True):
                set_level(level)
                found.append(call(source[batch]).to(mixed.dtype))
            mixed[batch] = mixer(found, dense_STD[batch], 0)
        outputs = [mixed] * len(levels)
    else:
        outputs = [new(level.group) for level in levels]
        for level, source, output in zip(levels, inputs, outputs, strict=True):
            set_level(level)
            with merged_once(linears):
                for batch in batches:
                    output[batch] = call(source[batch]).to(output.dtype)
    for linear in linears:
        linear.level = None
    return outputs
