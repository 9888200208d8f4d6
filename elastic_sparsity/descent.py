"""Descent from an allocation: many moves at once along the loss's gradient, kept only where the loss really falls.

A search that tries moves blindly learns one thing from one evaluation. One backward pass prices every linear: what the
loss would change if it kept other numbers of weights, to first order (`Supernet.prices`). The best moves by these
prices are made together. What the last judgement found beyond the prices is charged to the next moves as a curvature,
the same for all linears: n quanta in or out of one linear cost `curvature` * n^2 more than their price. This is not in
the papers that allocating.py follows. Knows no model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elastic_sparsity.allocation import Kept, Trade
from elastic_sparsity.errors import ConfigError, NumericsError

BACKTRACK, RELAX = 4.0, 2.0  # the curvature rises by this factor after a refused step, and falls after a kept one
NOISE = 1e-9  # of a change of the loss: below it rounding could move one quantum to and fro for ever

Prices = Sequence[Sequence[float]]  # by linear: predicted change of the loss if it keeps 0, 1, ... I weights a row


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentSettings:
    """How far a descent goes.

    Attributes:
        steps: at most; each costs a judgement on all held-out text, and after a kept one also a gradient.
        radius: how much of a row one linear may gain or lose in a step.
        least_gain: share of the loss by which a step has to lower it; steps of less still count, as all that lower it.
        patience: steps of less in a row, after which a descent ends.
    """

    steps: int = 12
    radius: float = 0.15
    least_gain: float = 0.005
    patience: int = 3

    def __post_init__(self) -> None:
        if self.steps < 0 or self.patience < 1 or not 0 < self.radius <= 1 or not 0 <= self.least_gain < 1:
            raise ConfigError(
                "descent: steps must be >= 0, patience >= 1, 0 < radius <= 1 and 0 <= least_gain < 1, found "
                f"{self.steps}, {self.patience}, {self.radius}, {self.least_gain}."
            )


def settings_for(strength: float) -> DescentSettings:
    """For a run that goes `strength` of its plan's way: a plan that is used in part is searched less far.

    What the shorter search leaves out lowered the KL by 0 to 3 % in more than a third of the time
    (benchmarks/LOG.md, 2026-11-29).
    """
    return DescentSettings() if strength >= 1 else DescentSettings(least_gain=0.01, patience=2)


@dataclass(frozen=True, slots=True)
class Descended:
    """Where a descent stands.

    Attributes:
        kept: the best allocation so far.
        losses: of the start, and of every step's allocation, kept or refused.
        curvature: of the next step, in units of the loss.
        stalled: steps since the last one that gained enough.
    """

    kept: Kept
    losses: list[float]
    curvature: float = 0.0
    stalled: int = 0

    @property
    def loss(self) -> float:
        return min(self.losses)


def descend(
    start: Descended,
    judge: Callable[[Sequence[int]], float],
    prices: Callable[[Sequence[int]], Prices],
    move: Callable[[Kept, Prices, float], Kept],
    quanta: Sequence[float],
    settings: DescentSettings,
    on_step: Callable[[Descended], None] = lambda now: None,
) -> Descended:
    """Goes on from `start` until steps gain too little, nothing is left to gain, or the steps are used up.

    Args:
        judge: loss of an allocation; lower is better.
        prices: of an allocation, see `Prices`; asked for anew only after a step that was kept.
        move: the best allocation by (what is kept, prices, curvature), see `moved_by`; the same one if nothing pays.
        quanta: what counts as one quantum for the curvature, by linear.
    Raises: NumericsError: a loss is NaN.
    """
    now, found = start, None
    while len(now.losses) <= settings.steps and now.stalled < settings.patience:
        if found is None:
            found = prices(now.kept)
        kept = move(now.kept, found, now.curvature)
        if kept == now.kept:
            if not now.curvature:
                break
            now = replace(now, curvature=now.curvature / RELAX, stalled=now.stalled + 1)
            continue
        loss = judge(kept)
        if math.isnan(loss):
            raise NumericsError("descent: an allocation's loss is NaN; check the model and the calibration text.")
        is_better, losses = loss < now.loss, [*now.losses, loss]
        curvature = _measured_curvature(now, kept, loss, found, quanta)
        stalled = 0 if loss < (1 - settings.least_gain) * now.loss else now.stalled + 1
        if is_better:
            relaxed = min(curvature, now.curvature / RELAX) if now.curvature else curvature
            now, found = Descended(kept, losses, relaxed, stalled), None
        else:
            now = Descended(now.kept, losses, max(curvature, BACKTRACK * now.curvature), stalled)
        on_step(now)
    return now


def _measured_curvature(now: Descended, kept: Kept, loss: float, prices: Prices, quanta: Sequence[float]) -> float:
    """What a quantum's square cost beyond its price in this step."""
    predicted = sum(curve[k] - curve[before] for curve, k, before in zip(prices, kept, now.kept, strict=True))
    squares = sum(((k - before) / step) ** 2 for k, before, step in zip(kept, now.kept, quanta, strict=True))
    return max(0.0, (loss - now.loss - predicted) / squares)


def moved_by(
    kept: Sequence[int],
    prices: Prices,
    rules: Trade,
    low: Sequence[int],
    high: Sequence[int],
    radius: float,
    curvature: float,
) -> Kept:
    """The allocation after the best transfers by price, one quantum from one linear to another each, while they pay.

    Args:
        radius: share of a row that a linear may gain or lose; at least one quantum.
        curvature: n quanta in or out of one linear cost this times n^2 more than their price.
    """
    reach = [max(step, math.floor(radius * (len(curve) - 1))) for step, curve in zip(rules.steps, prices, strict=True)]
    least = [max(a, k - r) for a, k, r in zip(low, kept, reach, strict=True)]
    most = [min(b, k + r) for b, k, r in zip(high, kept, reach, strict=True)]
    moved = [0] * len(kept)  # quanta

    def change(i: int, sign: int) -> float:
        """Of the loss, by one quantum more in or out of linear i; infinite if it may not."""
        before, after = (kept[i] + n * rules.steps[i] for n in (moved[i], moved[i] + sign))
        if not least[i] <= after <= most[i]:
            return math.inf
        return prices[i][after] - prices[i][before] + curvature * ((moved[i] + sign) ** 2 - moved[i] ** 2)

    for market in sorted(set(rules.market)):
        members = [i for i, m in enumerate(rules.market) if m == market]
        while len(members) > 1:
            gains, losses = (sorted((change(i, sign), i) for i in members)[:2] for sign in (1, -1))
            value, taker, giver = min((g + x, i, j) for g, i in gains for x, j in losses if i != j)
            if value >= -NOISE:
                break
            moved[taker] += 1
            moved[giver] -= 1
    return [k + n * step for k, n, step in zip(kept, moved, rules.steps, strict=True)]
