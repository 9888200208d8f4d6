"""Structured pruning of a whole model: heads and MLP channels leave, what stays is refitted, block after block.

Source: Tyr-the-Pruner (arXiv 2503.09657) for one target; baselines after FLAP (arXiv 2312.11983) and by magnitude. What
we changed: within a block the MLP already sees the pruned attention; a linear with a bias fits the bias too; FLAP's
global threshold is left out: how many units a block keeps is given. The next block's input comes from the
pruned block (released code of the paper passes on the dense one's by mistake, at nine times the perplexity).
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.importance import InputStatistics
from elastic_sparsity.structured_order import (
    Prefixes,
    damped_hessian,
    descending,
    fluctuation_scores,
    obs_order,
    prefixes,
)
from elastic_sparsity.structured_parts import (
    Kept,
    Part,
    add_output_biases_,
    parts_of,
    unit_norms,
)
from elastic_sparsity.structured_sizes import Sizes
from elastic_sparsity.wiring import linear_at

log = logging.getLogger(__name__)
Scores = Literal["obs", "flap", "magnitude"]
SCORES: tuple[str, ...] = get_args(Scores)


@torch.no_grad()
def prune_structured_(
    model: Any,
    token_ids_ST: Tensor,
    sizes: Sizes,
    *,
    scores: Scores = "obs",
    accumulate: bool = True,
    at_once: int = 1,
    damping: float = 0.01,
    batch_size: int = 4,
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Kept]:
    """Chooses the units that stay, and zeroes the columns that read the others; `sliced_model` then cuts these out.

    "obs": greedy order, exact least-squares refit. "flap": fluctuation scores, weights as they are, the mean of what
    goes moves into a bias, where the config has one. "magnitude": norm of a unit's weights, no calibration, no refit.

    Args:
        model: causal LM in float32, in eval mode.
        token_ids_ST: calibration samples.
        accumulate: a block is calibrated on the output of the pruned blocks before it; else of the dense ones.
        at_once: MLP channels that go before the costs of the rest are computed again.
        damping: of the input covariance, relative to its mean diagonal.
    Returns: the units that stay, a block each. The model is of full size yet; "flap" may have given it biases.
    Raises: ConfigError: unknown scores. NumericsError: bad statistics, or a covariance that does not factor.
    """
    check_scores(scores)
    blocks, config = decoder_blocks(model), model.config
    if scores == "magnitude":
        return [
            {part.name: _by_magnitude_(block, part, counts[part.name]) for part in parts_of(block, config)}
            for block, counts in zip(blocks, counts_by_block(sizes), strict=True)
        ]
    if scores == "flap":
        add_output_biases_(model)
    prefix = architecture_of(config.model_type).blocks
    runner = BlockRunner(model.base_model, list(blocks), token_ids_ST.to(model.device), batch_size)
    hidden = runner.first_hidden()
    kept: list[Kept] = []
    for index, (block, counts) in enumerate(zip(blocks, counts_by_block(sizes), strict=True)):
        call, where = runner.call(index), f"{prefix}.{index}"
        parts = parts_of(block, config)
        chosen = {part.name: torch.arange(len(part.units_UC)) for part in parts}
        parts = [part for part in parts if counts[part.name] < len(part.units_UC)]
        with autocast():
            dense = None if accumulate else runner.map(call, hidden)
        for together in ([part] for part in parts) if accumulate else [parts]:
            found = block_statistics(
                runner,
                call,
                {part.path: linear_at(block, part.path) for part in together},
                [hidden],
                gram=scores == "obs",
                means=True,
                autocast=autocast,
                where=where,
            )
            for part in together:
                statistics, name = found[part.path], f"{where}.{part.path}"
                if scores == "flap":
                    chosen[part.name] = _by_fluctuation_(block, part, counts[part.name], statistics)
                else:
                    step = at_once if part.name == "mlp" else 1
                    chosen[part.name] = _by_obs_(block, part, counts[part.name], statistics, damping, step, name)
        kept.append(chosen)
        with autocast():
            hidden = runner.map(call, hidden) if dense is None else dense
        on_block(index + 1, len(blocks))
    return kept


def check_scores(scores: str) -> None:
    """Raises: ConfigError: listing the known ones."""
    if scores not in SCORES:
        raise ConfigError(f"scores: {scores!r} is not one of {', '.join(SCORES)}.")


def counts_by_block(sizes: Sizes) -> list[dict[str, int]]:
    """How many units of a branch stay, by its name, a block each."""
    return [{"attention": g, "mlp": c} for g, c in zip(sizes.groups, sizes.channels, strict=True)]


def _by_obs_(
    block: nn.Module, part: Part, count: int, found: InputStatistics, damping: float, at_once: int, where: str
) -> Tensor:
    linear = linear_at(block, part.path)
    order_U, fit = ordered_fit(linear, part, found, damping, at_once, where)
    num_inputs = count * part.units_UC.shape[1]
    errors = fit.errors()
    log.info("%s: error %.4f of the output's energy", where, float(errors[num_inputs] / errors[0]))
    replace_linear_(linear, fit.weight_OI(num_inputs), found.mean_I)
    return order_U[:count].sort().values


def ordered_fit(
    linear: nn.Linear, part: Part, found: InputStatistics, damping: float, at_once: int, where: str
) -> tuple[Tensor, Prefixes]:
    """The greedy order of a branch's units, (U,) int64 on the CPU, and the refit of its last linear to every prefix.

    A linear with a bias takes the mean of what goes into the bias.
    """
    assert found.gram_II is not None
    mean_I = found.mean_I if linear.bias is not None else None
    hessian_II = damped_hessian(found.gram_II, damping, mean_I=mean_I, num_tokens=found.num_tokens, where=where)
    weight, units_UC = weight_OI(linear), part.units_UC
    order_U = obs_order(hessian_II, weight, units_UC, at_once=at_once, where=where).cpu()
    return order_U, prefixes(hessian_II, weight, units_UC[order_U].flatten(), where=where)


def _by_fluctuation_(block: nn.Module, part: Part, count: int, found: InputStatistics) -> Tensor:
    linear = linear_at(block, part.path)
    order_U = descending(fluctuation_scores(found.variance_I, weight_OI(linear), part.units_UC)).cpu()
    kept = order_U[:count].sort().values
    replace_linear_(linear, _without_others(linear, part, kept), found.mean_I)
    return kept


def _by_magnitude_(block: nn.Module, part: Part, count: int) -> Tensor:
    linear = linear_at(block, part.path)
    kept = descending(unit_norms(block, part)).cpu()[:count].sort().values
    replace_linear_(linear, _without_others(linear, part, kept), None)
    return kept


def _without_others(linear: nn.Linear, part: Part, kept: Tensor) -> Tensor:
    """(O, I): the weight with the columns of all other units zero."""
    weight = weight_OI(linear)
    result = torch.zeros_like(weight)
    columns = part.units_UC[kept].flatten().to(weight.device)
    result[:, columns] = weight[:, columns]
    return result


def replace_linear_(linear: nn.Linear, weight_new: Tensor, mean_I: Tensor | None) -> None:
    """Writes a weight; a bias takes what the change does to the mean output, if a mean is given."""
    weight = weight_OI(linear)
    if linear.bias is not None and mean_I is not None:
        linear.bias.add_((weight.double() - weight_new.double()) @ mean_I.to(weight.device))
    weight.copy_(weight_new)
