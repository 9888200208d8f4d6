"""The benchmarks' schedules spend the tokens they say, and the planner counts what really goes through the blocks."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import optimize, pipeline, read_recipe
from elastic_sparsity.config import make_recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.inducing import check_stages
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.model_shapes import read_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import counting
import schedules


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A function that runs a recipe and gives its counter."""
    found = []
    prepare = pipeline.prepare

    def observed(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        found.append(counting.PassCounter(prepared[0].blocks))
        return prepared

    monkeypatch.setattr(pipeline, "prepare", observed)

    def run(recipe):
        optimize(recipe, tmp_path / f"run{len(found)}")
        return found[-1]

    return run


def planned(recipe):
    passes = {}
    for work in schedules.planned_work(recipe, read_shapes(recipe.model.id)):
        if not work.is_head:
            passes[work.direction] = passes.get(work.direction, 0) + work.passes
    return passes


@pytest.fixture
def recipe(words):
    return schedules.elastic(
        tiny_recipe(calibration={"source": str(words), "samples": 6, "length": 16}, end_to_end={"steps": 8}), 0
    )


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("the fox over the stone river lamp green wolf paper door salt " * 40)
    return path


def test_a_run_for_one_level_trains_on_what_the_elastic_run_spends_on_it(recipe, counted):
    elastic = counted(recipe).trained
    depth = 2
    for level in recipe.build_ladder().levels:
        alone = counted(schedules.independent(recipe, level)).trained
        assert alone == {level.name: elastic[level.name]} == {level.name: depth * schedules.level_tokens(recipe)}
    everything = schedules.full_weight(recipe, level)
    assert counted(everything).trained == {level.name: elastic[level.name]}
    assert everything.block.samples == 6  # all that there are
    block_alone = schedules.full_weight(recipe, level, block_phase_only=True)
    assert counted(block_alone).trained == {level.name: depth * 2 * 2 * 16}  # steps, batch, tokens
    assert block_alone.block.samples == 4


@pytest.mark.parametrize(("samples", "expected"), [(100, 8), (7, 7), (5, 5)])
def test_full_weights_see_as_many_samples_as_their_tokens_hold(samples, expected, recipe):
    """Two steps of the block phase and two of eight end to end, of two samples each."""
    wanted = schedules.changed(recipe, {"calibration": {"samples": samples}})
    full = schedules.full_weight(wanted, wanted.build_ladder().levels[0])
    assert (full.block.steps, full.block.samples) == (4, expected)
    assert schedules.amounts(full) == {
        "block_steps": 4, "block_samples": expected, "block_batch": 2, "end_to_end_steps": 0, "end_to_end_batch": 2,
    }  # fmt: skip
    larger = schedules.changed(wanted, {"block": {"samples": 5}, "end_to_end": {"trainable": "off"}})
    full = schedules.full_weight(larger, level=larger.build_ladder().levels[0])
    assert (full.block.steps, full.block.samples) == (2, 5), "never fewer than the elastic run's masks see"


def test_uneven_steps_are_rounded_up(recipe, counted):
    uneven = schedules.changed(recipe, {"end_to_end": {"steps": 6}})
    elastic = counted(uneven).trained
    most = max(elastic.values())
    assert set(elastic.values()) == {most, most - 2 * 2 * 16}
    assert 2 * schedules.level_tokens(uneven) == most


def test_a_level_gets_the_rank_it_adds_up(recipe):
    levels = recipe.build_ladder().levels
    assert [schedules.independent(recipe, level).adapters.ranks for level in levels] == [2, 4, 6, 4]
    alone = schedules.changed(recipe, {"adapters": {"inheritance": "none"}})
    assert [schedules.independent(alone, level).adapters.ranks for level in levels] == [2, 2, 2, 2]


def test_what_each_run_trains(recipe):
    level = Ladder(sparsities=(0.5, 0.6, 0.7)).levels[1]
    lora = schedules.independent(recipe, level, trainable="adapters")
    assert (lora.end_to_end.trainable, lora.block.base_lr, lora.ladder.sparsities) == ("adapters", 0.0, (0.6,))
    full = schedules.full_weight(recipe, level, 1e-4)
    assert (full.end_to_end.trainable, full.block.base_lr, full.adapters.ranks) == ("off", 1e-4, 0)
    same = schedules.independent(recipe, level, same_steps=True)
    assert (same.end_to_end.steps, same.block.steps) == (recipe.end_to_end.steps, recipe.block.steps)
    assert schedules.amounts(same) == schedules.amounts(recipe) and len(same.build_ladder().levels) == 1
    sloped = schedules.changed(recipe, {"allocation": {"slope": [0.1, 0.2, 0.3]}})
    assert schedules.independent(sloped, level).allocation.slope == 0.2
    searched = schedules.changed(recipe, {"allocation": {"search": True, "held_out": 2}})
    assert [schedules.independent(searched, x).allocation.search for x in recipe.build_ladder().levels] == [
        x.pattern is None for x in recipe.build_ladder().levels
    ]


@pytest.mark.parametrize("level", read_recipe(schedules.RECIPES / "smollm2-135m.toml").build_ladder().levels, ids=str)
def test_every_level_of_the_shipped_recipe_can_be_run_alone(level):
    """Not all that a ladder may ask for suits each of its levels: orders of channels are for patterns alone."""
    recipe = schedules.elastic(read_recipe(schedules.RECIPES / "smollm2-135m.toml"), 0)
    made = schedules.independent(recipe, level)
    check_stages(made)
    orders = {"value_order", "mlp_order"}
    assert set(recipe.induction.folds) - set(made.induction.folds) == (set() if level.pattern else orders)
    assert made.allocation.search == (level.pattern is None)


FOLDED = {"folds": ["values", "query_key", "mlp_order"], "samples": 3, "held_out": 1}


def test_a_run_without_induction_gets_its_passes(recipe):
    """Folds' and scales', as planned (`test_fold_plan` counts them); less than a step's passes are too many."""
    shapes = read_shapes(recipe.model.id)
    for stage in (FOLDED, {**FOLDED, "steps": 6, "batch_size": 2}):
        induced = schedules.changed(recipe, {"induction": stage})
        plain = schedules.without_induction(induced, shapes)
        assert not plain.induction.is_asked and plain.end_to_end.steps > recipe.end_to_end.steps
        one_step = 2 * 2 * recipe.end_to_end.batch_size * recipe.calibration.length
        planned_more = schedules.block_passes(plain, shapes) - schedules.block_passes(induced, shapes)
        assert 0 <= planned_more < one_step
    with pytest.raises(ConfigError, match="elastic-uninduced"):
        schedules.without_induction(recipe, shapes)


def test_a_level_alone_needs_nothing_of_a_search_it_does_not_make(recipe):
    fine = {"allocation": {"search": True, "held_out": 2, "strength": 0.5}, "structured": {"fractions": [0.5]}}
    for level in recipe.build_ladder().levels:
        alone = schedules.independent(schedules.changed(recipe, fine), level)
        assert alone.allocation.strength == (None if level.pattern else 0.5) and not alone.structured.fractions
    unprepared = schedules.changed(schedules.changed(recipe, fine), schedules.UNPREPARED)
    assert not unprepared.allocation.search and not unprepared.structured.fractions


def test_epts_gets_the_elastic_runs_passes(recipe, counted):
    longer = schedules.changed(recipe, {"end_to_end": {"steps": 40}})
    epts = schedules.epts(longer, read_shapes(recipe.model.id))
    one_step = 2 * 7 * 16 * epts.block.batch_size
    assert abs(counted(epts).passes.total() - counted(longer).passes.total()) <= one_step / 2
    assert (epts.scores.stream, epts.block.loss, epts.block.densest_weight) == ("dense", "mse", 0.5)
    assert epts.group_ranks() == (8,) * 7 and epts.mixer_weights() == (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2)
    assert {0.5, 0.6, 0.7} <= set(epts.ladder.sparsities) and not epts.ladder.patterns
    official = schedules.epts(longer, read_shapes(recipe.model.id), official=True)
    assert (official.block.steps, official.block.samples) == (1280, 6)
    assert epts.block.batch_size == 6, "2,048 tokens a step are 128 samples of 16, and there are 6"
    long = schedules.changed(recipe, {"calibration": {"length": 512, "samples": 600}, "end_to_end": {"steps": 2000}})
    theirs = [schedules.epts(long, read_shapes(recipe.model.id), official=official).block for official in (False, True)]
    assert [(block.samples, block.batch_size) for block in theirs] == [(128, 4), (512, 4)]


def test_epts_needs_tokens_for_a_step(recipe):
    nothing = schedules.changed(recipe, {"end_to_end": {"trainable": "off"}, "block": {"steps": 0}})
    with pytest.raises(ConfigError, match="do not give it one step a block"):
        schedules.epts(nothing, read_shapes(recipe.model.id))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": {"mode": "learned"}},
        {"mixer": {"mode": "fixed"}},
        {"mixer": {"mode": "dense"}},
        {"scores": {"stream": "dense"}, "end_to_end": {"trainable": "off"}},
        {"block": {"samples": 5, "batch_size": 3}},
        {"block": {"samples": 2, "batch_size": 3}},
        {"block": {"steps": 0}},
    ],
    ids=str,
)
def test_planned_passes_are_those_that_run(changes, recipe, counted):
    wanted = schedules.changed(recipe, changes)
    assert counted(wanted).passes == planned(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": {"sparsities": [0.4, 0.5], "patterns": [], "group_ends": [0.5]}}, "group_ends"),
        ({"allocation": {"plan": "plan.json"}}, "allocation.plan"),
    ],
)
def test_recipes_without_a_level_of_its_own(changes, message, recipe):
    data = recipe.model_dump(mode="json")
    for section, fields in changes.items():
        data[section] |= fields
    with pytest.raises(ConfigError, match=message):
        schedules.elastic(make_recipe(data), 0)


