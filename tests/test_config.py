"""Recipes are strict data: every wrong field is named, with the nearest valid key."""

import pytest
from conftest import TINY_RECIPE, tiny_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.config import Recipe, make_recipe, read_recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.fold_choice import check_kinds


def test_defaults_need_only_model_calibration_and_ladder():
    recipe = make_recipe({"model": {"id": "m"}, "calibration": {"source": "self"}, "ladder": {}})
    assert recipe.ladder.sparsities == (0.5, 0.6, 0.7)
    assert recipe.group_ranks() == (8, 8, 8)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("block", {"stepz": 3}, "block.stepz: unknown key; did you mean 'steps'"),
        ("blok", {"steps": 3}, "blok: unknown key; did you mean 'block'"),
        ("block", {"qqq": 3}, "block.qqq: unknown key; known keys: steps, "),
        ("block", {"steps": -1}, "block.steps: .* found -1"),
        ("block", {"steps": "many"}, "block.steps: .* found 'many'"),
        ("calibration", {"length": 0}, "calibration.length"),
        ("calibration", {"source": None}, "calibration.source"),
        ("ladder", {"sparsities": [0.6, 0.5]}, "ladder.sparsities: .* must be strictly increasing"),
        ("ladder", {"sparsities": [0.5, 1.0]}, r"ladder.sparsities: .* within \[0, 1\)"),
        ("ladder", {"patterns": ["2-4"]}, "ladder.patterns: '2-4' is not an N:M pattern"),
        ("ladder", {"group_ends": [0.55]}, "ladder.group_ends: .* reach the sparsest level"),
        ("ladder", {"group_ends": [0.1, 0.7]}, "ladder.group_ends: the groups that end at .* serve no level"),
        ("adapters", {"ranks": [1, 2]}, "adapters.ranks: 2 ranks for 4 groups"),
        ("mixer", {"weights": [1.0]}, "mixer.weights: .* must hold 4 numbers"),
        ("mixer", {"mode": "blend"}, "mixer.mode: .* found 'blend'"),
        ("block", {"samples": 100}, "block.samples: 100 is more than calibration.samples"),
        ("precision", "int4", "precision"),
        ("block", {"steps": "4"}, "block.steps: .* found '4'"),
        ("seed", True, "seed"),
        ("calibration", {"temperature": float("inf")}, "calibration.temperature"),
        ("ladder", {"group_ends": [float("nan")]}, "ladder.group_ends"),
        ("ladder", {"sparsities": [0.5, 0.50000001]}, "ladder.sparsities: .* strictly increasing"),
        ("mixer", {"weights": [float("inf"), 1, 1, 1]}, "mixer.weights"),
    ],
)
def test_wrong_fields_are_named(section, fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(**{section: fields})


@pytest.mark.parametrize(
    ("patterns", "folds"), [(["2:4"], ("values", "mlp_order")), ([], ("values",))], ids=["N:M", "none"]
)
def test_auto_folds_are_those_that_the_ladder_can_use(patterns, folds):
    ladder = {"sparsities": [0.5, 0.7], "patterns": patterns}
    recipe = tiny_recipe(induction={"folds": "auto", "samples": 3, "held_out": 1}, ladder=ladder)
    assert recipe.induction.folds == folds
    check_kinds(folds, recipe.build_ladder())
    assert make_recipe(recipe.model_dump()) == recipe  # as a checkpoint keeps it
    assert tiny_recipe().induction.folds == ()


@pytest.mark.parametrize("folds", ["all", ["auto"]])
def test_other_words_are_no_folds(folds):
    with pytest.raises(ConfigError, match=r"induction\.folds.*(all|auto)"):
        tiny_recipe(induction={"folds": folds})


def test_a_missing_section_is_named():
    with pytest.raises(ConfigError, match="model: missing; every recipe must say it"):
        make_recipe({k: v for k, v in TINY_RECIPE.items() if k != "model"})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError, match=r"(?s)scores.metod.*block.stepz"):
        tiny_recipe(block={"stepz": 1}, scores={"metod": "wanda"})


def test_recipe_survives_json():
    recipe = tiny_recipe()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="not a readable TOML"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a readable TOML"):
        read_recipe(tmp_path / "binary.toml")


values = st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=4), st.lists(st.floats(), max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), st.one_of(values, st.dictionaries(
    st.sampled_from(["id", "source", "samples", "sparsities", "patterns", "ranks", "steps", "weights", "zz"]), values
)), max_size=5))  # fmt: skip
def test_any_data_gives_a_recipe_or_a_config_error(data):
    try:
        assert isinstance(make_recipe({**TINY_RECIPE, **data}), Recipe)
    except ConfigError as error:
        assert str(error)
