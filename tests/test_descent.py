"""The descent on toy losses whose prices are known: it falls, ends, keeps the budget, and goes on as if not stopped."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.allocation import Size, Trade, fitted, total, trade, uniform
from elastic_sparsity.descent import Descended, DescentSettings, descend, moved_by, settings_for
from elastic_sparsity.errors import ConfigError, NumericsError

SIZES = [Size(name=str(i), rows=16, width=64) for i in range(4)]
START = uniform(SIZES, 0.5)
RULES = trade(SIZES)
LOW, HIGH = [1] * 4, [64] * 4
WEIGHTS = (8.0, 4.0, 2.0, 1.0)  # what a kept weight is worth, with falling returns


def toy(kept):
    return sum(worth / count for worth, count in zip(WEIGHTS, kept, strict=False))


def exact_slopes(kept):
    """First order, as a gradient would have it: too hopeful about every step that is not small."""
    return [[-w / k**2 * (n - k) for n in range(65)] for w, k in zip(WEIGHTS, kept, strict=False)]


def run(start=None, judge=toy, prices=exact_slopes, rules=RULES, low=LOW, high=HIGH, **changes):
    begun = start or Descended(START, [judge(START)])
    wanted = DescentSettings(**{"steps": 40, "least_gain": 0.0, **changes})
    return descend(begun, judge, prices, mover(rules, low, high, wanted), rules.steps, wanted)


def mover(rules, low, high, wanted):
    return lambda kept, found, curvature: moved_by(kept, found, rules, low, high, wanted.radius, curvature)


def test_reaches_the_best_of_all_allocations_nearly():
    step = RULES.steps[0]
    choices = [range(START[0] % step or step, 65, step)] * 4
    best = min(toy(kept) for kept in itertools.product(*choices) if sum(kept) == sum(START))
    found = run()
    assert best <= found.loss == toy(found.kept)
    assert found.loss - best < 0.1 * (toy(START) - best)
    assert total(SIZES, found.kept) == total(SIZES, START)


def test_the_start_stays_where_nothing_gets_better():
    for patience in (1, 2):
        wrong = run(prices=lambda kept: [[-x for x in curve] for curve in exact_slopes(kept)], patience=patience)
        assert wrong.kept == START
        assert wrong.stalled == patience == len(wrong.losses) - 1
    flat = run(prices=lambda kept: [[0.0] * 65] * 4)
    assert (flat.kept, flat.losses) == (START, [toy(START)])


def test_prices_are_asked_for_once_a_kept_step():
    asked = []

    def prices(kept):
        asked.append(list(kept))
        return exact_slopes(kept)

    found = run(prices=prices)
    assert len({tuple(kept) for kept in asked}) == len(asked)
    assert len(asked) <= 1 + len(found.losses)


def test_what_a_step_cost_beyond_its_prices_is_charged_to_the_next():
    first = run(steps=1)
    moved = [(k - s) / step for k, s, step in zip(first.kept, START, RULES.steps, strict=True)]
    predicted = sum(curve[k] - curve[s] for curve, k, s in zip(exact_slopes(START), first.kept, START, strict=True))
    excess = toy(first.kept) - toy(START) - predicted
    assert first.curvature == pytest.approx(excess / sum(n * n for n in moved))
    assert first.curvature > 0
    prices = exact_slopes(START)
    reaches = [
        sum(abs(k - s) for k, s in zip(moved_by(START, prices, RULES, LOW, HIGH, 0.5, c), START, strict=True))
        for c in (0.0, first.curvature, 1.0)
    ]
    assert reaches[0] > reaches[1] > reaches[2] == 0


def test_a_refused_step_makes_the_next_one_shorter():
    seen = []
    begun = Descended(START, [toy(START)], curvature=1e-3)
    wanted = DescentSettings(steps=3, patience=3)
    worse = lambda kept: toy(START) + 1e-6 * sum(a != b for a, b in zip(kept, START, strict=True))  # noqa: E731
    hopeful = mover(RULES, LOW, HIGH, wanted)
    descend(begun, worse, lambda kept: [[-x for x in curve] for curve in exact_slopes(kept)],
            hopeful, RULES.steps, wanted, seen.append)  # fmt: skip
    curvatures = [now.curvature for now in seen]
    assert len(seen) >= 2 and all(now.kept == START for now in seen)
    assert all(b >= 4 * a for a, b in itertools.pairwise([1e-3, *curvatures]))


def test_goes_on_from_any_step_as_if_it_had_not_stopped():
    kept: list[Descended] = []
    begun = Descended(START, [toy(START)])
    wanted = DescentSettings(steps=40, least_gain=0.0)
    whole = descend(begun, toy, exact_slopes, mover(RULES, LOW, HIGH, wanted), RULES.steps, wanted, kept.append)
    assert len(kept) == len(whole.losses) - 1 > 3
    for state in kept:
        assert run(start=state) == whole


@pytest.mark.parametrize("count", [0, 1, 2])
def test_ends_on_the_smallest_models(count):
    sizes = SIZES[:count]
    rules = trade(sizes) if count else Trade(steps=(), market=())
    start = uniform(sizes, 0.5)
    wanted = DescentSettings(steps=20)
    move = mover(rules, LOW[:count], HIGH[:count], wanted)
    found = descend(Descended(start, [toy(start)]), toy, exact_slopes, move, rules.steps, wanted)
    assert sum(found.kept) == sum(start)
    assert (found.kept == start) == (count < 2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_transfers_keep_the_budget_the_bounds_and_the_reach_and_pay(data):
    count = data.draw(st.integers(1, 6))
    sizes = [
        Size(name=str(i), rows=data.draw(st.sampled_from([8, 16, 24])), width=data.draw(st.sampled_from([32, 64, 96])))
        for i in range(count)
    ]
    rules, base = trade(sizes), uniform(sizes, 0.5)
    low = [data.draw(st.integers(1, kept)) for kept in base]
    high = [data.draw(st.integers(kept, size.width)) for kept, size in zip(base, sizes, strict=True)]
    numbers = st.floats(-1, 1, allow_nan=False)
    prices = [data.draw(st.lists(numbers, min_size=s.width + 1, max_size=s.width + 1)) for s in sizes]
    radius, curvature = data.draw(st.floats(0.01, 1)), data.draw(st.floats(0, 0.5))
    moved = moved_by(base, prices, rules, low, high, radius, curvature)
    assert total(sizes, moved) == total(sizes, base)
    assert fitted([float(k) for k in moved], base, rules, low, high) == moved  # whole quanta, within the bounds
    for k, b, size, step in zip(moved, base, sizes, rules.steps, strict=True):
        assert abs(k - b) <= max(step, radius * size.width)
    value = sum(
        curve[k] - curve[b] + curvature * ((k - b) / step) ** 2
        for curve, k, b, step in zip(prices, moved, base, rules.steps, strict=True)
    )
    assert value <= 0
    assert (value < 0) == (moved != base)


def test_ends_when_steps_gain_little_and_keeps_what_they_gained():
    whole, short = run(), run(least_gain=0.02, patience=1)
    count = len(short.losses)
    assert 2 < count < len(whole.losses)
    assert short.losses == whole.losses[:count]
    gains = [1 - b / min(short.losses[: i + 1]) for i, b in enumerate(short.losses[1:])]
    assert all(gain > 0.02 for gain in gains[:-1])
    assert gains[-1] <= 0.02
    assert short.loss == toy(short.kept)


def test_a_plan_that_is_used_in_part_is_searched_less():
    whole, half = settings_for(1.0), settings_for(0.5)
    assert whole == DescentSettings()
    assert half.least_gain > whole.least_gain and half.patience < whole.patience and half.steps == whole.steps


def test_what_is_refused():
    with pytest.raises(NumericsError, match="loss is NaN"):
        run(start=Descended(START, [1.0]), judge=lambda kept: math.nan)
    for wrong in ({"steps": -1}, {"radius": 0.0}, {"radius": 1.5}, {"patience": 0}, {"least_gain": 1.0}):
        with pytest.raises(ConfigError, match="descent: steps must be"):
            DescentSettings(**wrong)