def test_what_is_trained_does_not_depend_on_free_memory(recipe):
    auto = schedules.changed(recipe, {"end_to_end": {"trainable": "auto"}})
    assert schedules.elastic(auto, 3).end_to_end.trainable == "base" and schedules.elastic(auto, 3).seed == 3
    none = schedules.changed(auto, {"end_to_end": {"steps": 0}})
    assert schedules.elastic(none, 0).end_to_end.trainable == "off"


def test_scores_of_the_dense_stream_are_the_dense_models(recipe, tmp_path):
    """Masks of every linear against Wanda's from input norms that hooks see in the dense model."""
    from elastic_sparsity.calibration_text import calibration_tokens
    from elastic_sparsity.models import load_base
    from elastic_sparsity.slicing import load_level

    wanted = schedules.changed(recipe, {"scores": {"stream": "dense"}, "block": {"steps": 0},
                                        "end_to_end": {"trainable": "off"}})  # fmt: skip
    masks = {}
    for stream in ("dense", "pruned"):
        run = optimize(schedules.changed(wanted, {"scores": {"stream": stream}}), tmp_path / stream)
        level = run.ladder.find(0.7)
        parameters = dict(load_level(run, level, torch.float32).named_parameters())
        masks[stream] = {name: parameters[f"{name}.weight"] != 0 for name in run.linears}
    base = load_base(wanted.model.id)
    ids = calibration_tokens(wanted, base)[0][: wanted.block.samples]
    squares = {}

    def hook(name):
        def add(module, args):
            squares[name] = squares.get(name, 0) + args[0].detach().double().flatten(0, -2).square().sum(0)

        return add

    for name in masks["dense"]:
        base.model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        base.model(ids)
    for name, mask in masks["dense"].items():
        weight = base.model.get_submodule(name).weight
        scores = weight.abs() * squares[name].sqrt()
        kept = mask.sum(1)
        order = scores.argsort(dim=1, descending=True)
        ours = torch.zeros_like(mask)
        for row in range(mask.shape[0]):
            ours[row, order[row, : kept[row]]] = True
        assert torch.equal(mask, ours), name
    assert any(not torch.equal(masks["dense"][name], masks["pruned"][name]) for name in masks["dense"])
