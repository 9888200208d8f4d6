"""Checkpoints that a benchmark trains, and the time that is written beside them."""

import json

from conftest import tiny_recipe
from test_benchmarks import start  # noqa: F401  which finds the scripts

from elastic_sparsity.models import load_base
from elastic_sparsity.run_folder import run_folder

import trained  # isort: skip  found by test_benchmarks


def test_the_sittings_of_a_checkpoint_that_was_moved_away_do_not_count(tmp_path):
    recipe = tiny_recipe(block={"steps": 0}, end_to_end={"trainable": "off"})
    base, folder = load_base(recipe.model.id, recipe.model.dtype), tmp_path / "elastic-s0"
    sittings = tmp_path / "elastic-s0.sittings.json"
    sittings.write_text(json.dumps([{"seconds": 1000.0}]))
    found = trained.trained(recipe, folder, base)[1]
    assert len(found) == 1 and found == json.loads(sittings.read_text())
    assert trained.trained(recipe, folder, base)[1] == found


def test_those_of_an_unfinished_run_do(tmp_path, monkeypatch):
    sittings = tmp_path / "elastic-s0.sittings.json"
    sittings.write_text(json.dumps([{"seconds": 1000.0}]))

    def stop(recipe, folder, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, "optimize", stop)
    with run_folder(tmp_path / "elastic-s0") as run:
        run.claim({}, {})
        try:
            trained.trained(tiny_recipe(), tmp_path / "elastic-s0", None)
        except KeyboardInterrupt:
            assert len(json.loads(sittings.read_text())) == 2
        else:
            raise AssertionError("it was to be trained")
