"""The refreshed metric against a new pass over the tokens: equal behind exact folds, within the bound elsewhere."""

import pytest
import torch
from exact import IDS, random, random_scales
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity.absorption import scale_pair_, scale_pairs, shift_pair_, shift_pairs
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.blocks import input_hooks
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.importance import InputStatistics, wanda_scores
from elastic_sparsity.metric_refresh import mixed_square_sum, refreshed_scores, relative_bound, scaled_square_sum
from elastic_sparsity.rotation import mix_values_
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model
from elastic_sparsity.wiring import heads_of, wiring_of


@torch.no_grad()
def inputs_of(model):
    """(tokens, I) float64 by linear name, from a pass."""
    found = {}
    with input_hooks(linears_of(model), lambda names, x: found.update({n: x.flatten(0, -2).double() for n in names})):
        model(IDS, use_cache=False)
    return found


def recomputed(model):
    return {name: x.square().sum(0) for name, x in inputs_of(model).items()}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_behind_every_scale_pair_it_equals_a_new_pass(family):
    model, seen = tiny_model(family).double(), 0
    prefix = next(iter(linears_of(model))).split(".0.")[0]
    for pair in scale_pairs(decoder_blocks(model)[1], model.config):
        before, block = recomputed(model), decoder_blocks(model)[1]
        scales = random_scales(pair)
        scale_pair_(block, pair, scales)
        after = recomputed(model)
        factors = {name: torch.ones_like(norm) for name, norm in before.items()}
        for side in pair.multiplied:
            if side.inputs:
                name = f"{prefix}.1.{side.path}"
                factors[name] = side.spread(1 / scales, len(before[name]), 1.0)
                assert not torch.allclose(before[name], after[name], rtol=1e-2), name
                seen += 1
        for name, norm in before.items():
            assert torch.allclose(scaled_square_sum(norm, factors[name]), after[name], rtol=1e-5), (pair.name, name)
    assert seen >= (2 if family == "opt-350m" else 1)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_behind_shifts_it_equals_a_new_pass(family):
    model = tiny_model(family).double()
    block, before = decoder_blocks(model)[0], inputs_of(model)
    prefix = next(iter(linears_of(model))).split(".0.")[0]
    pairs = shift_pairs(block, model.config)
    assert pairs
    for pair in pairs:
        shifts, scales = random(pair.num_values), random_scales(pair)
        shift_pair_(block, pair, shifts)
        scale_pair_(block, pair, scales)
        after = recomputed(model)
        for side in pair.multiplied:
            x = before[f"{prefix}.0.{side.path}"]
            width = x.shape[1]
            found = scaled_square_sum(
                x.square().sum(0),
                side.spread(1 / scales, width, 1.0),
                shift_I=side.spread(shifts, width, 0.0),
                sum_I=x.sum(0),
                num_tokens=len(x),
            )
            assert torch.allclose(found, after[f"{prefix}.0.{side.path}"], rtol=1e-5), (pair.name, side.path)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_behind_a_matrix_per_head_it_equals_a_new_pass(family):
    model = tiny_model(family).double()
    block, row = decoder_blocks(model)[0], wiring_of(model.config)
    name = next(name for name in linears_of(model) if name.endswith(f"0.{row.out}"))
    heads, x = heads_of(block, model.config), inputs_of(model)[name]
    matrices = random(*heads.value_KC.shape, heads.value_KC.shape[1])
    mix_values_(block, model.config, matrices)
    after = recomputed(model)[name]
    for head, matrix in enumerate(matrices):
        for columns in heads.out_KRC[head]:
            gram = x[:, columns].T @ x[:, columns]
            assert torch.allclose(mixed_square_sum(gram, matrix), after[columns], rtol=1e-4)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 30))
def test_scores_of_scaled_inputs(seed, width, tokens):
    """Eq. 11: the metric of Wanda on D X; with W D^-1 in exchange, that of W on X."""
    x, weight, factors = random(tokens, width, seed=seed), random(5, width, seed=seed + 1), random(width, seed=seed + 2)
    norm = x.norm(dim=0)
    expected = wanda_scores(weight, (x * factors).square().sum(0).float())
    found = refreshed_scores(weight, norm, factors)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-30)
    kept = refreshed_scores(weight / factors, norm, factors)
    assert torch.allclose(kept, wanda_scores(weight, norm.square().float()), rtol=1e-4)


@given(st.integers(0, 2**31), st.floats(1e-3, 10))
def test_the_bound_holds_for_any_change(seed, size):
    x, change, factors = random(20, 6, seed=seed), size * random(20, 6, seed=seed + 1), random(6, seed=seed + 2)
    refreshed = scaled_square_sum(x.square().sum(0), factors).sqrt()
    true = ((x + change) * factors).norm(dim=0)
    bound = relative_bound(change.square().sum(0), x.square().sum(0))
    assert ((true - refreshed).abs() <= bound * refreshed * (1 + 1e-9)).all()
    # A change along the input itself reaches it.
    along = relative_bound((size * x).square().sum(0), x.square().sum(0))
    assert torch.allclose(((1 + size) * x * factors).norm(dim=0) - refreshed, along * refreshed)


def test_behind_a_mask_it_is_off_by_at_most_the_bound():
    """Half of the first block's weights gone: the second's inputs are others, and the cache does not know."""
    model = tiny_model("llama").double()
    before = inputs_of(model)
    with torch.no_grad():
        for name, linear in linears_of(model).items():
            if ".0." in name:
                weight = weight_OI(linear)
                weight[weight.abs() < weight.abs().median()] = 0.0
    after, exact = inputs_of(model), True
    for name, x in before.items():
        norm, true = x.norm(dim=0), after[name].norm(dim=0)
        bound = relative_bound((after[name] - x).square().sum(0), x.square().sum(0))
        assert ((true - norm).abs() <= bound * norm * (1 + 1e-9)).all(), name
        exact &= bool(torch.allclose(true, norm, rtol=1e-3))
    assert not exact, "the mask changed no input, which says nothing"


def test_streaming_statistics_are_enough():
    x, shift, factors = random(50, 8), random(8, seed=1), random(8, seed=2)
    statistics = InputStatistics(8, gram=False, means=True)
    for part in x.split(16):
        statistics.update(part)
    found = scaled_square_sum(
        statistics.square_sum_I.double(),
        factors,
        shift_I=shift,
        sum_I=statistics.mean_I * statistics.num_tokens,
        num_tokens=statistics.num_tokens,
    )
    assert torch.allclose(found, ((x - shift) * factors).square().sum(0), rtol=1e-5)


def test_channels_that_never_were_active():
    assert torch.equal(relative_bound(torch.tensor([0.0, 1.0]), torch.zeros(2)), torch.tensor([0.0, torch.inf]))


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="every input channel"):
        scaled_square_sum(torch.ones(3), torch.ones(4))
    with pytest.raises(ShapeError, match="sum_I"):
        scaled_square_sum(torch.ones(3), torch.ones(3), shift_I=torch.ones(3))
    with pytest.raises(ShapeError, match="gram"):
        mixed_square_sum(torch.eye(3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match="weight"):
        refreshed_scores(torch.ones(2, 4), torch.ones(3), torch.ones(3))
