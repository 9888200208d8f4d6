"""The scripts about allocation and structured pruning as a user starts them, on a tiny random model."""

import json

import pytest
from test_benchmarks import place, start, started  # noqa: F401  place is a fixture

import allocation  # isort: skip  found by test_benchmarks
import structured  # isort: skip

from elastic_sparsity.allocating import Allocating, allocate
from elastic_sparsity.allocation_file import load_plan, save_plan
from elastic_sparsity.config import make_recipe


@pytest.fixture
def results(tmp_path):
    return tmp_path


@pytest.fixture
def texts(place, results):  # noqa: F811
    files = ("--calibration", place / "calibration.txt", "--evaluation", place / "evaluation.txt")
    return *files, "--results", results, "--precision", "float32"


def plan_file(place, path):  # noqa: F811
    recipe = make_recipe(
        {
            "model": {"id": "random:llama"},
            "calibration": {"source": str(place / "calibration.txt"), "samples": 8, "length": 16},
            "block": {"samples": 4},
            "ladder": {"sparsities": [0.5, 0.7]},
        }
    )
    allocate(recipe, Allocating(method="arithmetic", held_out=4), path)
    return path


def test_allocation_fills_cells_and_goes_on(results, texts, place, tmp_path):  # noqa: F811
    plan = plan_file(place, tmp_path / "arithmetic.json")
    few = [*texts, "--model", "random:llama", "--samples", "4", "--length", "16", "--window", "32", "--levels", "0.7"]
    text = started(allocation, plan, *few, "--methods", "wanda")
    found = json.loads((results / "allocation.json").read_text())
    assert list(found["cells"]) == ["wanda/0.7/uniform", "wanda/0.7/arithmetic"]
    assert all(1 < cell["perplexity"] < 1e6 for cell in found["cells"].values()) and found["dense"] > 1
    assert "arithmetic" in text and f"{found['cells']['wanda/0.7/uniform']['perplexity']:.1f}" in text
    assert (results / "allocation.png").read_bytes().startswith(b"\x89PNG")
    before = dict(found["cells"])
    started(allocation, plan, *few, "--methods", "wanda", "magnitude")
    found = json.loads((results / "allocation.json").read_text())
    assert {name: found["cells"][name] for name in before} == before and len(found["cells"]) == 4
    other = load_plan(plan)  # of the same name, but one weight a row moved
    first, second = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    kept = {name: linear.kept[1] + (name == first) - (name == second) for name, linear in other.linears.items()}
    for name, linear in other.linears.items():
        linear.kept[1] = kept[name]
    save_plan(plan, other)
    started(allocation, plan, *few, "--methods", "wanda")
    cells = json.loads((results / "allocation.json").read_text())["cells"]
    assert cells["wanda/0.7/uniform"] == before["wanda/0.7/uniform"]
    assert cells["wanda/0.7/arithmetic"]["plan"] != before["wanda/0.7/arithmetic"]["plan"]
    assert cells["magnitude/0.7/arithmetic"] == found["cells"]["magnitude/0.7/arithmetic"], "not asked for"
    _, stopped = start(allocation, plan, *few, "--seed", "1")
    assert stopped is not None and "seed" in stopped
    _, stopped = start(allocation, plan, *few, "--precision", "bfloat16")
    assert stopped is not None and "in float32, now bfloat16" in stopped


def test_two_plans_of_one_name_are_refused(texts, tmp_path):
    for plans, name in (([tmp_path / "a" / "x.json", tmp_path / "b" / "x.json"], "x"), (["uniform.json"], "uniform")):
        _, stopped = start(allocation, *plans, *texts)
        assert stopped is not None and f"'{name}' is taken; rename this file" in stopped


def test_an_interrupted_search_is_not_gone_on_with_after_a_restart(results, texts, monkeypatch):
    few = [*texts, "--model", "random:llama", "--samples", "20", "--length", "16", "--window", "32", "--multiple", "8"]
    few += ["--no-speed", "--sparsities", "0.4", "--methods", "obs, equal searched"]
    steps = results / "structured-0.4-obs-equal searched-search.json"
    steps.write_text("{}")
    _, stopped = start(structured, *few)
    assert stopped is not None and "holds no search that can go on" in stopped
    made, search = [], structured.search_sizes

    def seen(*arguments, file, **options):
        made.append(file.made)
        return search(*arguments, file=file, **options)

    monkeypatch.setattr(structured, "search_sizes", seen)
    started(structured, *few, "--restart")
    assert made[0]["precision"] == "float32" and not steps.exists()


def test_structured_measures_quality_and_speed(results, texts):
    few = [*texts, "--model", "random:llama", "--samples", "20", "--length", "16", "--window", "32", "--multiple", "8"]
    few += ["--steps", "3", "--lr", "1e-3"]
    speed = ["--prompt", "8", "--new-tokens", "2", "--rounds", "1"]
    methods = ["obs, searched", "obs, equal searched", "obs, tuned", "obs", "magnitude"]
    started(structured, *few, *speed, "--sparsities", "0.4", "--methods", *methods, "--no-speed")
    assert json.loads((results / "structured.json").read_text())["speed"] == {}
    text = started(structured, *few, *speed, "--sparsities", "0.4", "--methods", *methods)
    found = json.loads((results / "structured.json").read_text())
    assert list(found["cells"]) == ["dense", *(f"0.4/{method}" for method in methods)]
    cells = found["cells"]
    assert cells["0.4/obs, searched"]["parameters"] <= cells["0.4/obs, equal searched"]["parameters"]
    assert cells["0.4/obs"]["parameters"] == cells["0.4/magnitude"]["parameters"] < cells["dense"]["parameters"]
    assert len(cells["0.4/obs, searched"]["losses"]) >= 1 and cells["0.4/obs"]["channels"] == [24, 24]
    assert found["speed"]["0.4"]["prefill_times_dense"] > 0 and "obs, searched" in text
    assert not list(results.glob("*-search.json"))
    assert (results / "structured.png").read_bytes().startswith(b"\x89PNG")
    again = started(structured, *few, *speed, "--sparsities", "0.4", "--methods", *methods)
    assert json.loads((results / "structured.json").read_text())["cells"] == cells and "obs" in again
    assert cells["0.4/obs, tuned"]["tuning"] == {"steps": 3, "lr": 1e-3} and cells["0.4/obs, tuned"]["kl_to_dense"] > 0
    assert cells["0.4/obs, tuned"]["channels"] == cells["0.4/obs"]["channels"]
    few[few.index("--steps") + 1] = "2"
    started(structured, *few, *speed, "--sparsities", "0.4", "--methods", *methods)
    other = json.loads((results / "structured.json").read_text())["cells"]
    assert [name for name in cells if other[name] != cells[name]] == ["0.4/obs, tuned"], "of another tuning"
