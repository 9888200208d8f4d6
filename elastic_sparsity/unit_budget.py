"""The best numbers of units by their prices, within a budget of parameters. Numbers only, no model.

Units of attention and of the MLP cost different numbers of parameters, so they cannot be traded one for one as quanta
of weights are (`descent.moved_by`). Instead all branches choose for themselves at one price of a parameter, and the
price is the lowest at which together they stay within the budget (Lagrange's relaxation of the knapsack).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_sparsity.descent import Prices
from elastic_sparsity.errors import ConfigError

HALVINGS = 60  # of the interval in which the price of a parameter lies


def parameters(costs: Sequence[int], kept: Sequence[int]) -> int:
    """Of so many units of every branch."""
    return sum(cost * count for cost, count in zip(costs, kept, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitBudget:
    """What the branches may keep.

    Attributes:
        costs: parameters that go with one unit, by branch.
        steps: units of one quantum.
        low, high: least and most units.
        most: parameters that all units together may have.
    """

    costs: tuple[int, ...]
    steps: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    most: int

    def spent(self, kept: Sequence[int]) -> int:
        return parameters(self.costs, kept)

    @property
    def quanta(self) -> list[float]:
        """Units of every branch that have as many parameters as the smallest quantum of all."""
        smallest = min(cost * step for cost, step in zip(self.costs, self.steps, strict=True))
        return [smallest / cost for cost in self.costs]


def moved_within(kept: Sequence[int], prices: Prices, budget: UnitBudget, radius: float, curvature: float) -> list[int]:
    """The cheapest numbers of units in reach whose parameters are within the budget, or nearly.

    At a price of a parameter every branch is as cheap as it can be; what rounding to whole quanta then leaves of the
    budget is filled with single quanta, those that gain most for a parameter first.

    Args:
        prices: by branch, the predicted change of the loss if it kept 0, 1, ... U units.
        radius: share of a branch's units that it may gain or lose; at least one quantum.
        curvature: a change by n `quanta` costs this times n^2 more than its price.
    Raises: ConfigError: what is kept now is above the budget.
    """
    if budget.spent(kept) > budget.most:
        raise ConfigError(f"budget: {budget.spent(kept):,} parameters are kept, more than the {budget.most:,} allowed.")
    options = [_options(i, kept[i], prices[i], budget, radius, curvature) for i in range(len(kept))]

    def at(price: float) -> list[int]:
        return [
            min(found, key=lambda k: (found[k] + price * cost * k, k))
            for found, cost in zip(options, budget.costs, strict=True)
        ]

    if budget.spent(free := at(0.0)) <= budget.most:
        return free
    under, over = 0.0, 1.0
    while budget.spent(at(over)) > budget.most:  # ends: at a high price all keep the least in reach
        under, over = over, 2 * over
    for _ in range(HALVINGS):
        middle = (under + over) / 2
        under, over = (middle, over) if budget.spent(at(middle)) > budget.most else (under, middle)
    chosen = at(over)
    _fill_(chosen, options, budget)
    return chosen if _cost(chosen, options) <= _cost(kept, options) else list(kept)


def part_way(start: Sequence[int], end: Sequence[int], share: float, budget: UnitBudget) -> list[int]:
    """Numbers of units on the way from `start` to `end`, which spend the budget as far as whole quanta do.

    Branches of the smallest quantum (of the MLP) lie `share` of the way, all shifted alike to meet the budget; numbers
    of others (heads) are rounded towards `start`.

    Args:
        share: of the way, in [0, 1]; 0 is `start` and 1 is `end`, as they are.
    Returns: numbers within the budget, as `start` and `end` must be; `end` if rounding leaves no others.
    Raises: ConfigError: a share outside.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share of the way: expected 0 to 1, found {share}.")
    if share in (0, 1) or list(start) == list(end):
        return list(end if share else start)
    wanted = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
    kept = [a + math.trunc((w - a) / step) * step for a, w, step in zip(start, wanted, budget.steps, strict=True)]
    quanta = budget.quanta
    fine = [i for i, step in enumerate(budget.steps) if step == quanta[i]]
    while budget.spent(kept) > budget.most:
        over = [i for i in fine if kept[i] - budget.steps[i] >= budget.low[i]]
        if not over:
            return list(end)
        i = max(over, key=lambda i: ((kept[i] - wanted[i]) / quanta[i], -i))
        kept[i] -= budget.steps[i]
    while True:
        left = budget.most - budget.spent(kept)
        under = [i for i in fine if kept[i] + budget.steps[i] <= budget.high[i]
                 and budget.costs[i] * budget.steps[i] <= left]  # fmt: skip
        if not under:
            return kept
        i = max(under, key=lambda i: ((wanted[i] - kept[i]) / quanta[i], -i))
        kept[i] += budget.steps[i]


def _options(
    i: int, kept: int, curve: Sequence[float], budget: UnitBudget, radius: float, curvature: float
) -> dict[int, float]:
    """Predicted change of the loss by the number of units that branch i may keep next."""
    step, quantum = budget.steps[i], budget.quanta[i]
    reach = max(1, math.floor(radius * (len(curve) - 1) / step))
    counts = (kept + n * step for n in range(-reach, reach + 1))
    return {
        k: curve[k] - curve[kept] + curvature * ((k - kept) / quantum) ** 2
        for k in counts
        if budget.low[i] <= k <= budget.high[i]
    }


def _cost(kept: Sequence[int], options: Sequence[dict[int, float]]) -> float:
    return sum(found[k] for found, k in zip(options, kept, strict=True))


def _fill_(chosen: list[int], options: Sequence[dict[int, float]], budget: UnitBudget) -> None:
    """Adds quanta while they fit and pay."""
    while True:
        left, gains = budget.most - budget.spent(chosen), []
        for i, found in enumerate(options):
            more, cost = chosen[i] + budget.steps[i], budget.costs[i] * budget.steps[i]
            if more in found and cost <= left and found[more] < found[chosen[i]]:
                gains.append(((found[chosen[i]] - found[more]) / cost, -i))
        if not gains:
            return
        i = -max(gains)[1]
        chosen[i] += budget.steps[i]
