"""Folds as functions: what the folds in place leave, for every family; and gradients that know they change nothing."""

import pytest
import torch
from exact import IDS, VARIANTS, StayFloat64, model_of, random, random_scales

from elastic_sparsity.absorption import scale_pair_, scale_pairs, shift_pair_, shift_pairs
from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.functional_fold import call_with, folded_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_fold_in_place(variant):
    model = model_of(variant)
    block = decoder_blocks(model)[1]
    pairs, shifted = scale_pairs(block, model.config), shift_pairs(block, model.config)
    scales = {pair.name: random_scales(pair, seed=index) for index, pair in enumerate(pairs)}
    shifts = {pair.name: random(pair.num_values, seed=index) for index, pair in enumerate(shifted)}
    assert folded_parameters(block, pairs, {}, {}) == {}
    found = folded_parameters(block, pairs, scales, shifts)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for pair in pairs:
        if pair.name in shifts:
            shift_pair_(block, pair, shifts[pair.name])
        scale_pair_(block, pair, scales[pair.name])
    for name, parameter in block.named_parameters():
        assert torch.allclose(found.get(name, before[name]), parameter, rtol=1e-9, atol=1e-12), name
        assert (name in found) == (not torch.equal(before[name], parameter)), name


@pytest.mark.parametrize("variant", ["llama", "opt", "gpt2", "gemma2"])
def test_scales_have_no_gradient_behind_a_fixed_mask(variant):
    """Eq. 4 of the paper: (W S * M) S^-1 X does not depend on S. Shifts do count, where there are any."""
    model = model_of(variant).requires_grad_(False)
    block = decoder_blocks(model)[0]
    runner = BlockRunner(model.base_model, list(decoder_blocks(model)), IDS, 2)
    call, hidden = runner.call(0), runner.first_hidden()
    pairs, shifted = scale_pairs(block, model.config), shift_pairs(block, model.config)
    scales = {pair.name: random_scales(pair).abs().requires_grad_() for pair in pairs}
    shifts = {pair.name: torch.zeros(pair.num_values, dtype=torch.float64, requires_grad=True) for pair in shifted}
    found = folded_parameters(block, pairs, scales, shifts)
    masked = {
        name: value * (random(*value.shape, seed=5) > 0) if value.ndim == 2 else value for name, value in found.items()
    }
    with StayFloat64():
        dense = call(hidden)
        loss = (call_with(block, call, masked, hidden) - dense).square().mean()
        assert float(loss.detach()) > 1e-8
        assert torch.equal(dense, call(hidden)), "the block was changed"
    loss.backward()
    for name, scale in scales.items():
        # A row of the producer and a column of the consumer carry the mask; only biases and norms in between do not.
        assert float((scale.grad * scale).abs().max()) < 1e-9 * max(1.0, float(loss.detach())), name
    assert all(float(shift.grad.abs().max()) > 1e-9 for shift in shifts.values())
    assert bool(shifts) == (variant in ("opt", "gpt2"))
