"""Counts by prices within a budget: against brute force, and what always holds."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.unit_budget import UnitBudget, moved_within, part_way


def cost(kept, start, prices, budget, curvature):
    return sum(
        curve[k] - curve[s] + curvature * ((k - s) / quantum) ** 2
        for k, s, curve, quantum in zip(kept, start, prices, budget.quanta, strict=True)
    )


@st.composite
def problems(draw):
    count = draw(st.integers(1, 4))
    steps = tuple(draw(st.integers(1, 3)) for _ in range(count))
    totals = [step * draw(st.integers(1, 4)) for step in steps]
    costs = tuple(draw(st.integers(1, 20)) for _ in range(count))
    kept = [step * draw(st.integers(1, total // step)) for step, total in zip(steps, totals, strict=True)]
    prices = [[draw(st.floats(-1, 1)) for _ in range(total + 1)] for total in totals]
    most = sum(c * k for c, k in zip(costs, kept, strict=True)) + draw(st.integers(0, 30))
    budget = UnitBudget(costs=costs, steps=steps, low=steps, high=tuple(totals), most=most)
    return kept, prices, budget, draw(st.floats(0.1, 1)), draw(st.floats(0, 0.2))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_always_within_budget_reach_and_grid_and_never_dearer(problem):
    kept, prices, budget, radius, curvature = problem
    found = moved_within(kept, prices, budget, radius, curvature)
    assert budget.spent(found) <= budget.most
    for k, before, step, low, high, curve in zip(
        found, kept, budget.steps, budget.low, budget.high, prices, strict=True
    ):
        assert low <= k <= high and (k - before) % step == 0
        assert abs(k - before) <= max(step, radius * (len(curve) - 1))
    assert cost(found, kept, prices, budget, curvature) <= 1e-12


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_best_of_all_where_units_cost_alike_and_gain_less_and_less(data):
    """Convex curves and equal costs: Lagrange's price and the filling leave nothing to gain."""
    totals = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    gains = [sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)), reverse=True) for n in totals]
    prices = [[-sum(branch[:k]) for k in range(len(branch) + 1)] for branch in gains]
    kept = [data.draw(st.integers(1, n)) for n in totals]
    ones = (1,) * len(totals)
    budget = UnitBudget(costs=ones, steps=ones, low=ones, high=tuple(totals), most=sum(kept))
    found = moved_within(kept, prices, budget, 1.0, 0.0)
    best = min(
        cost(other, kept, prices, budget, 0.0)
        for other in itertools.product(*(range(1, n + 1) for n in totals))
        if sum(other) <= sum(kept)
    )
    assert cost(found, kept, prices, budget, 0.0) == pytest.approx(best, abs=1e-9)


def test_by_hand():
    """Heads cost 5, channels 1 each; the third head of the first branch is worth more than five channels."""
    budget = UnitBudget(costs=(5, 1), steps=(1, 1), low=(1, 1), high=(3, 10), most=20)
    heads = [9.0, 6.0, 4.0, 1.0]
    channels = [10 - k * 0.1 for k in range(11)]
    assert moved_within([2, 10], [heads, channels], budget, 1.0, 0.0) == [3, 5]
    assert moved_within([2, 10], [heads, channels], budget, 1.0, 1.0) == [2, 10], "dear by its curvature"
    assert moved_within([2, 10], [heads, channels], budget, 0.2, 0.0) == [2, 10], "five channels are out of reach"
    assert budget.quanta == [0.2, 1.0]


def test_a_budget_that_is_exceeded_is_named():
    budget = UnitBudget(costs=(5,), steps=(1,), low=(1,), high=(3,), most=9)
    with pytest.raises(ConfigError, match="10 parameters are kept, more than the 9 allowed"):
        moved_within([2], [[0.0] * 4], budget, 1.0, 0.0)


@settings(max_examples=200, deadline=None)
@given(problems(), st.data())
def test_part_of_the_way_spends_the_budget_and_lies_between(problem, data):
    start, _, budget, _, _ = problem
    ends = [
        data.draw(st.integers(1, high // step)) * step for high, step in zip(budget.high, budget.steps, strict=True)
    ]
    end = ends if budget.spent(ends) <= budget.most else start
    assert part_way(start, end, 0, budget) == start and part_way(start, end, 1, budget) == end
    found = part_way(start, end, data.draw(st.floats(0.01, 0.99)), budget)
    assert budget.spent(found) <= budget.most
    fine = [i for i, (step, quantum) in enumerate(zip(budget.steps, budget.quanta, strict=True)) if step == quantum]
    for i, (a, k, b) in enumerate(zip(start, found, end, strict=True)):
        assert budget.low[i] <= k <= budget.high[i] and (k - a) % budget.steps[i] == 0
        assert i in fine or min(a, b) <= k <= max(a, b)
        more = [*found[:i], k + budget.steps[i], *found[i + 1 :]]
        assert found in (start, end) or i not in fine or more[i] > budget.high[i] or budget.spent(more) > budget.most


def test_half_the_way_by_hand():
    """A head costs 10, a channel 1, channels go by 4: heads by one are rounded away, by two become one; 10 that a head
    gives go to the channels that are furthest below what was wanted, and no more than fits.
    """
    budget = UnitBudget(costs=(10, 10, 1, 1), steps=(1, 1, 4, 4), low=(1, 1, 4, 4), high=(4, 4, 40, 40), most=80)
    assert part_way([2, 2, 20, 20], [3, 1, 28, 12], 0.5, budget) == [2, 2, 24, 16]
    assert part_way([3, 3, 8, 8], [3, 1, 16, 24], 0.5, budget) == [3, 2, 12, 16]
    with pytest.raises(ConfigError, match="expected 0 to 1, found 2"):
        part_way([2, 2, 20, 20], [3, 1, 28, 12], 2, budget)
