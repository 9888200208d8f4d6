"""Orders of structured units and the weights of every prefix: a hand-worked case, slow oracles, and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.structured_order import (
    damped_hessian,
    descending,
    fluctuation_scores,
    obs_order,
    prefixes,
)


def layer(units, size, outputs=5, tokens=None, seed=0):
    """(X, W, units): correlated float64 inputs, weights, and units whose inputs lie scattered."""
    generator = torch.Generator().manual_seed(seed)
    width = units * size
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs_TI = torch.randn(tokens or 4 * width, width, generator=generator, dtype=torch.float64) @ mix
    weight_OI = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    return inputs_TI, weight_OI, torch.randperm(width, generator=generator).view(units, size)


def refit(inputs_TI, weight_OI, kept_N):
    """The slow oracle: least squares on the kept inputs, and its squared error."""
    target = inputs_TI @ weight_OI.T
    found = torch.linalg.lstsq(inputs_TI[:, kept_N], target).solution
    return found.T, float((target - inputs_TI[:, kept_N] @ found).square().sum())


def slow_order(inputs_TI, weight_OI, units_UC):
    """Removes, one at a time, the unit whose removal leaves the least error after an exact refit."""
    left, gone = list(range(len(units_UC))), []
    while len(left) > 1:
        errors = {u: refit(inputs_TI, weight_OI, units_UC[[x for x in left if x != u]].flatten())[1] for u in left}
        gone.append(min(errors, key=errors.get))
        left.remove(gone[-1])
    return [*left, *gone[::-1]]


shapes = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_every_prefix_is_the_least_squares_refit_with_the_promised_error(shape):
    inputs_TI, weight_OI, units_UC = layer(*shape[:3], seed=shape[3])
    hessian = damped_hessian(inputs_TI.T @ inputs_TI, 0.0)
    order_I = units_UC[obs_order(hessian, weight_OI, units_UC)].flatten()
    fit = prefixes(hessian, weight_OI, order_I)
    errors, energy = fit.errors(), float((inputs_TI @ weight_OI.T).square().sum())
    assert float(errors[0]) == pytest.approx(energy, rel=1e-9)
    assert float(errors[-1]) == 0
    assert (errors.diff() <= 0).all(), "keeping more never costs more"
    for kept in range(1, len(order_I) + 1):
        found = fit.weight_OI(kept)
        wanted, error = refit(inputs_TI, weight_OI, order_I[:kept])
        assert torch.allclose(found[:, order_I[:kept]], wanted, rtol=1e-6, atol=1e-7)
        assert (found[:, order_I[kept:]] == 0).all()
        measured = float((inputs_TI @ (weight_OI - found).T).square().sum())
        assert measured == pytest.approx(error, rel=1e-6, abs=1e-9 * energy)
        assert float(errors[kept]) == pytest.approx(measured, rel=1e-6, abs=1e-9 * energy)


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_the_order_is_that_of_exact_refits(shape):
    inputs_TI, weight_OI, units_UC = layer(*shape[:3], seed=shape[3])
    found = obs_order(damped_hessian(inputs_TI.T @ inputs_TI, 0.0), weight_OI, units_UC)
    assert found.tolist() == slow_order(inputs_TI, weight_OI, units_UC)


@pytest.mark.parametrize("at_once", [1, 2, 5, 8, 100])
def test_orders_are_permutations_that_do_not_depend_on_the_run(at_once):
    inputs_TI, weight_OI, units_UC = layer(24, 1)
    hessian = damped_hessian(inputs_TI.T @ inputs_TI, 0.01)
    order = obs_order(hessian, weight_OI, units_UC, at_once=at_once)
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(order, obs_order(hessian, weight_OI, units_UC, at_once=at_once))


def test_costs_are_computed_again_after_every_removal():
    """Two equal inputs: each alone costs nothing, so one goes first; then the other costs most."""
    x = torch.tensor([[1.0, 1.0, 0.1], [2.0, 2.0, 0.0], [3.0, 3.0, -0.1]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    hessian = damped_hessian(x.T @ x, 1e-9)
    units = torch.arange(3)[:, None]
    assert obs_order(hessian, weight, units).tolist() in ([1, 2, 0], [0, 2, 1])
    assert obs_order(hessian, weight, units, at_once=2).tolist()[0] == 2, "both twins at once, and the energy is gone"
    fit = prefixes(hessian, weight, torch.tensor([1, 2, 0]))
    assert fit.weight_OI(2).tolist()[0] == pytest.approx([0, 2, 1], abs=1e-5)
    assert float(fit.errors()[2]) == pytest.approx(0, abs=1e-6)


def test_a_progressive_order_beats_one_shot_on_correlated_inputs():
    inputs_TI, weight_OI, units_UC = layer(40, 1, outputs=20, seed=3)
    hessian = damped_hessian(inputs_TI.T @ inputs_TI, 0.01)
    lost = [
        float(prefixes(hessian, weight_OI, units_UC[obs_order(hessian, weight_OI, units_UC, at_once=n)].flatten())
              .errors()[20]) for n in (1, 40)
    ]  # fmt: skip
    assert lost[0] < lost[1]


@pytest.mark.parametrize("heads", [1, 3, 5, 7, 24, 28, 40])
def test_any_number_of_heads(heads):
    inputs_TI, weight_OI, units_UC = layer(heads, 2, outputs=3, seed=heads)
    order = obs_order(damped_hessian(inputs_TI.T @ inputs_TI, 0.01), weight_OI, units_UC)
    assert sorted(order.tolist()) == list(range(heads))


def test_damping_pulls_to_the_weights_as_they_are():
    inputs_TI, weight_OI, units_UC = layer(6, 1)
    gram = inputs_TI.T @ inputs_TI
    fit = prefixes(damped_hessian(gram, 1e6), weight_OI, torch.arange(6))
    assert torch.allclose(fit.weight_OI(4)[:, :4], weight_OI[:, :4], rtol=1e-3)
    assert torch.allclose(prefixes(damped_hessian(gram, 0.5), weight_OI, torch.arange(6)).weight_OI(6), weight_OI)


def test_a_mean_that_a_bias_takes_costs_nothing():
    inputs_TI, weight_OI, units_UC = layer(6, 1)
    shifted = inputs_TI + 100
    hessian = damped_hessian(shifted.T @ shifted, 0.0, mean_I=shifted.mean(dim=0), num_tokens=len(shifted))
    centred = inputs_TI - inputs_TI.mean(dim=0)
    assert torch.allclose(hessian, centred.T @ centred, rtol=1e-6, atol=1e-6)


def test_fluctuation_by_hand():
    variance, weight = torch.tensor([1.0, 4.0, 0.0, 2.0]), torch.tensor([[1.0, 1.0, 9.0, 0.0], [2.0, 0.0, 9.0, 1.0]])
    assert fluctuation_scores(variance, weight, torch.arange(4)[:, None]).tolist() == [5, 4, 0, 2]
    assert fluctuation_scores(variance, weight, torch.tensor([[0, 2], [1, 3]])).tolist() == [2.5, 3]
    assert descending(torch.tensor([1.0, 3.0, 3.0, 0.0])).tolist() == [1, 2, 0, 3]


def test_what_is_refused():
    eye, weight = torch.eye(4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"here: 4 inputs against a Hessian \(4, 4\) and units \(3, 1\)"):
        obs_order(eye, weight, torch.arange(3)[:, None], where="here")
    with pytest.raises(ShapeError):
        obs_order(torch.eye(3, dtype=torch.float64), weight, torch.arange(4)[:, None])
    with pytest.raises(NumericsError, match="here: the input covariance does not factor; raise damping"):
        obs_order(-eye, weight, torch.arange(4)[:, None], where="here")
    with pytest.raises(NumericsError, match="here: the mean square of its inputs is 0.0"):
        damped_hessian(0 * eye, 0.01, where="here")
    with pytest.raises(NumericsError):
        damped_hessian(float("nan") * eye, 0.01)
