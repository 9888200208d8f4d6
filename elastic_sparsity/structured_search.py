"""How many heads and channels every block should keep, by the loss on held-out text.

"equal" tries the divisions of the budget between attention and MLP that an ordinary config.json can say. "blocks" goes
on from the best of them: one backward pass prices all branches at once, the best counts within the budget are set
together and kept if the loss falls (`descent`). Tyr-the-Pruner (arXiv 2503.09657) searches by evolution over a few
sparsities a block; here any count is at hand, and the search is over in minutes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from elastic_sparsity.allocation import Kept
from elastic_sparsity.attention import training_attention
from elastic_sparsity.descent import Descended, DescentSettings, Prices, descend
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.sized import heads_may_differ
from elastic_sparsity.structured_parts import expressible_groups, sizes_for
from elastic_sparsity.structured_sizes import HELD_OUT, Sizes
from elastic_sparsity.supernet import TopKL
from elastic_sparsity.unit_budget import UnitBudget, moved_within
from elastic_sparsity.unit_net import UnitNet
from elastic_sparsity.wiring import wiring_of

Search = Literal["none", "equal", "blocks"]
SEARCHES: tuple[str, ...] = get_args(Search)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search found.

    Attributes:
        equal: held-out KL to the dense model by the key/value heads that every block keeps, before the real refit.
        losses: of the descent's start and of every step; empty without one.
    """

    sizes: Sizes
    equal: dict[int, float]
    losses: list[float]


def check_search(search: str, scores: str, num_samples: int) -> None:
    """Raises: ConfigError: unknown, of scores without a refit, or fewer samples than it needs."""
    if search not in SEARCHES:
        raise ConfigError(f"search: {search!r} is not one of {', '.join(SEARCHES)}.")
    if search == "none":
        return
    if scores != "obs":
        raise ConfigError(f"search: needs the exact refits of scores 'obs', found {scores!r}; leave the search out.")
    if num_samples <= HELD_OUT:
        raise ConfigError(
            f"search: {num_samples} calibration samples, of which {HELD_OUT} are held out to judge; raise samples."
        )


def search_sizes(
    model: Any,
    token_ids_ST: Tensor,
    sparsity: float,
    multiple: int,
    *,
    search: Literal["equal", "blocks"],
    damping: float,
    batch_size: int,
    autocast: Callable[[], Any],
    settings: DescentSettings | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Searched:
    """The counts to prune a model to; it is dense again at the end.

    Args:
        model: causal LM in float32, in eval mode.
        token_ids_ST: calibration samples; the last `HELD_OUT` judge, the others order and refit.
    Returns: counts of no more parameters than the best equal counts have.
    Raises: ConfigError: no counts meet the budget. NumericsError.
    """
    settings = settings or DescentSettings()
    start = sizes_for(model, sparsity, multiple)
    starts = [start, *(found for found in _equal_sizes(model, sparsity, multiple) if found != start)]
    net = UnitNet(model)
    with training_attention(model), fused_layers(model):
        loss = TopKL(model, token_ids_ST[-HELD_OUT:], autocast)
        net.score_(
            token_ids_ST[:-HELD_OUT], start, damping=damping, at_once=multiple, batch_size=batch_size,
            autocast=autocast, on_block=lambda done, total: progress("ordering units", done, total),
        )  # fmt: skip

        def judge(kept: Sequence[int]) -> float:
            net.apply_(kept)
            return loss(range(HELD_OUT))

        judged = [(judge(_kept(net, sizes)), sizes) for sizes in starts]
        equal = {sizes.groups[0]: found for found, sizes in judged}
        best_loss, best = min(judged, key=lambda found: found[0])
        losses: list[float] = []
        if search == "blocks":
            best, losses = _descended(net, best, best_loss, multiple, judge, loss, settings, progress)
    net.restore_()
    return Searched(sizes=best, equal=equal, losses=losses)


def _equal_sizes(model: Any, sparsity: float, multiple: int) -> list[Sizes]:
    found = []
    for groups in expressible_groups(model):
        try:
            found.append(sizes_for(model, sparsity, multiple, groups))
        except ConfigError:  # the MLP cannot make up for so many heads
            continue
    return found


def _kept(net: UnitNet, sizes: Sizes) -> Kept:
    counts = {"attention": sizes.groups, "mlp": sizes.channels}
    return [counts[name][depth] for name, depth in zip(net.names, net.depths, strict=True)]


def _descended(
    net: UnitNet,
    start: Sizes,
    loss_before: float,
    multiple: int,
    judge: Callable[[Sequence[int]], float],
    loss: TopKL,
    settings: DescentSettings,
    progress: Callable[[str, int, int], None],
) -> tuple[Sizes, list[float]]:
    kept = _kept(net, start)
    budget = _budget(net, kept, multiple)

    def prices(kept: Sequence[int]) -> Prices:
        net.apply_(kept)
        return [curve.tolist() for curve in net.prices(lambda: loss.backward(range(HELD_OUT)))]

    def move(kept: Kept, found: Prices, curvature: float) -> Kept:
        return moved_within(kept, found, budget, settings.radius, curvature)

    def on_step(now: Descended) -> None:
        progress(f"searching counts, KL {now.loss:.4f}", len(now.losses) - 1, settings.steps)

    found = descend(Descended(kept, [loss_before]), judge, prices, move, budget.quanta, settings, on_step)
    return _sizes(net, start, found.kept), found.losses


def _budget(net: UnitNet, kept: Kept, multiple: int) -> UnitBudget:
    free = heads_may_differ(wiring_of(net.model.config))
    fixed = [name == "attention" and not free for name in net.names]
    steps = [multiple if name == "mlp" else 1 for name in net.names]
    return UnitBudget(
        costs=tuple(net.costs),
        steps=tuple(steps),
        low=tuple(k if stays else step for k, stays, step in zip(kept, fixed, steps, strict=True)),
        high=tuple(k if stays else total for k, stays, total in zip(kept, fixed, net.totals, strict=True)),
        most=sum(cost * k for cost, k in zip(net.costs, kept, strict=True)),
    )


def _sizes(net: UnitNet, start: Sizes, kept: Kept) -> Sizes:
    groups, channels = list(start.groups), list(start.channels)
    for name, depth, count in zip(net.names, net.depths, kept, strict=True):
        (groups if name == "attention" else channels)[depth] = count
    gone = sum(cost * (total - k) for cost, total, k in zip(net.costs, net.totals, kept, strict=True))
    return Sizes(
        groups=tuple(groups),
        num_groups=start.num_groups,
        channels=tuple(channels),
        num_channels=start.num_channels,
        removed=gone,
        total=start.total,
    )
