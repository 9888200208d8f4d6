"""Folds chosen on held-out errors: the function stays, the errors are those of blocks pruned by hand, none loses."""

import itertools

import pytest
import torch

from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.errors import AbsorptionError, ConfigError
from elastic_sparsity.fold_choice import FOLDS, FoldSettings, choose_folds_
from elastic_sparsity.folding import check_function_kept
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

IDS = torch.randint(4, 260, (10, 24), generator=torch.Generator().manual_seed(0))
LADDER = Ladder(sparsities=(0.5,), patterns=("2:4",))
PLAIN = autocast_factory("float32", "cpu")
TURNED = ("llama", "mistral", "qwen2", "gemma2", "phi3", "gpt_neox")


def choose(model, kinds, ladder=LADDER, held_out=4):
    return choose_folds_(model, IDS, ladder, kinds, FoldSettings(held_out=held_out, turn_steps=10), PLAIN)


@torch.no_grad()
def logits(model):
    return model(IDS[:2], use_cache=False).logits


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_function_stays_and_no_error_grows(family):
    model = tiny_model(family).requires_grad_(False)
    before, size = logits(model), model.num_parameters()
    kinds = FOLDS if family in TURNED else tuple(kind for kind in FOLDS if kind != "query_key")
    found = choose(model, kinds)
    check_function_kept(before, logits(model), torch.float32)
    assert model.num_parameters() == size
    assert [x.kind for x in found] == [*kinds, *kinds]
    assert any(x.used for x in found)
    for x in found:
        assert x.used == (x.chosen != "none")
        assert (x.after == x.before) == (not x.used)
    for earlier, later in itertools.pairwise(found):  # norms from the cache say what a new pass would
        if later.kind != kinds[0]:
            assert later.before["2:4"] == pytest.approx(earlier.after["2:4"], rel=1e-3)


def test_errors_are_those_of_the_block_pruned_by_hand():
    """Statistics behind all folds from the cache, against `prune_one_shot_`, which makes a pass on the folded model."""
    model, dense = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    last = next(x for x in choose(model, FOLDS) if x.kind == "mlp_order")
    prune_one_shot_(model, IDS[:6], LADDER.levels[1], "wanda", autocast=PLAIN)
    with torch.no_grad():
        wanted, given = (m(IDS[-4:], output_hidden_states=True).hidden_states[1] for m in (dense, model))
    errors = [float((a - b).square().mean() / b.square().mean()) for a, b in zip(given, wanted, strict=True)]
    assert last.after["2:4"] == pytest.approx(sum(errors) / 4, rel=1e-3)


def test_folded_values_and_output_weights_keep_their_proportion():
    """So that one learning rate suits both afterwards, as it did before."""

    def proportions(model):
        weights = [(b.self_attn.v_proj.weight, b.self_attn.o_proj.weight) for b in decoder_blocks(model)]
        return [float(value.detach().square().mean() / out.detach().square().mean()) for value, out in weights]

    model = tiny_model("llama").requires_grad_(False)
    before = proportions(model)
    assert any(x.chosen == "balanced" for x in choose(model, ["values"]))
    assert proportions(model) == pytest.approx(before, rel=0.1)


def test_same_choice_again():
    first, second = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    assert choose(first, FOLDS) == choose(second, FOLDS)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_does_not_help_is_left_out():
    """Weights of one size and inputs of one norm: no order keeps more than another."""
    model = tiny_model("llama").requires_grad_(False)
    for block in decoder_blocks(model):
        block.mlp.down_proj.weight.fill_(0.1)
        block.mlp.up_proj.weight.copy_(block.mlp.up_proj.weight[:1].clone())
        block.mlp.gate_proj.weight.copy_(block.mlp.gate_proj.weight[:1].clone())
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert [x.chosen for x in choose(model, ["mlp_order"])] == ["none", "none"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_refused():
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match="'turns' is unknown"):
        choose(model, ["turns"])
    with pytest.raises(ConfigError, match="'mlp_order' changes N:M masks alone"):
        choose(model, ["mlp_order"], Ladder(sparsities=(0.5,)))
    with pytest.raises(ConfigError, match="held_out"):
        choose(model, ["values"], held_out=10)


def test_a_kind_without_an_exact_form_is_refused_before_anything_is_folded(monkeypatch):
    model = tiny_model("opt").requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr("elastic_sparsity.fold_choice.BlockRunner", None)
    with pytest.raises(AbsorptionError, match="no RoPE"):
        choose(model, ["values", "query_key"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_groups_wider_than_a_head_get_no_order_within_heads():
    model = tiny_model("llama").requires_grad_(False)
    before, wide = logits(model), Ladder(sparsities=(0.5,), patterns=("8:16",))
    found = choose(model, ["values", "value_order"], wide)
    assert [x.chosen for x in found if x.kind == "value_order"] == ["none", "none"]
    assert any(x.used for x in found if x.kind == "values")
    check_function_kept(before, logits(model), torch.float32)


def test_a_basis_that_cannot_be_inverted_well_is_no_candidate(monkeypatch):
    """Values of few samples leave most directions of a head empty."""
    monkeypatch.setattr("elastic_sparsity.fold_choice.MAX_CONDITION", 4.0)
    found = choose(tiny_model("llama").requires_grad_(False), ["values"])
    assert {x.chosen for x in found} <= {"none", "principal", "turned"}
    monkeypatch.undo()
    assert "balanced" in {x.chosen for x in choose(tiny_model("llama").requires_grad_(False), ["values"])}
