"""SparseGPT: its counts, its error between magnitude's and the best possible one, and an oracle that inverts anew."""

import re

import pytest
import torch

from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.importance import magnitude_scores
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.sparsegpt import sparsegpt


def problem(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, inputs of shape (tokens, width)) with strongly correlated channels of different scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) + 2 * torch.randn(width, 1, generator=generator)
    return weight, torch.randn(8 * width, width, generator=generator) @ mixing.T


def output_error(weight: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (weight.double() - pruned.double()).T).square().sum())


def least_squares_on(mask: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The best weight with this mask, row by row, float64."""
    x, weight = x.double(), weight.double()
    best = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        kept = mask[row].nonzero().flatten()
        best[row, kept] = torch.linalg.lstsq(x[:, kept], (x @ weight[row])[:, None]).solution[:, 0]
    return best


def naive_obs(weight: torch.Tensor, gram: torch.Tensor, kept: int, size: int, damping: float) -> torch.Tensor:
    """Column by column: invert the Hessian of the columns not yet processed, prune, repair. float64."""
    weight, hessian = weight.double().clone(), gram.double()
    width = weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    for j in range(width):
        if j % size == 0:
            inverse_diagonal = torch.stack([torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + size)])
            saliency = weight[:, j : j + size] ** 2 / inverse_diagonal
            keep = pattern_mask(saliency, kept, size)
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(weight.shape[0]):
            if not keep[row, j % size]:
                weight[row, j:] -= weight[row, j].item() / inverse[0, 0] * inverse[0]
                weight[row, j] = 0.0
    return weight


def test_two_columns_by_hand():
    """Gram [[2, 1], [1, 2]] and damping 0.5: Hessian [[3, 1], [1, 3]]. In 1:2 the saliencies of (1, 4) are
    1 / (3/8) = 8/3 and 16 / (1/3) = 48, so column 0 goes, and column 1 gets H01 / H11 = 1/3 of what it held.
    """
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = sparsegpt(torch.tensor([[1.0, 4.0]]), gram, sparsity=0.5, pattern=(1, 2), damping=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, 4.0 + 1 / 3]]))


@pytest.mark.parametrize(("kept", "size", "block_size"), [(2, 4, 128), (1, 2, 128), (2, 4, 8), (3, 6, 8)])
def test_equals_obs_that_inverts_anew_for_every_column(kept, size, block_size):
    weight, x = problem(5, 12)
    gram = x.T @ x
    expected = naive_obs(weight, gram, kept, size, damping=0.05)
    found = sparsegpt(weight, gram, sparsity=0.5, pattern=(kept, size), damping=0.05, block_size=block_size)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (4, 8), (5, 6)])
def test_patterns_keep_n_of_every_m(pattern):
    weight, x = problem(6, 48)
    found = sparsegpt(weight, x.T @ x, sparsity=0.0, pattern=pattern)
    assert ((found != 0).reshape(6, -1, pattern[1]).sum(-1) == pattern[0]).all()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_unstructured_counts_are_exact_in_every_block(sparsity):
    weight, x = problem(6, 40)
    found = sparsegpt(weight, x.T @ x, sparsity=sparsity, block_size=16)
    for start, end in ((0, 16), (16, 32), (32, 40)):
        assert int((found[:, start:end] == 0).sum()) == 6 * (end - start) * sparsity


def test_no_sparsity_changes_nothing():
    weight, x = problem(4, 16)
    assert torch.equal(sparsegpt(weight, x.T @ x, sparsity=0.0), weight)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_error_is_below_magnitude_and_above_the_optimum_on_its_mask(pattern, seed):
    weight, x = problem(8, 32, seed)
    found = sparsegpt(weight, x.T @ x, sparsity=0.5, pattern=pattern, damping=1e-3, block_size=16)
    scores = magnitude_scores(weight)
    mask = mask_at(drop_levels(scores, [16]), 0) if pattern is None else pattern_mask(scores, *pattern)
    assert int((found == 0).sum()) == int((~mask).sum())
    error = output_error(weight, found, x)
    best = output_error(weight, least_squares_on(found != 0, weight, x), x)
    assert best < error < output_error(weight, weight * mask, x)


def test_an_identity_gram_only_masks():
    weight, _ = problem(4, 12)
    by_pattern = sparsegpt(weight, torch.eye(12), sparsity=0.5, pattern=(2, 4))
    assert torch.equal(by_pattern, weight * pattern_mask(weight.abs(), 2, 4))
    unstructured = sparsegpt(weight, 3 * torch.eye(12), sparsity=0.5, block_size=6)
    for part in (slice(0, 6), slice(6, 12)):  # the threshold is one for all rows of a block
        threshold = weight[:, part].abs().flatten().sort().values[12]
        kept = weight[:, part].abs() >= threshold
        torch.testing.assert_close(unstructured[:, part], weight[:, part] * kept)
        assert torch.equal(unstructured[:, part] != 0, kept)


def test_channels_that_were_never_active_are_removed():
    weight, x = problem(4, 16)
    x[:, 3] = 0.0
    found = sparsegpt(weight, x.T @ x, sparsity=0.25)
    assert (found[:, 3] == 0).all()
    assert int((found == 0).sum()) == 16


def test_the_weight_is_read_not_modified():
    weight, x = problem(4, 16)
    weight = weight.bfloat16()
    before, gram = weight.clone(), x.T @ x
    gram_before = gram.clone()
    found = sparsegpt(weight, gram, sparsity=0.5)
    assert found.dtype == torch.float32
    assert torch.equal(weight, before)
    assert torch.equal(gram, gram_before)
    assert torch.equal(found, sparsegpt(weight.float(), gram, sparsity=0.5))


def test_ties_in_a_group_are_broken_by_index():
    found = sparsegpt(torch.ones(3, 32), torch.eye(32), sparsity=0.5, pattern=(8, 16))
    expected = ([1.0] * 8 + [0.0] * 8) * 2
    assert found.tolist() == [expected] * 3


def test_a_gram_that_does_not_factor_names_the_weight():
    message = "model.layers.1.fc2: the input covariance does not factor with damping 0.01"
    with pytest.raises(NumericsError, match=re.escape(message)):
        sparsegpt(torch.ones(2, 2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]), sparsity=0.5, where="model.layers.1.fc2")


def test_a_mask_chosen_before_is_kept_and_its_own_changes_nothing():
    weight, x = problem(12, 256)
    gram = x.T @ x
    for choose in ({"sparsity": 0.5}, {"sparsity": 0.0, "pattern": (2, 4)}):
        plain = sparsegpt(weight, gram, **choose)
        again = sparsegpt(weight, gram, sparsity=0.9, keep_OI=plain != 0)
        assert torch.equal(again, plain)
    mask = pattern_mask(weight.abs(), 2, 4)
    found = sparsegpt(weight, gram, sparsity=0.0, keep_OI=mask)
    assert torch.equal(found != 0, mask) and output_error(weight, found, x) < output_error(weight, weight * mask, x)
    with pytest.raises(ShapeError, match="against a mask"):
        sparsegpt(weight, gram, sparsity=0.5, keep_OI=mask[:, 1:])
