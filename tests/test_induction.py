"""Learned channel scales: they lower the pruned models' KL, leave the model as it was, and never make it worse."""

import pytest
import torch
from torch import nn

from elastic_sparsity import induction
from elastic_sparsity.arch import head_function, linears_of, weight_OI
from elastic_sparsity.baselines import prune_one_shot_, pruned_weight
from elastic_sparsity.distill import Share
from elastic_sparsity.errors import ConfigError, NumericsError, ShapeError
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.induction import InductionSettings, ScaledLinear, learn_channel_scales
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

LADDER = Ladder(sparsities=(0.5, 0.7), patterns=("2:4",))
IDS = torch.randint(4, 260, (72, 32), generator=torch.Generator().manual_seed(0))
PLAIN = autocast_factory("float32", "cpu")
SETTINGS = InductionSettings(steps=30, batch_size=8, lr=0.03, temperature=0.5, samples=8, held_out=8)


def learn(model, method="wanda", **changes):
    settings = InductionSettings(**{**{n: getattr(SETTINGS, n) for n in SETTINGS.__slots__}, **changes})
    places = Share(places=range(settings.batch_size), num_samples=len(IDS))
    return learn_channel_scales(
        model, head_function(model), LADDER, IDS, method, settings, torch.Generator().manual_seed(0), PLAIN, places
    )


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_scales_of_every_family_help_and_the_model_stays(family):
    model = tiny_model(family).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    found = learn(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert list(found.scales) == list(linears_of(model))
    for name, scale in found.scales.items():
        assert scale.shape == (weight_OI(model.get_submodule(name)).shape[1],)
        assert float(scale.log().mean()) == pytest.approx(0, abs=1e-5)
    assert found.used
    assert sum(found.kl_after.values()) < sum(found.kl_before.values())


def test_what_does_not_help_is_not_used():
    model = tiny_model("llama").requires_grad_(False)
    found = learn(model, steps=1, lr=0.0)
    assert not found.used
    assert all((scale == 1).all() for scale in found.scales.values())


def scripted(monkeypatch, *judgements):
    """Held-out KLs that are said and not measured."""
    rest = list(judgements)
    monkeypatch.setattr(
        induction, "_held_out_kl", lambda *args: dict(zip(("0.5", "0.7", "2:4"), rest.pop(0), strict=True))
    )
    return rest


def test_scales_are_weakened_until_no_level_loses(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    rest = scripted(monkeypatch, (1, 1, 1), (0.5, 0.5, 0.9))
    whole = learn(model)
    assert whole.used and whole.kl_after["2:4"] == 0.9 and not rest
    rest = scripted(monkeypatch, (1, 1, 1), (0.5, 0.5, 1.1), (0.7, 0.7, 0.99))
    half = learn(model)
    assert half.used and half.kl_after["2:4"] == 0.99 and not rest
    for name, scale in half.scales.items():
        torch.testing.assert_close(scale, whole.scales[name].sqrt())
    rest = scripted(monkeypatch, (1, 1, 1), (0.5, 0.5, 1.1), (0.7, 0.7, 1.05), (0.9, 0.9, 1.01))
    none = learn(model)
    assert not none.used and not rest and none.kl_after["2:4"] == 1.1, "as learned"
    assert all((scale == 1).all() for scale in none.scales.values())
    scripted(monkeypatch, (0, 1, 1), *[(0, 1, 1)] * 3)
    assert not learn(model).used, "a level without error has nothing to gain"


def test_same_seed_same_scales():
    model = tiny_model("llama").requires_grad_(False)
    first, second = learn(model), learn(model)
    assert first.used, "all scales are one, which says nothing"
    assert all(torch.equal(first.scales[name], second.scales[name]) for name in first.scales)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_held_out_kl_is_that_of_the_pruned_model(method):
    """The stage's own masks, against weights pruned by hand with scores from hooks on the dense model."""
    model = tiny_model("llama").requires_grad_(False)
    found = learn(model, method, steps=0)
    inputs, handles = {}, []
    for name in list(linears_of(model)):
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
            )
        )
    model(IDS[:8])
    [handle.remove() for handle in handles]
    with torch.no_grad():
        dense = model(IDS[-8:]).logits.log_softmax(-1)
        for name in list(linears_of(model)):
            weight = model.get_submodule(name).weight
            scores = weight.abs() * (torch.cat(inputs[name]).norm(dim=0) if method == "wanda" else 1)
            order = scores.argsort(1, descending=True)
            weight.scatter_(1, order[:, weight.shape[1] // 2 :], 0.0)
        pruned = model(IDS[-8:]).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    assert found.kl_before["0.5"] == pytest.approx(expected, rel=1e-4)


def test_input_gradient_is_the_masked_products():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8).requires_grad_(False)
    scaled = ScaledLinear(linear, lambda: linear.weight.abs(), 0.5)
    scaled.set_level_(LADDER.levels[0])
    x = torch.randn(5, 16, requires_grad=True)
    scaled(x).square().sum().backward()
    again = x.detach().clone().requires_grad_(True)
    mask = torch.zeros(8, 16).scatter_(1, linear.weight.abs().argsort(1, descending=True)[:, :8], 1.0)
    nn.functional.linear(again, linear.weight * mask, linear.bias).square().sum().backward()
    assert torch.allclose(x.grad, again.grad, atol=1e-5)
    scaled.set_level_(None)
    assert torch.equal(scaled(x), linear(x))


def test_scales_choose_masks_of_every_method():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16), torch.randn(64, 16)
    statistics = InputStatistics(16, gram=True)
    statistics.update(x)
    scale = torch.ones(16)
    scale[3] = 1e6  # this channel must survive everywhere
    for method in ("magnitude", "wanda", "obs"):
        plain = importance_scores(method, weight, statistics, 0.01, "here")
        scaled = importance_scores(method, weight, statistics, 0.01, "here", scale)
        assert torch.equal(plain[:, :3], scaled[:, :3])
        assert (scaled.argmax(1) == 3).all()
    for level in LADDER.levels:
        for method in ("wanda", "sparsegpt"):
            pruned = pruned_weight(weight, statistics, level, method, 0.01, "here", scale)
            assert (pruned[:, 3] != 0).all()
    with pytest.raises(ShapeError, match="here"):
        importance_scores("wanda", weight, statistics, 0.01, "here", torch.ones(15))


