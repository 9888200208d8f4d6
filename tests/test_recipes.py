"""Every recipe of the package is valid, and says so if it has not been run here."""

from pathlib import Path

import pytest

from elastic_sparsity.config import read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))
RUN_HERE = {"demo", "small-opt", "smoke", "smollm2-135m"}


def test_the_recipes_are_found():
    assert {path.stem for path in RECIPES} >= RUN_HERE
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_honest(path):
    recipe = read_recipe(path)
    assert recipe.build_ladder().levels
    assert ("NOT RUN HERE" in path.read_text()) == (path.stem not in RUN_HERE)
