"""What a run's folds are planned to take: passes as they are made, float32 weights, a file of weights."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity.absorbed_stage import absorb_learned_
from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.feature_stage import StageSettings
from elastic_sparsity.fold_choice import FOLDS, FoldSettings, choose_folds_
from elastic_sparsity.fold_plan import absorbed_passes, fold_passes, fold_terms
from elastic_sparsity.memory_plan import memory_terms, peaks
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.plan_sizes import Choices, Sizes
from elastic_sparsity.planning import plan
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.residual_order import choose_residual_order_
from elastic_sparsity.tiny import tiny_model

SHAPES = read_shapes("random:llama")
CHOICES = Choices(weights="resident", activations="host", trainable="base", precision="float32", gpu=True)


def sizes(*kinds, steps=0):
    stage = {"folds": list(kinds), "steps": steps, "samples": 6, "held_out": 2}
    return Sizes(SHAPES, tiny_recipe(induction=stage, calibration={"samples": 8}), CHOICES)


def counted(kinds):
    """Tokens through blocks, copies of blocks too, while the folds are chosen."""
    z, model = sizes(*(kinds if kinds != ("absorbed",) else ())), tiny_model("llama").requires_grad_(False)
    length, tokens = z.recipe.calibration.length, 0

    def count(_block, args):
        nonlocal tokens
        tokens += args[0].shape[0] * args[0].shape[1]

    for block in decoder_blocks(model):
        block.register_forward_pre_hook(count)
    ids_ST = torch.randint(4, 260, (8, length), generator=torch.Generator().manual_seed(0))
    autocast, ladder = autocast_factory("float32", "cpu"), z.recipe.build_ladder()
    if kinds == ("absorbed",):
        settings = StageSettings(steps=5, held_out=2, paper_start=False)
        generator = torch.Generator().manual_seed(0)
        absorb_learned_(model, ids_ST, ladder, "wanda", settings, generator, autocast)
    elif kinds == ("residual_order",):
        choose_residual_order_(model, ids_ST, ladder, 2, autocast)
    else:
        choose_folds_(model, ids_ST, ladder, kinds, FoldSettings(held_out=2, turn_steps=2), autocast)
    return tokens


@pytest.mark.parametrize("kinds", [*((kind,) for kind in FOLDS), FOLDS, ("residual_order",)], ids="+".join)
def test_passes_are_those_that_are_made(kinds):
    """Beside them the model's first block takes all samples once, to see how blocks are called."""
    planned, found = fold_passes(sizes(*kinds)), counted(kinds)
    few = 2 * 8 * sizes(*kinds).recipe.calibration.length
    assert planned <= found <= planned + few


def test_passes_of_absorbed_scales_are_those_that_are_made():
    stage = {"reading": "absorbed", "steps": 5, "samples": 6, "held_out": 2}
    z = Sizes(SHAPES, tiny_recipe(induction=stage, calibration={"samples": 8}), CHOICES)
    planned, found = sum(absorbed_passes(z)), counted(("absorbed",))
    assert planned <= found <= planned + 2 * 8 * z.recipe.calibration.length
    work = {each.name: each.passes for each in plan(z.recipe, gpu=False, probe=False).work}
    assert (work["norms, held-out errors"], work["absorbed scales"]) == absorbed_passes(z)
    assert "dense logits" not in {each.name for each in plan(z.recipe, gpu=False).work if each.phase == "induction"}


def test_folds_are_in_the_plan():
    with_folds = plan(sizes("values").recipe, gpu=False, probe=False)
    assert {work.phase for work in with_folds.work} >= {"induction"}
    assert any(term.name == "a changed block, masked" for term in with_folds.terms)
    assert "folds" in {work.name for work in with_folds.work}
    without = plan(sizes().recipe, gpu=False, probe=False)
    assert "folds" not in {work.name for work in without.work}
    assert not list(fold_terms(sizes()))


def test_weights_are_float32_in_the_stage_and_on_disk_afterwards():
    halves = Choices(weights="resident", activations="host", trainable="off", precision="bfloat16", gpu=True)
    shapes = replace(SHAPES, dtype=torch.bfloat16)
    places = {}
    for kinds in ([], ["mlp_order"]):
        recipe = tiny_recipe(induction={"folds": kinds, "samples": 4, "held_out": 2}, calibration={"samples": 8})
        terms = memory_terms(shapes, recipe, halves)
        places[bool(kinds)] = {peak.place: peak.bytes for peak in peaks(terms)}
        in_float32 = [term.bytes for term in terms if term.name == "all weights in float32"]
        assert in_float32 == ([2 * shapes.total] if kinds else [])
    assert places[True]["disk"] == places[False]["disk"] + 2 * shapes.total


def test_samples_that_judge_are_not_counted_twice():
    """More samples asked for than there are: hidden states are of all there are, as the stage takes them."""
    recipe = tiny_recipe(induction={"folds": ["values"], "samples": 8, "held_out": 2}, calibration={"samples": 8})
    hidden = next(term for term in fold_terms(Sizes(SHAPES, recipe, CHOICES)) if term.name == "hidden states")
    assert hidden.bytes == 2 * 8 * recipe.calibration.length * SHAPES.width * 4