@pytest.mark.parametrize("level", LADDER.levels, ids=lambda level: level.name)
def test_sparsegpt_updates_what_learned_masks_keep_by_half(level):
    torch.manual_seed(0)
    weight, x, scale = torch.randn(6, 16), torch.randn(64, 16) @ torch.randn(16, 16), torch.rand(16) + 0.1
    statistics = InputStatistics(16, gram=True)
    statistics.update(x)

    def pruned(method, *update):
        return pruned_weight(weight, statistics, level, method, 0.01, "here", scale, *update)

    kept, whole, half = pruned("wanda"), pruned("sparsegpt", 1.0), pruned("sparsegpt")
    assert torch.equal(pruned("sparsegpt", 0.0), kept)
    assert torch.equal(whole != 0, kept != 0) and not torch.equal(whole, kept)
    torch.testing.assert_close(half, (kept + whole) / 2)
    by_itself = pruned_weight(weight, statistics, level, "sparsegpt", 0.01, "here")
    assert torch.equal(pruned_weight(weight, statistics, level, "sparsegpt", 0.01, "here", torch.ones(16)), by_itself)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs", "sparsegpt"])
def test_ones_change_nothing(method):
    plain, scaled = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    ones = {name: torch.ones(weight_OI(plain.get_submodule(name)).shape[1]) for name in linears_of(plain)}
    prune_one_shot_(plain, IDS, LADDER.levels[0], method, autocast=PLAIN)
    prune_one_shot_(scaled, IDS, LADDER.levels[0], method, autocast=PLAIN, channel_scales=ones)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_too_few_samples():
    with pytest.raises(ConfigError, match="held_out"):
        learn(tiny_model("llama").requires_grad_(False), held_out=65)


def test_scales_that_are_not_finite_name_the_knob():
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(NumericsError, match="induction.lr"):
        learn(model, lr=float("inf"))
    assert isinstance(model.get_submodule(next(iter(linears_of(model)))), nn.Linear), "the model is not as it was"
