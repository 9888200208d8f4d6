"""Orders for N:M against all permutations of small matrices, and what holds for any."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.channel_order import _exchanged, _worth, improved_order, kept_share
from elastic_sparsity.errors import ShapeError

SHAPES = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])


def scores(rows, width, seed):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) ** 4


def kept_by_hand(matrix, order, kept, group_size):
    total = 0.0
    for row in matrix[:, order].tolist():
        for start in range(0, len(row), group_size):
            total += sum(sorted(row[start : start + group_size])[-kept:])
    return total / float(matrix.sum())


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_it_is_a_permutation_that_never_loses(shape, rows, groups, seed):
    matrix = scores(rows, groups * shape[1], seed)
    order = improved_order(matrix, *shape)
    assert torch.equal(order.sort().values, torch.arange(matrix.shape[1]))
    found = kept_share(matrix[:, order], *shape)
    assert found >= kept_share(matrix, *shape) - 1e-6
    assert found == pytest.approx(kept_by_hand(matrix, order, *shape), rel=1e-5)


def test_it_comes_near_the_best_of_all_orders():
    shares = []
    for seed in range(4):
        matrix = scores(3, 6, seed)
        best = max(kept_by_hand(matrix, list(order), 1, 3) for order in itertools.permutations(range(6)))
        shares.append(kept_share(matrix[:, improved_order(matrix, 1, 3, rounds=8)], 1, 3) / best)
    assert min(shares) > 0.9
    assert max(shares) > 0.999


def test_strong_neighbours_are_parted():
    """Two groups, all strength in the first: half of it is lost until both strong pairs are parted."""
    matrix = torch.tensor([[4.0, 3.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    assert kept_share(matrix, 2, 4) == pytest.approx(7 / 11)
    assert kept_share(matrix[:, improved_order(matrix, 2, 4)], 2, 4) == pytest.approx(1.0)


@given(SHAPES, st.integers(0, 2**31), st.integers(0, 7))
def test_worth_is_the_kept_sum_up_to_a_number_of_the_group(shape, seed, place):
    kept, group_size = shape
    place %= group_size
    groups = scores(3, 3 * group_size, seed).reshape(3, 3, group_size)
    found = _worth(groups, place, kept)
    for group in range(3):
        sums = []
        for other in range(3):
            changed = groups[:, group].clone()
            changed[:, place] = groups[:, other, place]
            sums.append(float(changed.topk(kept, dim=1).values.sum()))
        differences = found[group] - torch.tensor(sums)
        assert torch.allclose(differences, differences[0].expand(3), atol=1e-5)


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_exchanges_never_lose(size, seed):
    worth = scores(size, size, seed)
    taken = _exchanged(worth)
    assert torch.equal(taken.sort().values, torch.arange(size))
    assert float(worth.gather(1, taken[:, None]).sum()) >= float(worth.diagonal().sum()) - 1e-5


def test_zeros_keep_all():
    assert kept_share(torch.zeros(2, 8), 2, 4) == 1.0
    assert torch.equal(improved_order(torch.zeros(2, 8), 2, 4), torch.arange(8))


def test_what_is_refused():
    with pytest.raises(ShapeError, match="multiple of the pattern's 4"):
        improved_order(torch.ones(2, 6), 2, 4)
    with pytest.raises(ShapeError, match="keeping 4 of 4"):
        improved_order(torch.ones(2, 8), 4, 4)
