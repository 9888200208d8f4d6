"""The supernet: masks by order, prices by gradient, the expected stream, and the loss that judges allocations."""

from contextlib import nullcontext

import pytest
import torch

from elastic_sparsity.allocation import uniform
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.supernet import Supernet, TopKL, top_kl
from elastic_sparsity.tiny import tiny_model

SPARSITIES = (0.5, 0.6, 0.7)
IDS = torch.randint(0, 200, (6, 24), generator=torch.Generator().manual_seed(0))


def scored(family="llama", method="wanda", sparsities=SPARSITIES):
    net = Supernet(tiny_model(family))
    net.score_(IDS, sparsities, method, 0.01, 4, nullcontext)
    return net


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_allocation_masks_that_many_a_row_and_dense_comes_back(family):
    net, dense = scored(family), tiny_model(family).state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in net.model.state_dict().items())
    kept = [1 + 3 * i % size.width for i, size in enumerate(net.sizes)]
    net.apply_(kept)
    denser = [min(size.width, count + 2) for size, count in zip(net.sizes, kept, strict=True)]
    masks = [weight_OI(x) != 0 for x in linears_of(net.model).values()]
    assert [mask.sum(1).unique().tolist() for mask in masks] == [[count] for count in kept]
    net.apply_(denser)
    for mask, linear in zip(masks, linears_of(net.model).values(), strict=True):
        assert not (mask & (weight_OI(linear) == 0)).any()
    net.restore_()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in net.model.state_dict().items())
    with pytest.raises(ShapeError, match="0 kept of"):
        net.apply_([0] * len(net.sizes))


