"""Eq. 5 to 8 of arXiv 2602.21652 against numbers worked out by hand and by torch.linalg."""

import pytest
import torch

from elastic_sparsity.spectral_loss import (
    SpectralNorms,
    feature_loss,
    finite_parameters,
    initial_scales,
    spectral_penalty,
    stable_rank,
)


def test_initial_scales_by_hand():
    # medians 1, 2, 0; means 2, 6, 0.5: squares 1, 16, 0.25; over their median 1.
    outputs = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [5.0, 16.0, 1.5]])
    assert torch.allclose(initial_scales(outputs), torch.tensor([1.0, 16.0, 0.25]))


def test_initial_scales_of_symmetric_outputs_are_cut():
    outputs = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 3.0], [1.0, 5.0, 30.0]])
    found = initial_scales(outputs)
    assert float(found[0]) == pytest.approx(1e-2)
    assert (found >= 1e-2).all() and (found <= 1e2).all()


def test_norms_are_the_largest_singular_values_and_so_is_their_gradient():
    torch.manual_seed(0)
    weights = {"a": torch.randn(6, 9, requires_grad=True), "b": torch.randn(8, 3, requires_grad=True)}
    norms = SpectralNorms(weights)
    for _ in range(60):
        found = norms(weights)
    expected = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights.values()])
    assert torch.allclose(found, expected, rtol=1e-4)
    found.sum().backward()
    mine = weights["a"].grad.clone()
    weights["a"].grad = None
    expected.sum().backward()
    assert torch.allclose(mine, weights["a"].grad, atol=1e-2)


def test_penalty_falls_as_norms_grow():
    norms = torch.tensor([1.0, 3.0])
    assert float(spectral_penalty(norms, 0.25)) == pytest.approx(2.718281828**-1)
    assert float(spectral_penalty(2 * norms, 0.25)) < float(spectral_penalty(norms, 0.25))


def test_feature_loss_is_relative():
    output, target = torch.tensor([3.0, 0.0]), torch.tensor([2.0, 1.0])
    assert float(feature_loss(output, target)) == pytest.approx(1.0 / 2.5)
    assert float(feature_loss(100 * output, 100 * target)) == pytest.approx(1.0 / 2.5)


def test_stable_rank():
    assert stable_rank(torch.eye(5)) == pytest.approx(5.0)
    assert stable_rank(torch.ones(4, 3)) == pytest.approx(1.0)
    assert stable_rank(torch.zeros(4, 3)) == 0.0


def test_finite_parameters():
    assert finite_parameters([torch.ones(2)])
    assert not finite_parameters([torch.ones(2), torch.tensor([1.0, torch.nan])])
