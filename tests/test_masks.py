"""Masks: nested, exact counts, ties by index, N:M groups, and bits that come back as they were."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.masks import drop_levels, mask_at, matrix_mask, pattern_mask
from elastic_sparsity.packing import pack_bits, unpack_bits

SEEDS = st.integers(0, 2**31 - 1)


def tied_scores(rows: int, width: int, seed: int) -> torch.Tensor:
    """Scores from few values, so that most of them are tied."""
    return torch.randint(0, 4, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def test_drop_levels_by_hand():
    scores = torch.tensor([[5.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    # Row 0 ranks columns 0, 2, 3, 1; row 1 is all ties, so the first indices win.
    expected = torch.tensor([[3, 0, 2, 1], [3, 2, 1, 0]], dtype=torch.uint8)
    found = drop_levels(scores, [3, 2, 1])
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
    assert mask_at(found, 1).tolist() == [[True, False, True, False], [True, True, False, False]]


def test_level_zero_without_sparsity_keeps_all():
    scores = tied_scores(3, 7, 0)
    assert mask_at(drop_levels(scores, [7, 2]), 0).all()


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_masks_are_nested_exact_and_break_ties_by_index(seed, rows, width, data):
    counts = sorted(data.draw(st.lists(st.integers(1, width), min_size=1, max_size=5)), reverse=True)
    scores = tied_scores(rows, width, seed)
    levels = drop_levels(scores, counts)
    previous = torch.ones(rows, width, dtype=torch.bool)
    for level, count in enumerate(counts):
        mask = mask_at(levels, level)
        for row in range(rows):
            ranked = sorted(range(width), key=lambda i: (-float(scores[row, i]), i))
            assert mask[row].nonzero().flatten().tolist() == sorted(ranked[:count])
        assert not (mask & ~previous).any()
        previous = mask


def test_scores_are_not_modified_and_may_be_a_transposed_view():
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).abs()
    before = scores.clone()
    found = drop_levels(scores.T, [4, 2])
    assert torch.equal(scores, before)
    assert torch.equal(found, drop_levels(scores.T.contiguous(), [4, 2]))


def test_pattern_mask_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 9.0]])
    assert pattern_mask(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1]]
    within = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    assert pattern_mask(scores, 2, 4, within).int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 1]]


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8), (1, 5)]))
@settings(max_examples=60, deadline=None)
def test_patterns_keep_the_best_of_every_group(seed, rows, num_groups, pattern):
    kept, size = pattern
    scores = tied_scores(rows, num_groups * size, seed)
    mask = pattern_mask(scores, kept, size)
    for row in range(rows):
        for start in range(0, num_groups * size, size):
            ranked = sorted(range(start, start + size), key=lambda i: (-float(scores[row, i]), i))
            assert (mask[row, start : start + size].nonzero().flatten() + start).tolist() == sorted(ranked[:kept])


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([(1, 2), (2, 4), (4, 8)]))
@settings(max_examples=60, deadline=None)
def test_patterns_within_a_mask_stay_inside_and_fill_what_they_can(seed, rows, num_groups, pattern):
    kept, size = pattern
    scores = tied_scores(rows, num_groups * size, seed)
    generator = torch.Generator().manual_seed(seed)
    within = torch.randint(0, 2, scores.shape, generator=generator).bool()
    mask = pattern_mask(scores, kept, size, within)
    assert not (mask & ~within).any()
    counts = mask.reshape(rows, -1, size).sum(-1)
    assert torch.equal(counts, within.reshape(rows, -1, size).sum(-1).clamp_max(kept))
    worst_kept = scores.masked_fill(~mask, float("inf")).reshape(rows, -1, size).amin(-1)
    best_left = scores.masked_fill(mask | ~within, float("-inf")).reshape(rows, -1, size).amax(-1)
    assert (worst_kept >= best_left).all()


def test_bits_by_hand():
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    # First byte 1 + 16 + 128, least significant bit first; second byte holds bit 8, then zeros.
    assert pack_bits(mask).tolist() == [145, 1]
    assert unpack_bits(torch.tensor([145, 1], dtype=torch.uint8), 10).tolist() == mask.flatten().tolist()


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=100, deadline=None)
def test_bits_come_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-len(bits) // 8),)
    assert packed.tolist() == [sum(bit << k for k, bit in enumerate(bits[s : s + 8])) for s in range(0, len(bits), 8)]
    assert torch.equal(unpack_bits(packed, len(bits)), mask)


def test_packing_reads_a_transposed_mask_row_by_row():
    mask = torch.randint(0, 2, (5, 7), generator=torch.Generator().manual_seed(1)).bool()
    assert torch.equal(unpack_bits(pack_bits(mask.T), 35), mask.T.reshape(-1))


@pytest.mark.parametrize("counts", [[5], [0], [2, 3], [1] * 255])
def test_bad_keep_counts(counts):
    with pytest.raises(
        ShapeError, match=r"keep_counts: \[.*\] must be non-increasing, within \[1, 4\] and at most 254"
    ):
        drop_levels(torch.ones(2, 4), counts)


@pytest.mark.parametrize("select", [lambda s: drop_levels(s, [1]), lambda s: pattern_mask(s, 1, 2)])
def test_bad_scores(select):
    with pytest.raises(ShapeError, match=r"scores: expected a matrix \(outputs, inputs\), found shape \(4,\)"):
        select(torch.ones(4))
    with pytest.raises(NumericsError, match="scores: found NaN; check the weights and the calibration statistics"):
        select(torch.tensor([[1.0, float("nan")]]))


def test_a_width_that_no_group_divides():
    message = "pattern 2:4: input width 6 is no multiple of 4; leave this linear out or drop the pattern"
    with pytest.raises(ShapeError, match=re.escape(message)):
        pattern_mask(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize(
    ("packed", "length", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), 9, "packed mask: expected 2 uint8 for 9 bits, found (1,) torch.uint8."),
        (torch.zeros(3, dtype=torch.uint8), 9, "packed mask: expected 2 uint8 for 9 bits, found (3,) torch.uint8."),
        (torch.zeros(2), 9, "packed mask: expected 2 uint8 for 9 bits, found (2,) torch.float32."),
        (torch.zeros(1, 2, dtype=torch.uint8), 9, "packed mask: expected 2 uint8 for 9 bits, found (1, 2)"),
        (torch.tensor([0, 2], dtype=torch.uint8), 9, "packed mask: padding bits after the last weight are set."),
    ],
)
def test_bad_bits(packed, length, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        unpack_bits(packed, length)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 6), width=st.integers(1, 9), sparsity=st.floats(0, 0.99))
def test_matrix_mask_keeps_the_highest_of_all(seed, rows, width, sparsity):
    scores = tied_scores(rows, width, seed)
    mask = matrix_mask(scores, sparsity)
    gone = int(rows * width * sparsity)
    ranked = sorted(range(rows * width), key=lambda i: (-float(scores.flatten()[i]), i))
    expected = torch.zeros(rows * width, dtype=torch.bool)
    expected[ranked[: rows * width - gone]] = True
    assert torch.equal(mask.flatten(), expected)


def test_matrix_mask_refuses_nan():
    with pytest.raises(NumericsError, match="scores: found NaN"):
        matrix_mask(torch.tensor([[1.0, float("nan")]]), 0.5)
