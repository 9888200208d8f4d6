"""One-shot pruning of a whole model at one level: magnitude, Wanda, RIA, OBS, DSnoT, SparseGPT: all tables' baselines.

Block by block, each block calibrated on the output of the already pruned ones, as the public implementations do.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import Architecture, architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.ladder import Level, keep_count
from elastic_sparsity.mask_moves import moved_mask
from elastic_sparsity.masks import WHOLE_MATRIX, drop_levels, mask_at, matrix_mask, pattern_mask
from elastic_sparsity.sparsegpt import sparsegpt

LEARNED_UPDATE = 0.5
"""How much of SparseGPT's update is applied to weights under learned masks, see `prune_one_shot_`."""

METHODS = ("magnitude", "wanda", "ria", "obs", "dsnot", "sparsegpt")


@torch.no_grad()
def prune_one_shot_(
    model: Any,
    token_ids_ST: Tensor,
    level: Level,
    method: str,
    *,
    damping: float = 0.01,
    batch_size: int = 4,
    channel_scales: Mapping[str, Tensor] | None = None,
    allocation: Mapping[str, int] | None = None,
    update: float = LEARNED_UPDATE,
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Prunes all linears of the decoder blocks to one level, in place.

    Args:
        channel_scales: what `induction` learned, by linear name; they scale the scores that choose the masks. SparseGPT
            then takes the masks of Wanda's scores, scaled, and updates what they keep: masks that were learned through
            the whole model do better than those it chooses layer by layer.
        allocation: weights kept a row by linear name, instead of the level's sparsity everywhere; unstructured only.
        update: how much of SparseGPT's change of the kept weights is applied on learned masks, 0 to 1: these were
            learned with unchanged weights, and a whole step to the layer's own optimum on a few samples undoes a part
            of what they gained (benchmarks/LOG.md, 2026-11-28). On masks of its own all of it is, as in the paper.
    Raises: ConfigError: unknown method, or an allocation of N:M. NumericsError: bad statistics.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}.")
    if allocation and level.pattern:
        raise ConfigError(
            f"level {level.name}: an N:M pattern keeps as much in every linear; leave the allocation out."
        )
    blocks = decoder_blocks(model)
    row = architecture_of(model.config.model_type)
    runner = BlockRunner(model.base_model, list(blocks), token_ids_ST.to(model.device), batch_size)
    for index, found in enumerate(_statistics(runner, blocks, row, method, autocast)):
        for path in row.linears:
            weight = weight_OI(blocks[index].get_submodule(path))
            name = f"{row.blocks}.{index}.{path}"
            wanted_here = level
            if allocation:
                wanted_here = replace(level, sparsity=1 - allocation[name] / weight.shape[1])
            scale_I = (channel_scales or {}).get(name)
            weight.copy_(pruned_weight(weight, found[path], wanted_here, method, damping, name, scale_I, update))
        on_block(index + 1, len(blocks))


def _statistics(
    runner: BlockRunner, blocks: nn.ModuleList, row: Architecture, method: str, autocast: Callable[[], Any]
) -> Iterator[dict[str, InputStatistics]]:
    """What a method needs of the inputs of every block's linears, by path; blocks given out before are pruned by then.

    Magnitude looks at weights alone: no token runs, and its statistics are empty.
    """
    hidden = None if method == "magnitude" else runner.first_hidden()
    for index, block in enumerate(blocks):
        linears = {path: block.get_submodule(path) for path in row.linears}
        if hidden is None:
            yield {path: InputStatistics(weight_OI(x).shape[1], gram=False) for path, x in linears.items()}
            continue
        call, where = runner.call(index), f"{row.blocks}.{index}"
        gram, means = method in ("obs", "sparsegpt"), method == "dsnot"
        yield block_statistics(runner, call, linears, [hidden], gram=gram, means=means, autocast=autocast, where=where)
        if index + 1 < len(blocks):
            with autocast():
                hidden = runner.map(call, hidden)


def pruned_weight(
    weight: Tensor,
    statistics: InputStatistics,
    level: Level,
    method: str,
    damping: float,
    where: str,
    channel_scale_I: Tensor | None = None,
    update: float = LEARNED_UPDATE,
) -> Tensor:
    """One (O, I) weight pruned to a level, float32."""
    if method == "sparsegpt" and (channel_scale_I is None or bool((channel_scale_I == 1).all())):  # nothing learned
        return _updated(weight, statistics, level, damping, where, None)
    scored = "wanda" if method in ("dsnot", "sparsegpt") else method
    scores = importance_scores(scored, weight, statistics, damping, where, channel_scale_I)
    if level.pattern is not None:
        mask = pattern_mask(scores, *level.pattern)
    elif method in WHOLE_MATRIX:
        mask = matrix_mask(scores, level.sparsity)
    else:
        mask = mask_at(drop_levels(scores, [keep_count(weight.shape[1], level.sparsity)]), 0)
    if method == "dsnot":
        norm_I = statistics.square_sum_I.sqrt()
        mask = moved_mask(weight, mask, statistics.mean_I, statistics.variance_I, norm_I, pattern=level.pattern)
    kept = torch.where(mask, weight.float(), 0.0)
    if method == "sparsegpt":
        return torch.lerp(kept, _updated(weight, statistics, level, damping, where, mask), update)
    return kept


def _updated(
    weight: Tensor, statistics: InputStatistics, level: Level, damping: float, where: str, keep_OI: Tensor | None
) -> Tensor:
    assert statistics.gram_II is not None
    return sparsegpt(
        weight, statistics.gram_II, sparsity=level.sparsity, pattern=level.pattern, damping=damping, keep_OI=keep_OI,
        where=where,
    )  # fmt: skip
