"""Thresholds and hard masks against sorting; the channel gradient against the relaxed problem, differenced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.soft_mask import Choice, channel_gradient, hard_mask, straight_through, thresholds


def random_scores(rows, width, seed):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) + 1e-3


@given(st.integers(1, 5), st.sampled_from([(4, 8), (1, 128), (127, 128), (30, 96)]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_keep_what_sorting_keeps(rows, choice, seed):
    kept, width = choice
    scores = random_scores(rows, width, seed)
    found = hard_mask(scores, thresholds(scores, Choice(kept, width)), Choice(kept, width))
    assert torch.equal(found, mask_at(drop_levels(scores, [kept]), 0))


@given(st.sampled_from([(2, 4), (4, 8), (1, 2)]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_groups_keep_what_sorting_keeps(pattern, seed):
    scores = random_scores(3, 32, seed)
    found = hard_mask(scores, thresholds(scores, Choice(*pattern)), Choice(*pattern))
    assert torch.equal(found, pattern_mask(scores, *pattern))


@given(
    st.sampled_from([(2, 4), (4, 8), (8, 32), (100, 128), (1, 128)]), st.integers(0, 99), st.sampled_from([0.25, 1e-30])
)
@settings(max_examples=40, deadline=None)
def test_where_scores_tie_the_first_are_kept_as_in_the_masks_of_pruning(choice, seed, unit):
    """Few values, as quantised weights have; 1e-30 squared is no float32 any more."""
    kept, size = choice
    scores = torch.randint(0, 4, (3, 128), generator=torch.Generator().manual_seed(seed)) * unit
    found = hard_mask(scores, thresholds(scores, Choice(*choice)), Choice(*choice))
    assert torch.equal(found, pattern_mask(scores, kept, size))
    straight = straight_through(scores, Choice(*choice), 0.5)
    assert torch.equal(straight.bool(), found)


@pytest.mark.parametrize("choice", [Choice(8, 8), Choice(128, 128)])
def test_keeping_all_keeps_all(choice):
    scores = torch.zeros(2, 128)
    assert hard_mask(scores, thresholds(scores, choice), choice).all()


def test_transposed_scores():
    scores = random_scores(128, 6, 0).T
    choice = Choice(5, 128)
    assert torch.equal(hard_mask(scores, thresholds(scores, choice), choice), mask_at(drop_levels(scores, [5]), 0))


def test_width_that_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match="does not divide"):
        thresholds(torch.ones(2, 6), Choice(2, 4))


def relaxed_mask(log_scores, kept_sum, temperature):
    """The relaxed mask, its thresholds found by bisection so that every row sums to `kept_sum`: the slow oracle."""
    low, high = log_scores.amin(1, keepdim=True) - 9, log_scores.amax(1, keepdim=True) + 9
    for _ in range(100):
        middle = (low + high) / 2
        too_many = torch.special.ndtr((log_scores - middle) / temperature).sum(1, keepdim=True) > kept_sum
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return torch.special.ndtr((log_scores - low) / temperature), low


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("group_size", [16, 4])
def test_gradient_is_the_relaxed_problems(temperature, group_size):
    """The relaxed mask's sums are what the threshold makes them, then kept fixed while a channel's scale moves."""
    torch.manual_seed(0)
    scores = random_scores(5, 16, 1)
    saliency = torch.randn(5, 16)
    choice = Choice(group_size // 2, group_size)
    at = thresholds(scores, choice)
    found = channel_gradient(saliency, scores, at, choice, temperature)
    groups = scores.double().log().view(-1, group_size)
    start = torch.special.ndtr((groups - at.double().log().view(-1, 1)) / temperature)
    sums = start.sum(1, keepdim=True)
    for channel in range(16):
        losses = []
        for step in (1e-4, -1e-4):
            moved = scores.double().log()
            moved[:, channel] += step
            mask, _ = relaxed_mask(moved.view(-1, group_size), sums, temperature)
            losses.append(float((mask.view(5, 16) * saliency).sum()))
        assert float(found[channel]) == pytest.approx((losses[0] - losses[1]) / 2e-4, abs=1e-5)


def test_a_common_scale_changes_nothing():
    scores = random_scores(4, 32, 2)
    saliency, choice = torch.randn(4, 32), Choice(9, 32)
    assert float(channel_gradient(saliency, scores, thresholds(scores, choice), choice, 0.5).sum()) == pytest.approx(
        0, abs=1e-5
    )
    a = hard_mask(scores, thresholds(scores, choice), choice)
    assert torch.equal(a, hard_mask(scores * 7, thresholds(scores * 7, choice), choice))


def test_zero_scores_give_finite_gradients():
    scores = torch.zeros(3, 16)
    scores[:, :3] = 1.0
    choice = Choice(8, 16)
    found = channel_gradient(torch.randn(3, 16), scores, thresholds(scores, choice), choice, 0.5)
    assert torch.isfinite(found).all()


@given(st.integers(0, 2**31), st.sampled_from([Choice(8, 16), Choice(2, 4), Choice(4, 8), Choice(5, 16)]))
@settings(deadline=None, max_examples=30)
def test_straight_through_is_the_hard_mask_with_the_relaxed_ones_gradient(seed, choice):
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    scores.requires_grad_(True)
    found = straight_through(scores, choice, 0.5)
    with torch.no_grad():
        threshold = thresholds(scores, choice)
        assert torch.allclose(found, hard_mask(scores, threshold, choice).double(), atol=1e-12)
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    (found * weights).sum().backward()
    again = scores.detach().clone().requires_grad_(True)
    relaxed = torch.special.ndtr((choice.groups(again) / threshold).log() / 0.5).reshape(3, 16)
    (relaxed * weights).sum().backward()
    assert torch.allclose(scores.grad, again.grad)
    assert float(scores.grad.abs().max()) > 0
