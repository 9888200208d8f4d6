"""Bases and angles against what defines them: diagonal moments, orthogonal columns, the best of the angles tried."""

import pytest
import torch
from exact import random

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.head_basis import (
    balanced_basis,
    entropy,
    in_proportion,
    pair_angles,
    principal_basis,
    turned_values,
)
from elastic_sparsity.metric_refresh import mixed_square_sum


def gram_of(size, seed=0):
    x = random(40, size, seed=seed) @ torch.diag(torch.linspace(0.1, 3, size, dtype=torch.float64))
    return x.T @ x


def off_diagonal(matrix):
    return float((matrix - matrix.diagonal().diag()).abs().max() / matrix.diagonal().abs().max())


def test_principal_basis_makes_moments_diagonal():
    gram = gram_of(6)
    basis = principal_basis(gram)
    moved = basis @ gram @ basis.T
    assert off_diagonal(moved) < 1e-10
    assert torch.allclose(basis @ basis.T, torch.eye(6, dtype=torch.float64), atol=1e-10)
    assert (moved.diagonal().diff() <= 1e-9).all()


def test_balanced_basis_makes_both_sides_orthogonal():
    gram, out = gram_of(6), random(9, 6, seed=3)
    basis = balanced_basis(gram, out)
    assert off_diagonal(basis @ gram @ basis.T) < 1e-8
    columns = out @ torch.linalg.inv(basis)
    assert off_diagonal(columns.T @ columns) < 1e-8


def test_balanced_basis_of_values_that_never_move():
    gram = gram_of(6)
    gram[2], gram[:, 2] = 0.0, 0.0
    assert torch.linalg.cond(balanced_basis(gram, random(9, 6))) < 1e5


def proportion(value_CD, out_RDC):
    return value_CD.square().mean(1).sqrt() / out_RDC.square().mean((0, 1)).sqrt()


def test_in_proportion_keeps_what_weights_were_to_each_other():
    value, out = random(6, 12, seed=1), 7 * random(2, 10, 6, seed=2)
    basis = 1e-3 * balanced_basis(gram_of(6), out.flatten(0, 1))
    even = in_proportion(basis, value, out, max_condition=1e5)
    now = proportion(even @ value, out @ torch.linalg.inv(even))
    assert torch.allclose(now, (value.square().mean() / out.square().mean()).sqrt().expand(6))
    assert torch.allclose(even / even.norm(dim=1, keepdim=True), basis / basis.norm(dim=1, keepdim=True))
    rotation = principal_basis(gram_of(6))  # of weights that are alike already: hardly anything is left to do
    assert torch.linalg.cond(in_proportion(rotation, value, out, max_condition=1e5)) < 3


def test_in_proportion_within_a_condition_and_beside_weights_that_are_zero():
    value, out = random(6, 12, seed=1), random(2, 10, 6, seed=2)
    value[3], out[:, :, 4] = 0.0, 0.0
    same = in_proportion(torch.eye(6), value, out, max_condition=1e5)
    assert torch.equal(same, same.diagonal().diag()) and torch.isfinite(same).all()
    assert torch.allclose(same[3, 3], same[4, 4])
    assert torch.equal(in_proportion(torch.eye(6), torch.zeros(6, 12), out, max_condition=1e5), torch.eye(6).double())
    value[0] *= 1e6
    steep = in_proportion(torch.eye(6), value, out, max_condition=10.0)
    assert torch.linalg.cond(steep) == pytest.approx(10.0)
    already = torch.diag(torch.tensor([1e3, 1, 1, 1, 1, 1]))
    assert torch.linalg.cond(in_proportion(already, value, out, max_condition=10.0)) == pytest.approx(1e3)


def test_entropy_by_hand():
    even, one = torch.ones(1, 4), torch.tensor([[0.0, 5.0, 0.0, 0.0]])
    assert float(entropy(even)) == pytest.approx(torch.tensor(4.0).log().item())
    assert float(entropy(one)) == 0.0
    assert float(entropy(torch.cat([even, 3 * even]))) == pytest.approx(float(entropy(even)))
    # Four times the energy, four times the weight: (1 * log 4 + 5 / 4 * 0) / (9 / 4) of the mean.
    assert float(entropy(torch.cat([even, one]))) == pytest.approx(float(entropy(even)) * 4 / 9)
    weight = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    entropy(weight.square()).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad[0, 0] == 0


def test_turned_values_lower_the_entropy_and_stay_a_rotation_of_the_start():
    value, out = random(6, 12, seed=1), random(2, 10, 6, seed=2)
    grams = torch.stack([gram_of(6, seed=4), gram_of(6, seed=5)])
    start = principal_basis(grams.sum(0))

    def loss(basis):
        turned = out @ torch.linalg.inv(basis)
        squares = mixed_square_sum(grams, basis)
        of_out = entropy((turned.square() * squares[:, None]).flatten(0, 1))
        return float(entropy((basis @ value).square()) + of_out)

    found = turned_values(value, torch.ones(12), out, grams, start, steps=60, lr=0.02)
    rotation = found @ torch.linalg.inv(start)
    assert torch.allclose(rotation @ rotation.T, torch.eye(6, dtype=torch.float64), atol=1e-10)
    assert loss(found) < loss(start) - 0.01
    assert torch.allclose(turned_values(value, torch.ones(12), out, grams, start, steps=0, lr=0.02), start, atol=1e-6)


def test_angles_are_the_best_of_those_tried():
    query, key, energy = random(2, 2, 3, 16, seed=1), random(2, 3, 16, seed=2), random(16, seed=3).square()
    # A pair whose key is one strong weight a row, turned by 30 degrees: turning it on by 60 or back gives it again.
    found = pair_angles(query, key, energy, kept=4, num_angles=8)
    assert found.shape == (3,) and ((found >= 0) & (found < torch.pi / 2)).all()

    def held(pair, angle):
        total = 0.0
        sides = torch.cat([key[None], query])[:, :, pair] * energy.sqrt()
        for index, (first, second) in enumerate(sides):
            turned = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(angle).double())
            rows = torch.view_as_real(torch.complex(first, second) * turned).T.square()
            share = rows.topk(4, dim=1).values.sum() / rows.sum()
            total += float(share) * (1.0 if index == 0 else 0.5)
        return total

    for pair in range(3):
        tried = [held(pair, index * torch.pi / 16) for index in range(8)]
        assert held(pair, float(found[pair])) == pytest.approx(max(tried), rel=1e-5)


def test_no_angle_where_none_gains():
    key, query = torch.zeros(2, 1, 8), torch.zeros(1, 2, 1, 8)
    key[0, 0, 0] = key[1, 0, 3] = query[0, 0, 0, 1] = query[0, 1, 0, 2] = 1.0
    assert torch.equal(pair_angles(query, key, torch.ones(8), kept=1), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ShapeError, match="angles"):
        pair_angles(query, key, torch.ones(7), kept=1)
