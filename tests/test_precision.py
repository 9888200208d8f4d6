"""Weights cast for a while."""

import pytest
import torch
from torch import nn

from elastic_sparsity.precision import autocast_factory, cast_parameters_, weights_in, weights_under


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_cast_inside_and_the_same_memory_after(fails):
    linear = nn.Linear(4, 3)
    before = linear.weight.data_ptr(), linear.weight.detach().clone()
    with pytest.raises(KeyError) if fails else torch.no_grad():
        with weights_in([linear], "bfloat16"):
            assert linear.weight.dtype == torch.bfloat16
            assert torch.equal(linear.weight.detach(), before[1].bfloat16())
            if fails:
                raise KeyError
    assert linear.weight.data_ptr() == before[0]
    assert torch.equal(linear.weight.detach(), before[1])


def test_what_shares_the_weight_keeps_its_own():
    embedding, head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    head.weight = embedding.weight
    with weights_in([head], "bfloat16"):
        assert head.weight.dtype == torch.bfloat16 and embedding.weight.dtype == torch.float32
    assert head.weight is embedding.weight


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_what_an_autocast_would_make_of_them(precision):
    linear, autocast = nn.Linear(4, 3), autocast_factory(precision, "cpu")
    with weights_under(autocast, iter([linear])):
        assert linear.weight.dtype == getattr(torch, precision)
    assert linear.weight.dtype == torch.float32


def test_only_parameters_are_cast_and_shared_ones_stay_shared():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    cast_parameters_(model, torch.bfloat16)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16} and model[1].weight is model[0].weight
    assert model[2].running_mean.dtype == torch.float32 and model[2].num_batches_tracked.dtype == torch.int64
