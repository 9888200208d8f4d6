"""DSnoT's moves: a slow row-by-row loop, kept counts, errors that only shrink."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.importance import InputStatistics, wanda_scores
from elastic_sparsity.mask_moves import moved_mask
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask


def problem(rows: int, width: int, seed: int, pattern=None):
    """Weight, Wanda's mask of half the weights, and statistics of inputs whose means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(200, width, generator=generator) * torch.rand(width, generator=generator) + 0.5
    statistics = InputStatistics(width, gram=False, means=True)
    statistics.update(x)
    scores = wanda_scores(weight, statistics.square_sum_I)
    mask = mask_at(drop_levels(scores, [width // 2]), 0) if pattern is None else pattern_mask(scores, *pattern)
    return weight, mask, statistics.mean_I.float(), statistics.variance_I.float(), statistics.square_sum_I.sqrt()


def by_hand(weight, mask, mean, variance, norm, pattern, moves, tolerance):
    """The same criteria with Python's loops over single numbers."""
    mask = mask.clone()
    for r in range(weight.shape[0]):
        moved: set[int] = set()
        share = [float(weight[r, i] * mean[i]) for i in range(weight.shape[1])]
        error = sum(s for i, s in enumerate(share) if not mask[r, i])
        for _ in range(moves):
            if abs(error) <= tolerance:
                break
            sign = 1 if error > 0 else -1
            grow = [i for i in range(len(share)) if not mask[r, i] and i not in moved and share[i] * sign > 0]
            if not grow:
                break
            grown = max(grow, key=lambda i: sign * share[i] / float(variance[i]))
            prune = [i for i in range(len(share)) if mask[r, i] and i not in moved]
            if pattern is None:
                prune = [i for i in prune if share[i] * sign < 0]
            else:
                prune = [i for i in prune if i // pattern[1] == grown // pattern[1]]
            if not prune:
                break
            pruned = min(prune, key=lambda i: abs(float(weight[r, i])) * float(norm[i]))
            after = error - share[grown] + share[pruned]
            if abs(after) >= abs(error):
                break
            mask[r, grown], mask[r, pruned], error = True, False, after
            moved |= {grown, pruned}
    return mask


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("moves", [1, 5, 50])
def test_equals_the_loop(pattern, moves):
    given_ = problem(12, 48, seed=moves, pattern=pattern)
    found = moved_mask(*given_, pattern=pattern, moves=moves, tolerance=0.05)
    assert torch.equal(found, by_hand(*given_, pattern, moves, 0.05))
    assert not torch.equal(found, given_[1])


def test_one_move_by_hand():
    """Pruned shares 3 and 1 leave an error of 4. Growing 3 and pruning the kept weight of share -1 leaves 0."""
    weight, mean = torch.tensor([[3.0, 1.0, -1.0, 9.0]]), torch.ones(4)
    mask = torch.tensor([[False, False, True, True]])
    found = moved_mask(weight, mask, mean, torch.ones(4), torch.ones(4))
    assert found.tolist() == [[True, False, False, True]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 8), groups=st.integers(1, 8), use_pattern=st.booleans())
def test_counts_stay_and_errors_shrink(seed, rows, groups, use_pattern):
    pattern = (2, 4) if use_pattern else None
    weight, mask, mean, variance, norm = problem(rows, 4 * groups, seed, pattern)
    before = mask.clone()
    found = moved_mask(weight, mask, mean, variance, norm, pattern=pattern, tolerance=0.0)
    assert torch.equal(mask, before)
    assert torch.equal(found.sum(1), before.sum(1))
    if pattern:
        assert (found.view(rows, -1, 4).sum(-1) == 2).all()
    errors = [(weight * mean * ~m).double().sum(1).abs() for m in (before, found)]
    assert (errors[1] <= errors[0] + 1e-5).all()


def test_nothing_to_gain():
    weight, mask, mean, variance, norm = problem(4, 16, 0)
    assert torch.equal(moved_mask(weight, mask, torch.zeros(16), variance, norm), mask)
    assert torch.equal(moved_mask(weight, mask, mean, variance, norm, tolerance=1e9), mask)
    assert torch.equal(moved_mask(weight, mask, mean, variance, norm, moves=0), mask)


def test_wrong_shapes():
    weight, mask, mean, variance, norm = problem(4, 16, 0)
    with pytest.raises(ShapeError, match=r"mask moves: weight \(4, 16\), mask \(4, 15\)"):
        moved_mask(weight, mask[:, 1:], mean, variance, norm)
    with pytest.raises(ShapeError, match=r"statistics \[\(16,\), \(15,\), \(16,\)\]"):
        moved_mask(weight, mask, mean, variance[1:], norm)
    with pytest.raises(ShapeError, match="input width 16 is no multiple of 6"):
        moved_mask(weight, mask, mean, variance, norm, pattern=(3, 6))