def test_the_first_block_is_wandas_and_later_ones_see_the_expected_stream():
    """The masks of one level alone are those of one-shot pruning in the first block, and others behind it."""
    level, net = Ladder(sparsities=(0.6,)).levels[0], scored(sparsities=(0.6,))
    net.apply_(uniform(net.sizes, 0.6))
    model = tiny_model("llama")
    prune_one_shot_(model, IDS, level, "wanda", autocast=nullcontext)
    same = [
        torch.equal(weight_OI(a), weight_OI(b))
        for a, b in zip(linears_of(net.model).values(), linears_of(model).values(), strict=True)
    ]
    assert all(same[: len(same) // len(decoder_blocks(model))])
    assert not all(same)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prices_are_the_gradient_summed_over_the_weights_that_would_come_or_go(family):
    net = scored(family)
    loss = TopKL(net.model, IDS, nullcontext)  # of the dense model, which `score_` leaves behind
    kept = uniform(net.sizes, 0.6)
    net.apply_(kept)
    prices = net.prices(lambda: loss.backward([0, 3]))
    assert all(parameter.grad is None for parameter in net.model.parameters())
    linear, dense, rank, count = net._linears[5], net._dense[5], net._rank[5], kept[5]
    linear.weight.requires_grad_(True)
    loss.backward([0, 3])
    product = weight_OI(linear).detach() * 0 + (linear.weight.grad * dense if family == "llama" else 0)
    if family == "gpt2":  # stored (I, O)
        product = (linear.weight.grad * dense).T
    for other in (0, 1, count - 3, count, count + 2, net.sizes[5].width):
        changed = (rank < other).float() - (rank < count).float()
        torch.testing.assert_close(float(prices[5][other]), float((changed * product).sum()), rtol=1e-4, atol=1e-7)


def test_prices_predict_a_small_change_of_the_judge():
    """One weight a row more or less, of a model whose dropped weights are small: first order is nearly all."""
    net = Supernet(tiny_model("llama").double())
    loss = TopKL(net.model, IDS, nullcontext)
    net.score_(IDS, (0.6,), "magnitude", 0.01, 4, nullcontext)
    kept = uniform(net.sizes, 0.6)
    for dense, rank, count in zip(net._dense, net._rank, kept, strict=True):
        dense[(rank >= count - 1) & (rank <= count)] *= 1e-3
    net.apply_(kept)
    before, prices = loss(range(6)), net.prices(lambda: loss.backward(range(6)))
    for i in range(0, len(kept), 4):
        for change in (1, -1):
            net.apply_([k + change * (j == i) for j, k in enumerate(kept)])
            assert loss(range(6)) - before == pytest.approx(float(prices[i][kept[i] + change]), rel=0.1, abs=1e-7)


def test_prices_refuse_what_has_no_gradient():
    net = scored()
    with pytest.raises(ShapeError, match="no gradient; apply an allocation"):
        net.prices(lambda: None)
    loss = TopKL(net.model, IDS, nullcontext)
    net.apply_(uniform(net.sizes, 0.6))
    with torch.no_grad():
        next(iter(decoder_blocks(net.model)[0].parameters())).fill_(torch.nan)
    with pytest.raises(NumericsError, match="gradient is not finite"):
        net.prices(lambda: loss.backward([0]))
    assert not any(parameter.requires_grad for linear in net._linears for parameter in linear.parameters())


def test_accumulation_changes_what_the_next_block_is_scored_on():
    orders = [scored(sparsities=levels)._rank for levels in ((0.1,), (0.9,))]
    equal = [torch.equal(a, b) for a, b in zip(*orders, strict=True)]
    assert all(equal[:7])
    assert not all(equal[7:])


def test_top_kl_of_all_tokens_is_the_kl_and_of_fewer_at_most():
    random = torch.Generator().manual_seed(0)
    p, q = (
        (3 * torch.randn(5, 40, generator=random)).log_softmax(-1),
        torch.randn(5, 40, generator=random).log_softmax(-1),
    )
    whole = (p.exp() * (p - q)).sum(-1)
    best = p.topk(39, dim=-1).indices
    torch.testing.assert_close(top_kl(p.gather(1, best), q.gather(1, best)), whole, rtol=1e-3, atol=1e-4)
    few = p.topk(5, dim=-1).indices
    found = top_kl(p.gather(1, few), q.gather(1, few))
    assert ((found <= whole + 1e-5) & (found > 0)).all()


def test_the_judge_is_zero_for_the_dense_model_and_independent_of_order():
    model = tiny_model("llama")
    judge = TopKL(model, IDS, nullcontext)
    assert judge([0, 3]) == pytest.approx(0, abs=1e-6)
    prune_one_shot_(model, IDS, Ladder(sparsities=(0.7,)).levels[0], "magnitude", autocast=nullcontext)
    assert judge([0, 3]) == pytest.approx((judge([0]) + judge([3])) / 2)
    assert judge([3]) > 0


def test_learned_scales_order_the_weights_of_a_search():
    scales = {"model.layers.0.self_attn.q_proj": torch.linspace(0.1, 10, 32)}
    plain, scaled = Supernet(tiny_model("llama")), Supernet(tiny_model("llama"))
    plain.score_(IDS, SPARSITIES, "wanda", 0.01, 4, nullcontext)
    scaled.score_(IDS, SPARSITIES, "wanda", 0.01, 4, nullcontext, channel_scales=scales)
    assert scaled.sizes[0].name == next(iter(scales))
    assert not torch.equal(plain._rank[0], scaled._rank[0])
    assert torch.equal(plain._rank[1], scaled._rank[1])


def test_outliers_are_the_share_of_scores_above_five_times_their_mean():
    """OWL's layer outlier distribution (arXiv 2310.05175), by hand for the first block."""
    net, model = scored(), tiny_model("llama")
    inputs = {}
    block = decoder_blocks(model)[0]

    def seen(linear, args):
        inputs[linear] = args[0].flatten(0, 1)

    for linear in linears_of(model).values():
        linear.register_forward_pre_hook(seen)
    with torch.no_grad():
        model(IDS)
    scores = torch.cat([
        (linear.weight.abs() * inputs[linear].norm(dim=0)).flatten()
        for linear in block.modules() if isinstance(linear, torch.nn.Linear)
    ])  # fmt: skip
    assert net.outliers[0] == pytest.approx(float((scores > 5 * scores.mean()).float().mean()), abs=1e-4)
    assert net.outliers[0] > 0


def test_the_expected_weight_is_the_levels_average_each_by_what_it_keeps():
    """Eq. 5 of arXiv 2503.09657: dense counts 1, a level of 60 % counts 0.4."""
    net = scored(sparsities=(0.6,))
    linear, rank, dense, width = net._linears[0], net._rank[0], net._dense[0], net.sizes[0].width
    net._set_expected_(0, (0.6,))
    kept = keep_count(width, 0.6)
    torch.testing.assert_close(linear.weight.data, torch.where(rank < kept, dense, dense / 1.4))
