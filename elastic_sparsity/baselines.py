"""One-shot pruning of a whole model at one level: magnitude, Wanda, OBS scores, SparseGPT. The baselines of all tables.

Block by block, each block calibrated on the output of the already pruned ones, as the public implementations do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.ladder import Level, keep_count
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.sparsegpt import sparsegpt

METHODS = ("magnitude", "wanda", "obs", "sparsegpt")


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
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Prunes all linears of the decoder blocks to one level, in place.

    Args:
        channel_scales: what `induction` learned, by linear name; they scale the scores that choose the masks.
    Raises: ConfigError: unknown method. NumericsError: bad statistics.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}.")
    blocks = decoder_blocks(model)
    row = architecture_of(model.config.model_type)
    runner = BlockRunner(model.base_model, list(blocks), token_ids_ST.to(model.device), batch_size)
    hidden = runner.first_hidden()
    for index, block in enumerate(blocks):
        where = f"{row.blocks}.{index}"
        linears = {path: block.get_submodule(path) for path in row.linears}
        call = runner.call(index)
        gram = method in ("obs", "sparsegpt")
        found = block_statistics(runner, call, linears, [hidden], gram=gram, autocast=autocast, where=where)
        for path, linear in linears.items():
            weight = weight_OI(linear)
            scale_I = (channel_scales or {}).get(f"{where}.{path}")
            weight.copy_(pruned_weight(weight, found[path], level, method, damping, f"{where}.{path}", scale_I))
        with autocast():
            hidden = runner.map(call, hidden)
        on_block(index + 1, len(blocks))


def pruned_weight(
    weight: Tensor,
    statistics: InputStatistics,
    level: Level,
    method: str,
    damping: float,
    where: str,
    channel_scale_I: Tensor | None = None,
) -> Tensor:
    """One (O, I) weight pruned to a level, float32."""
    if method == "sparsegpt":
        assert statistics.gram_II is not None
        return sparsegpt(
            weight,
            statistics.gram_II,
            sparsity=level.sparsity,
            pattern=level.pattern,
            damping=damping,
            channel_scale_I=channel_scale_I,
            where=where,
        )
    scores = importance_scores(method, weight, statistics, damping, where, channel_scale_I)
    if level.pattern is not None:
        mask = pattern_mask(scores, *level.pattern)
    else:
        mask = mask_at(drop_levels(scores, [keep_count(weight.shape[1], level.sparsity)]), 0)
    return torch.where(mask, weight.float(), 0.0)
