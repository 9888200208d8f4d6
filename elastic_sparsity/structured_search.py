"""How many heads and channels every block should keep, by the loss on held-out text.

"equal" tries the divisions of the budget between attention and MLP that an ordinary config.json can say. "blocks" goes
on from the best of them: one backward pass prices all branches at once, the best counts within the budget are set
together and kept if the loss falls (`descent`). Where that ends is the best for the text that judges, and too far for
other text: the counts lie half the way to it (`STRENGTH`). Tyr-the-Pruner (arXiv 2503.09657) searches by evolution
over a few sparsities a block; here any count is at hand, and the search is over in minutes.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from elastic_sparsity.allocation import Kept
from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.attention import training_attention
from elastic_sparsity.descent import Descended, DescentSettings, Prices, descend
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.sized import heads_may_differ
from elastic_sparsity.structured_parts import expressible_groups, parts_of, sizes_for, unit_cost
from elastic_sparsity.structured_search_file import SearchFile, SearchState
from elastic_sparsity.structured_sizes import HELD_OUT, Sizes
from elastic_sparsity.supernet import TopKL
from elastic_sparsity.unit_budget import UnitBudget, moved_within, parameters, part_way
from elastic_sparsity.unit_net import UnitNet
from elastic_sparsity.wiring import wiring_of

log = logging.getLogger(__name__)
Search = Literal["equal", "blocks"]
SEARCHES: tuple[str, ...] = get_args(Search)
STRENGTH = 0.5
"""How far to go from equal counts to those of the descent. On text of another kind SmolLM2-135M gets better up to about
here and then worse again (benchmarks/README.md), though the KL on the text that judges falls all the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search found.

    Attributes:
        equal: held-out KL to the dense model by the key/value heads that every block keeps, before the real refit.
        losses: of the descent's start and of every step; empty without one.
        strength: how far the counts go from equal ones to those that the descent found.
    """

    sizes: Sizes
    equal: dict[int, float]
    losses: list[float]
    strength: float = STRENGTH

    def record(self) -> dict[str, Any]:
        """For a JSON file; the counts themselves are elsewhere."""
        equal = {str(groups): loss for groups, loss in self.equal.items()}
        found = {"held_out": HELD_OUT, "equal": equal, "losses": self.losses}
        return found | {"strength": self.strength} if self.losses else found


def check_search(search: str | None, scores: str, num_samples: int) -> None:
    """Raises: ConfigError: unknown, of scores without a refit, or fewer samples than it needs."""
    if search is None:
        return
    if search not in SEARCHES:
        raise ConfigError(f"search: {search!r} is not one of {', '.join(SEARCHES)}.")
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
    search: Search,
    damping: float,
    batch_size: int,
    autocast: Callable[[], Any],
    settings: DescentSettings | None = None,
    strength: float = STRENGTH,
    file: SearchFile | None = None,
    what: str = "blocks",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Searched:
    """The counts to prune a model to; it is dense again at the end, and frozen.

    Args:
        model: causal LM in float32, in eval mode.
        token_ids_ST: calibration samples; the last `HELD_OUT` judge, the others order and refit.
        strength: of search "blocks", from 0 to 1, see `Searched`.
        file: keeps every step; what an interrupted search left there is gone on from. The caller removes it.
        what: is searched, for the progress.
    Returns: counts that remove no fewer parameters than the counts by rule (`sizes_for`) do.
    Raises: ConfigError: no counts meet the budget, or too few samples. NumericsError. OutputError: the file is of
        another search, damaged, or cannot be written.
    """
    check_search(search, "obs", len(token_ids_ST))
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength: expected 0 to 1, found {strength}.")
    start = sizes_for(model, sparsity, multiple)
    starts = [start, *_other_starts(model, start, sparsity, multiple)]
    if search == "equal" and len(starts) == 1:  # heads that must stay leave no choice
        return Searched(sizes=start, equal={}, losses=[])
    net = UnitNet(model)
    state = None if file is None else _begun(file, net, starts)
    if state is None or not state.finished:
        try:
            state = _searched(
                net, token_ids_ST, starts, multiple, search, damping, batch_size, autocast,
                settings or DescentSettings(), file, state, what, progress,
            )  # fmt: skip
        finally:
            net.restore_()
    best = min(starts, key=lambda sizes: state.equal[str(sizes.groups[0])])
    kept = state.kept
    if search == "blocks":
        budget = _budget(net, _kept(net, best), parameters(net.costs, _kept(net, start)), multiple)
        kept = part_way(_kept(net, best), state.kept, strength, budget)
    return Searched(
        sizes=best if _kept(net, best) == kept else _sizes(net, start, kept),
        equal={int(groups): loss for groups, loss in state.equal.items()},
        losses=state.losses if search == "blocks" else [],
        strength=strength,
    )


def _begun(file: SearchFile, net: UnitNet, starts: Sequence[Sizes]) -> SearchState | None:
    """What an interrupted search left, if its counts are possible ones."""
    state = file.load()
    if state is None:
        return None
    most = parameters(net.costs, _kept(net, starts[0]))
    if len(state.kept) != len(net.totals) or any(
        not 1 <= count <= total for count, total in zip(state.kept, net.totals, strict=True)
    ):
        raise file.damaged("its counts are not this model's")
    if parameters(net.costs, state.kept) > most or state.equal.keys() != {str(x.groups[0]) for x in starts}:
        raise file.damaged("its counts do not keep the budget")
    return state


def _searched(
    net: UnitNet,
    token_ids_ST: Tensor,
    starts: Sequence[Sizes],
    multiple: int,
    search: Search,
    damping: float,
    batch_size: int,
    autocast: Callable[[], Any],
    settings: DescentSettings,
    file: SearchFile | None,
    begun: SearchState | None,
    what: str,
    progress: Callable[[str, int, int], None],
) -> SearchState:
    model = net.model

    def keep(state: SearchState) -> SearchState:
        if file is not None:
            file.save(state)
        return state

    with training_attention(model), fused_layers(model):
        loss = TopKL(model, token_ids_ST[-HELD_OUT:], autocast)
        net.score_(
            token_ids_ST[:-HELD_OUT], starts[0], damping=damping, at_once=multiple, batch_size=batch_size,
            autocast=autocast, on_block=lambda done, total: progress(f"ordering {what}", done, total),
        )  # fmt: skip

        def judge(kept: Sequence[int]) -> float:
            net.apply_(kept)
            found = loss(range(HELD_OUT))
            if not math.isfinite(found):
                raise NumericsError(f"search: the loss of some counts is {found}; check the model and the text.")
            return found

        state = begun
        if state is None:
            judged = [(judge(_kept(net, sizes)), sizes) for sizes in starts]
            best_loss, best = min(judged, key=lambda found: found[0])
            state = keep(
                SearchState(
                    made={} if file is None else file.made,
                    equal={str(sizes.groups[0]): found for found, sizes in judged},
                    kept=_kept(net, best),
                    losses=[best_loss],
                )
            )
        if search == "blocks":
            most = parameters(net.costs, _kept(net, starts[0]))
            state = _descended(net, state, most, multiple, judge, loss, settings, keep, what, progress)
    return keep(state.model_copy(update={"finished": True}))


def _other_starts(model: Any, start: Sizes, sparsity: float, multiple: int) -> list[Sizes]:
    """Equal counts of other numbers of heads, which remove no less than `start` does."""
    cost = unit_cost(decoder_blocks(model)[0], parts_of(decoder_blocks(model)[0], model.config)[-1])
    found = []
    for groups in expressible_groups(model):
        try:
            sizes = sizes_for(model, sparsity, multiple, groups)
        except ConfigError:  # the MLP cannot make up for so many heads
            continue
        depth = len(sizes.channels)
        more = max(0, -((sizes.removed - start.removed) // (multiple * cost * depth)))  # quanta, rounded up
        channels = sizes.channels[0] - more * multiple
        if groups != start.groups[0] and channels > 0:
            removed = sizes.removed + more * multiple * cost * depth
            found.append(replace(sizes, channels=(channels,) * depth, removed=removed))
    return found


def _kept(net: UnitNet, sizes: Sizes) -> Kept:
    counts = {"attention": sizes.groups, "mlp": sizes.channels}
    return [counts[name][depth] for name, depth in zip(net.names, net.depths, strict=True)]


def _descended(
    net: UnitNet,
    state: SearchState,
    most: int,
    multiple: int,
    judge: Callable[[Sequence[int]], float],
    loss: TopKL,
    settings: DescentSettings,
    keep: Callable[[SearchState], SearchState],
    what: str,
    progress: Callable[[str, int, int], None],
) -> SearchState:
    budget = _budget(net, state.kept, most, multiple)

    def prices(kept: Sequence[int]) -> Prices:
        net.apply_(kept)
        return [curve.tolist() for curve in net.prices(lambda: loss.backward(range(HELD_OUT)))]

    def move(kept: Kept, found: Prices, curvature: float) -> Kept:
        return moved_within(kept, found, budget, settings.radius, curvature)

    def with_step(now: Descended) -> SearchState:
        found = {"kept": now.kept, "losses": now.losses, "curvature": now.curvature, "stalled": now.stalled}
        return state.model_copy(update=found)

    def on_step(now: Descended) -> None:
        keep(with_step(now))
        log.info("counts of %s: step %d, KL %.4f, best %.4f", what, len(now.losses) - 1, now.losses[-1], now.loss)
        progress(f"counts of {what}", len(now.losses) - 1, settings.steps)

    start = Descended(state.kept, state.losses, state.curvature, state.stalled)
    return with_step(descend(start, judge, prices, move, budget.quanta, settings, on_step))


def _budget(net: UnitNet, kept: Kept, most: int, multiple: int) -> UnitBudget:
    free = heads_may_differ(wiring_of(net.model.config))
    fixed = [name == "attention" and not free for name in net.names]
    steps = [multiple if name == "mlp" else 1 for name in net.names]
    return UnitBudget(
        costs=tuple(net.costs),
        steps=tuple(steps),
        low=tuple(k if stays else step for k, stays, step in zip(kept, fixed, steps, strict=True)),
        high=tuple(k if stays else total for k, stays, total in zip(kept, fixed, net.totals, strict=True)),
        most=most,
    )


def _sizes(net: UnitNet, start: Sizes, kept: Kept) -> Sizes:
    groups, channels = list(start.groups), list(start.channels)
    for name, depth, count in zip(net.names, net.depths, kept, strict=True):
        (groups if name == "attention" else channels)[depth] = count
    gone = parameters(net.costs, net.totals) - parameters(net.costs, kept)
    return Sizes(
        groups=tuple(groups),
        num_groups=start.num_groups,
        channels=tuple(channels),
        num_channels=start.num_channels,
        removed=gone,
        total=start.total,
    )
