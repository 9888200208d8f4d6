"""Readings A and C on tiny models: the function kept or the zeros kept, an oracle each, and what cannot help."""

import copy

import pytest
import torch

from elastic_sparsity.absorbed_stage import absorb_learned_
from elastic_sparsity.arch import linears_of, weight_OI
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.feature_stage import BlockResult, StageSettings
from elastic_sparsity.folding import check_function_kept
from elastic_sparsity.gains import tune_gains_
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

IDS = torch.randint(4, 260, (24, 32), generator=torch.Generator().manual_seed(0))
LADDER = Ladder(sparsities=(0.5,), patterns=("2:4",))
PLAIN = autocast_factory("float32", "cpu")


def settings(**changes):
    return StageSettings(**{"steps": 16, "held_out": 8, "lr": 0.02, "paper_start": False, **changes})


def absorb(model, method, **changes):
    generator = torch.Generator().manual_seed(0)
    return absorb_learned_(model, IDS, LADDER, method, settings(**changes), generator, PLAIN)


@torch.no_grad()
def logits(model):
    return model(IDS[:4], use_cache=False).logits


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_absorbed_scales_keep_the_function_and_lower_the_error_of_magnitudes(family):
    model = tiny_model(family).requires_grad_(False)
    before = logits(model)
    found = absorb(model, "magnitude")
    check_function_kept(before, logits(model), torch.float32)
    assert [type(x) for x in found] == [BlockResult] * 2
    if family in ("llama", "mistral", "qwen3", "opt", "gpt2"):  # random weights: not all have something to gain
        assert any(x.used for x in found)
        assert all(sum(x.after.values()) < 1.001 * sum(x.before.values()) for x in found if x.used)


def test_recorded_errors_are_those_of_the_pruned_block():
    """The masked, folded block of the stage, against the model that came back after one-shot pruning."""
    model, dense = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    found = absorb(model, "magnitude")
    assert found[0].used
    prune_one_shot_(model, IDS, LADDER.levels[0], "magnitude", autocast=PLAIN)
    with torch.no_grad():
        wanted, given = (m(IDS[-8:], output_hidden_states=True).hidden_states[1] for m in (dense, model))
        errors = [float((a - b).square().mean() / b.square().mean()) for a, b in zip(given, wanted, strict=True)]
    assert found[0].after["0.5"] == pytest.approx(sum(errors) / 8, rel=1e-3)


def test_the_entropy_of_importances_takes_the_place_of_eq_8():
    """A large weight of it gathers magnitude in fewer weights than features alone do; Wanda's importances stay."""

    def spread(model):
        linears = linears_of(model).values()
        shares = [weight_OI(x).square() / weight_OI(x).square().sum(1, keepdim=True) for x in linears]
        return sum(float(-torch.special.xlogy(x, x).sum(1).mean()) for x in shares)

    plain, gathered, other = (tiny_model("llama").requires_grad_(False) for _ in range(3))
    before = logits(plain)
    assert any(x.used for x in absorb(plain, "magnitude", spectral=0.0))
    assert any(x.used for x in absorb(gathered, "magnitude", spectral=1.0, penalty="entropy"))
    check_function_kept(before, logits(gathered), torch.float32)
    assert spread(gathered) < spread(plain)
    assert not any(x.used for x in absorb(other, "wanda", spectral=1.0, penalty="entropy"))


def test_wanda_is_not_helped_by_exact_scales():
    """No biases, so no shifts: masks and masked function are what they were, and nothing is used."""
    model = tiny_model("llama").requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for result in absorb(model, "wanda"):
        assert not result.used
        assert result.after == pytest.approx(result.before, rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_wanda_is_helped_by_shifts(family):
    model = tiny_model(family).requires_grad_(False)
    before = logits(model)
    assert any(x.used for x in absorb(model, "wanda", steps=40))
    check_function_kept(before, logits(model), torch.float32)


def test_same_seed_same_weights():
    first, second = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    assert any(x.used for x in absorb(first, "magnitude"))
    absorb(second, "magnitude")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_the_absorbed_stage_refuses():
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match="obs"):
        absorb(model, "obs")
    with pytest.raises(ConfigError, match="held_out"):
        absorb(model, "wanda", held_out=24)
    with pytest.raises(NumericsError, match=r"model\.layers\.0"):
        absorb(model, "magnitude", lr=float("inf"))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_gains_keep_the_zeros_and_lower_the_error(family):
    dense = tiny_model(family).requires_grad_(False)
    pruned = copy.deepcopy(dense)
    prune_one_shot_(pruned, IDS, LADDER.levels[0], "wanda", autocast=PLAIN)
    plain = copy.deepcopy(pruned)
    found = tune_gains_(pruned, dense, IDS, LADDER.levels[0], settings(lr=5e-3), PLAIN)
    if not all(x.used for x in found):
        assert family in ("qwen2", "gemma3_text", "phi3"), "random weights: these have little to gain"
        return
    for name, linear in linears_of(pruned).items():
        old, new = weight_OI(plain.get_submodule(name)), weight_OI(linear)
        assert torch.equal(old == 0, new == 0), name
        assert not torch.equal(old, new), name
        assert (torch.where(old == 0, 1.0, new / old) > 0).all(), name  # gains keep signs
    error = [float((logits(m) - logits(dense)).square().mean()) for m in (plain, pruned)]
    assert error[1] < error[0]


def test_gains_that_do_not_help_are_left_out():
    dense = tiny_model("llama").requires_grad_(False)
    pruned = copy.deepcopy(dense)
    prune_one_shot_(pruned, IDS, LADDER.levels[0], "wanda", autocast=PLAIN)
    plain = copy.deepcopy(pruned)
    assert not any(x.used for x in tune_gains_(pruned, dense, IDS, LADDER.levels[0], settings(lr=0.0), PLAIN))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), plain.parameters(), strict=True))


def test_a_bad_start_is_left_out():
    """Eq. 5 of random weights' outputs is noise: without steps it doubles the error, and the block stays as it was."""
    model = tiny_model("llama").requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = absorb(model, "magnitude", paper_start=True, steps=0)
    assert all(sum(x.after.values()) > sum(x.before.values()) and not x.used for x in found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
