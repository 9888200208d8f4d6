"""One order of the residual channels for all blocks, chosen so that N:M masks lose less.

All linears that read the residual stream share the order of their input channels, so it is chosen for all of them at
once, once for the model. Exact, and free at inference: `residual` says how it is absorbed. Source: see
`channel_order`; that one order serves the whole model is ours.
Letters: D model width, R rows of weights, S samples, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, linears_of, weight_OI
from elastic_sparsity.calibrate import dense_statistics
from elastic_sparsity.channel_order import improved_order, kept_share
from elastic_sparsity.feature_stage import better, check_samples
from elastic_sparsity.fold_choice import RESIDUAL_ORDER, FoldResult, check_kinds
from elastic_sparsity.importance import wanda_scores
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.residual import check_residual, permute_residual_
from elastic_sparsity.wiring import wiring_of

NUMBERS = 1 << 24  # weights that choose, and as many that judge: all of a model's would take gigabytes


@torch.no_grad()
def choose_residual_order_(
    model: Any, token_ids_ST: Tensor, ladder: Ladder, held_out: int, autocast: Callable[[], Any]
) -> FoldResult:
    """Puts the residual channels into the order under which N:M masks lose the least, if any is better than theirs.

    An order is chosen by some of the rows of every linear, scored on some samples, and judged by other rows, scored on
    the held-out samples.

    Args:
        model: causal LM, whole in memory.
        token_ids_ST: the last `held_out` samples judge, the others choose.
    Returns: as errors, the share of the squared scores that each N:M level's masks drop.
    Raises: ConfigError: the ladder has no N:M level, too few samples. AbsorptionError, UnsupportedModelError: the model
        has no exact form of it.
    """
    check_kinds((RESIDUAL_ORDER,), ladder, (RESIDUAL_ORDER,))
    check_samples(len(token_ids_ST), held_out)
    check_residual(model)  # before the work
    patterns = {level.name: level.pattern for level in ladder.levels if level.pattern}
    given = len(token_ids_ST) - held_out
    stride = _stride(model)
    judges_RD = reader_scores(model, square_sums(model, token_ids_ST[given:], autocast), stride // 2, stride)
    choose_RD = reader_scores(model, square_sums(model, token_ids_ST[:given], autocast), 0, stride)
    before = {name: 1 - kept_share(judges_RD, *pattern) for name, pattern in patterns.items()}
    best, chosen, order_D = before, "none", None
    for tried in dict.fromkeys(patterns.values()):
        candidate_D = improved_order(choose_RD, *tried)
        errors = {name: 1 - kept_share(judges_RD[:, candidate_D], *pattern) for name, pattern in patterns.items()}
        if better(best, errors):
            best, chosen, order_D = errors, "{}:{}".format(*tried), candidate_D
    if order_D is not None:
        permute_residual_(model, order_D)
    return FoldResult(before=before, after=best, used=order_D is not None, kind=RESIDUAL_ORDER, chosen=chosen)


def square_sums(model: Any, token_ids_ST: Tensor, autocast: Callable[[], Any]) -> dict[str, Tensor]:
    """(D,) sums of squares of the inputs of every linear that reads the residual stream, by the linear's name."""
    found = dense_statistics(model, _readers(model), token_ids_ST, autocast)
    return {name: statistics.square_sum_I for name, statistics in found.items()}


@torch.no_grad()
def reader_scores(model: Any, sums: Mapping[str, Tensor], first: int, stride: int) -> Tensor:
    """(R, D) squared Wanda scores of every `stride`-th row from `first` of the linears in `sums`; each adds up to 1."""
    linears, parts = linears_of(model), []
    for name, square_sum_D in sums.items():
        scores_OD = wanda_scores(weight_OI(linears[name])[first::stride], square_sum_D).square()
        parts.append(scores_OD / scores_OD.sum().clamp_min(torch.finfo(scores_OD.dtype).tiny))
    return torch.cat(parts)


def _stride(model: Any) -> int:
    """At least 2, so that other rows are left to judge."""
    total = sum(weight_OI(linear).numel() for linear in _readers(model).values())
    return max(2, -(-total // NUMBERS))


def _readers(model: Any) -> dict[str, nn.Module]:
    """The linears that read the residual stream, by name."""
    row, prefix = wiring_of(model.config), architecture_of(model.config.model_type).blocks
    return {
        f"{prefix}.{index}.{path}": block.get_submodule(path)
        for index, block in enumerate(decoder_blocks(model))
        for path in (*row.attention_inputs, *row.mlp_inputs)
    }
