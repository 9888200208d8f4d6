"""Allocations: exact budgets, bounds, nested levels, legal moves; and the cheap shapes."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.allocation import (
    Moves,
    Size,
    Trade,
    bounds,
    by_depth,
    by_outliers,
    fitted,
    from_the_middle,
    progressions,
    shifted,
    total,
    trade,
    uniform,
    weakened,
)
from elastic_sparsity.errors import ConfigError

SMOL = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
ODD = [(28 * 16, 640), (7 * 16, 640), (640, 448), (1920, 640), (640, 1920)]  # 28 heads; rows share a factor of 16
PRIME = [(101, 97), (103, 97), (97, 101)]  # no common quantum that is small


def sizes_of(shapes, blocks=3):
    return [Size(name=f"{b}.{i}", rows=o, width=w) for b in range(blocks) for i, (o, w) in enumerate(shapes)]


def families_of(sizes):
    """By type and by block, from the names that `sizes_of` gives."""
    groups = [{}, {}]
    for i, size in enumerate(sizes):
        for family, key in zip(groups, reversed(size.name.split(".")), strict=True):
            family.setdefault(key, []).append(i)
    return tuple(tuple(map(tuple, family.values())) for family in groups)


MODELS = {"smol": sizes_of(SMOL), "odd": sizes_of(ODD), "prime": sizes_of(PRIME), "one": sizes_of(SMOL[:1], 1)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("coarse", [1, 2, 4])
def test_a_quantum_is_the_same_number_of_weights_within_a_market(model, coarse):
    sizes = MODELS[model]
    rules = trade(sizes, coarse=coarse)
    for market in set(rules.market):
        quanta = {s.rows * step for s, step, m in zip(sizes, rules.steps, rules.market, strict=True) if m == market}
        assert len(quanta) == 1
    assert all(step >= 1 for step in rules.steps)


def test_markets():
    assert set(trade(MODELS["smol"]).market) == {0}
    assert trade(MODELS["smol"]).steps[:7] == (16, 48, 48, 16, 6, 6, 16)
    assert len(set(trade(MODELS["prime"]).market)) == 3


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0.2, 0.8),
    times=st.integers(0, 40),
    coarse=st.sampled_from([1, 2, 4]),
    wide=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_moves_keep_the_budget_and_the_bounds(model, seed, sparsity, times, coarse, wide):
    sizes, chance = MODELS[model], random.Random(seed)
    kept = uniform(sizes, sparsity)
    low = [max(1, k - chance.randint(0, 90)) for k in kept]
    high = [min(s.width, k + chance.randint(0, 90)) for s, k in zip(sizes, kept, strict=True)]
    moves = Moves(trade=trade(sizes, coarse=coarse), families=families_of(sizes), wide=wide)
    moved = shifted(kept, moves, low, high, times, chance)
    assert total(sizes, moved) == total(sizes, kept)
    assert all(a <= k <= b for a, k, b in zip(low, moved, high, strict=True))


def test_no_legal_move_is_no_hang():
    sizes = MODELS["smol"]
    kept = uniform(sizes, 0.5)
    assert (
        shifted(
            kept, Moves(trade=trade(sizes), families=families_of(sizes), wide=0.5), kept, kept, 1000, random.Random(0)
        )
        == kept
    )
    one = MODELS["one"]
    assert shifted(
        [288], Moves(trade=trade(one), families=families_of(one), wide=0.5), [1], [576], 1000, random.Random(0)
    ) == [288]


def test_every_legal_move_is_found_and_no_other():
    """Three linears with steps of 2, 1 and 4; all results of one move."""
    rules = Trade(steps=(2, 1, 4), market=(0, 0, 0))
    kept, low, high = [4, 3, 8], [3, 1, 1], [6, 3, 12]
    expected = set()
    for giver, taker in itertools.permutations(range(3), 2):
        after = list(kept)
        after[giver] -= rules.steps[giver]
        after[taker] += rules.steps[taker]
        if all(a <= k <= b for a, k, b in zip(low, after, high, strict=True)):
            expected.add(tuple(after))
    found = {tuple(shifted(kept, Moves(trade=rules), low, high, 1, random.Random(seed))) for seed in range(300)}
    assert found == expected
    assert len(expected) == 3  # 0 and 2 can take, 1 and 2 can give


@settings(max_examples=100, deadline=None)
@given(model=st.sampled_from(sorted(MODELS)), slope=st.floats(-0.2, 0.2), sparsity=st.floats(0.3, 0.7))
def test_fitted_meets_the_budget_and_is_near_what_was_wanted(model, slope, sparsity):
    sizes = MODELS[model]
    depths = [int(size.name.partition(".")[0]) for size in sizes]
    base, rules = uniform(sizes, sparsity), trade(sizes)
    wanted = by_depth(sizes, depths, sparsity, slope)
    kept = fitted(wanted, base, rules, [1] * len(sizes), [size.width for size in sizes])
    assert total(sizes, kept) == total(sizes, base)
    if len(sizes) > 1:
        assert all(abs(k - w) <= 1.6 * step for k, w, step in zip(kept, wanted, rules.steps, strict=True))


def test_a_wide_move_by_hand():
    """Two types in three blocks: each block gives a quantum of one type to the other, but the last, which may not."""
    rules, families = Trade(steps=(2, 1) * 3, market=(0,) * 6), (((0, 2, 4), (1, 3, 5)),)
    kept, low, high = [8, 4] * 3, [1] * 4 + [8, 4], [9, 9] * 2 + [8, 4]
    moves = Moves(trade=rules, families=families, wide=1.0)
    found = {tuple(shifted(kept, moves, low, high, 1, random.Random(seed))) for seed in range(20)}
    assert found == {(6, 5, 6, 5, 8, 4), (8, 4, 8, 4, 8, 4)}  # the other way, 10 would be above 9


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 2**31),
    sparsities=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9]), min_size=1, max_size=5, unique=True),
)
def test_levels_stay_nested_and_never_get_stuck(model, seed, sparsities):
    """However far the levels before went, the next one finds its budget within the bounds that they leave."""
    sizes, chance, done = MODELS[model], random.Random(seed), {}
    sparsities = sorted(sparsities)
    for level in from_the_middle(len(sparsities)):
        low, high = bounds(sizes, done, level, sparsities)
        base = uniform(sizes, sparsities[level])
        done[level] = fitted([float(k) for k in base], base, trade(sizes), low, high)
        for coarse in (4, 2, 1):
            moves = Moves(trade=trade(sizes, coarse=coarse), families=families_of(sizes), wide=0.5)
            done[level] = shifted(done[level], moves, low, high, 100, chance)
        assert total(sizes, done[level]) == total(sizes, base)
    for denser, sparser in itertools.pairwise(sorted(done)):
        assert all(a >= b for a, b in zip(done[denser], done[sparser], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    slopes=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
def test_progressions_are_nested_and_of_the_budget_whatever_the_slopes(model, slopes):
    sizes, sparsities = MODELS[model], [0.5, 0.6, 0.7]
    depths = [int(size.name.partition(".")[0]) for size in sizes]
    levels = progressions(sizes, depths, sparsities, slopes)
    for kept, sparsity in zip(levels, sparsities, strict=True):
        assert total(sizes, kept) == total(sizes, uniform(sizes, sparsity))
        assert all(1 <= k <= size.width for k, size in zip(kept, sizes, strict=True))
    for denser, sparser in itertools.pairwise(levels):
        assert all(a >= b for a, b in zip(denser, sparser, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    slopes=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    strength=st.floats(0, 1),
)
def test_weakened_levels_are_nested_of_the_budget_and_in_between(model, slopes, strength):
    sizes, sparsities = MODELS[model], [0.5, 0.6, 0.7]
    depths = [int(size.name.partition(".")[0]) for size in sizes]
    levels = progressions(sizes, depths, sparsities, slopes)
    flat = [uniform(sizes, sparsity) for sparsity in sparsities]
    found = weakened(levels, sizes, sparsities, strength)
    for kept, base in zip(found, flat, strict=True):
        assert total(sizes, kept) == total(sizes, base)
    for denser, sparser in itertools.pairwise(found):
        assert all(a >= b for a, b in zip(denser, sparser, strict=True))
    assert weakened(levels, sizes, sparsities, 0) == flat
    assert weakened(levels, sizes, sparsities, 1) == levels
    steps = trade(sizes).steps
    for kept, base, whole in zip(found, flat, levels, strict=True):
        for k, b, w, step in zip(kept, base, whole, steps, strict=True):
            assert min(b, w) - 2 * step <= k <= max(b, w) + 2 * step


def test_a_dense_neighbour_takes_no_room_away():
    """Level 0 keeps all: the other may go anywhere between one weight a row and all of them."""
    sizes = sizes_of([(8, 96), (8, 96)], 2)
    assert trade(sizes).steps == (3,) * 4
    assert bounds(sizes, {}, 1, [0.0, 0.5]) == ([1] * 4, [96] * 4)
    # From 48, down to the uniform 10 of the other in 12 quanta, and the other follows for 3 more.
    assert bounds(sizes, {}, 0, [0.5, 0.9]) == ([3] * 4, [96] * 4)


def test_the_middle_comes_first():
    assert from_the_middle(1) == [0]
    assert from_the_middle(3) == [1, 2, 0]
    assert from_the_middle(4) == [2, 1, 3, 0]


def test_shapes_over_depth_and_outliers():
    sizes, depths = sizes_of([(8, 100)], 3), [0, 1, 2]
    assert by_depth(sizes, depths, 0.5, 0.1) == pytest.approx([60, 50, 40])
    assert by_depth(sizes, depths, 0.5, -0.1) == pytest.approx([40, 50, 60])
    assert by_outliers(sizes, depths, 0.5, [0.1, 0.1, 0.4], spread=0.06) == pytest.approx([46, 46, 58])
    assert by_outliers(sizes, depths, 0.5, [0.2, 0.2, 0.2]) == pytest.approx([50, 50, 50])


def test_what_cannot_be_met():
    sizes = MODELS["smol"]
    base = uniform(sizes, 0.6)
    with pytest.raises(ConfigError, match="the budget cannot be met within the bounds"):
        fitted(base, base, trade(sizes), [1] * len(sizes), [k - 60 for k in base])
    with pytest.raises(ConfigError, match="leave no step between them"):
        fitted(base, base, trade(sizes), [k + 1 for k in base], [k + 2 for k in base])
    with pytest.raises(ConfigError, match="no linears"):
        trade([])
