"""cost.py as a user starts it, on tiny random models; its arithmetic by hand."""
# ruff: noqa: F811  arguments of tests are the fixtures imported here

import json
import time
from types import SimpleNamespace

import pytest
from conftest import tiny_recipe
from test_benchmarks import RECIPE, common, place, start, started  # noqa: F401  two are fixtures

import cost  # isort: skip  found by test_benchmarks
import cost_child  # isort: skip
import schedules  # isort: skip

from elastic_sparsity.model_shapes import read_shapes


def test_spans_tell_waiting_from_computing():
    spans, owner = cost_child.Spans(), SimpleNamespace(wait=lambda: time.sleep(0.2))
    spans.time_calls(owner, "wait", "training")
    owner.wait()
    wall, cpu = (spans.by_clock[clock]["training"] for clock in cost_child.CLOCKS)
    assert len(wall) == len(cpu) == 1 and wall[0] >= 0.2 > 4 * cpu[0]
    spans.since_mark("blocks")
    assert spans.by_clock["wall"]["blocks"][0] >= wall[0], "training does not move the mark"
    spans.since_mark("blocks")
    assert spans.by_clock["wall"]["blocks"][1] < 0.2


def test_cost_in_part_counts_extrapolates_and_goes_on(place, common, monkeypatch):
    """Five fresh processes: the elastic run and the one of its level in two parts each, EPTS in one; then only its own.

    The script is stopped before EPTS's, and goes on.
    """
    (place / "one.toml").write_text(RECIPE.replace('patterns = ["2:4"]', ""))
    command = [*common, "--recipe", place / "one.toml", "--blocks", 2, "--steps", 2, "--epts-steps", 2]
    run_child, names = cost.run_child, []

    def until_epts(recipe, *args):
        if len(recipe.build_ladder().levels) > 1:
            raise KeyboardInterrupt
        return run_child(recipe, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cost, "run_child", until_epts)
        start(cost, *command)
    before = json.loads((place / "cost.json").read_text())
    assert [row["name"] for row in before["single"]] == ["elastic", "independent 0.6"] and not before["finished"]
    _, stopped = start(cost, *command, "--epts-steps", 3)
    assert stopped is not None and "epts_steps: 2, now 3. Give --restart or another --name" in stopped

    def named(recipe, *args):
        names.append(len(recipe.build_ladder().levels))
        return run_child(recipe, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cost, "run_child", named)
        text = started(cost, *command)
    assert len(names) == 1 and names[0] > 1, "EPTS alone"
    result = json.loads((place / "cost.json").read_text())
    assert result["finished"] and (place / "cost.png").is_file()
    rows = {row["name"].split(",")[0] if "same" not in row["name"] else "same": row for row in result["rows"]}
    assert all(row["extrapolated"] and row["partial_peak"] and row["peak_bytes"] > 1e8 for row in rows.values())
    assert "~" in text and ">=" in text
    elastic, alone = rows["elastic"], rows["independent"]
    trained = "forward and backward"
    assert alone["passes"][trained] == elastic["passes"][trained] == 2 * (4 * 2 * 16 + 40 * 2 * 16)
    assert rows["epts schedule"]["passes"][trained] == 2 * 1280 * 7 * 8 * 16
    assert rows["same"]["seconds"] == pytest.approx(alone["seconds"])  # of one level, the same steps
    assert result["single"][:2] == before["single"]
    for row in result["single"]:
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
        assert row["cpu_seconds"] == pytest.approx(sum(row["cpu_parts"].values()))
        for found in row["runs"]:
            assert found["cpu"]["seconds"] > 0 and found["wall"].keys() == found["cpu"].keys()
            assert 0 < sum(found["cpu"]["training"]) <= sum(found["cpu"]["block phase"]) < found["cpu"]["seconds"]
        assert row["commit"] and row["date"]
    for row in result["rows"]:
        assert row["cpu_elastic_over_this"] == pytest.approx(elastic["cpu_seconds"] / row["cpu_seconds"])
    assert started(cost, *command).count("CPU") >= 3  # nothing is run, the table is shown again


def test_extrapolation_by_hand():
    first = {"seconds": 9.0, "block phase": [7.0], "blocks": [4.0, 3.0], "training": [1.0, 1.0], "end to end": []}
    second = {"seconds": 8.0, "block phase": [2.0], "blocks": [1.0], "training": [0.0], "end to end": [3.0]}
    parts = cost.extrapolated_parts([first, second], depth=10, steps=20, timed_steps=4, ends=50, timed_ends=6)
    assert parts == {
        "frame": 3.0,  # of the run that also saves
        "blocks but training": 3.0 + 9 * 2.0,
        "training of blocks": 10 * 20 * 2.0 / 8,
        "end to end": 25.0,
    }
    alone = cost.extrapolated_parts([first], depth=2, steps=4, timed_steps=4, ends=0, timed_ends=0)
    assert alone == {"frame": 2.0, "blocks but training": 5.0, "training of blocks": 2.0, "end to end": 0.0}


def test_longer_independent_runs_are_counted_from_the_same_timings():
    row = {"extrapolated": False, "parts": {"frame": 90.0, "end to end": 10.0}}
    row["cpu_parts"] = {"frame": 50.0, "end to end": 5.0}
    recipe = schedules.elastic(tiny_recipe(calibration={"source": "x.txt"}, end_to_end={"steps": 5}), 0)
    longer = schedules.changed(recipe, {"end_to_end": {"steps": 20}})
    shapes = read_shapes(recipe.model.id)
    found = cost.with_more_steps(row, recipe, longer, shapes)
    assert (found["seconds"], found["parts"]) == (130.0, {"frame": 90.0, "end to end": 40.0})
    assert (found["cpu_seconds"], found["cpu_parts"]) == (70.0, {"frame": 50.0, "end to end": 20.0})
    assert found["extrapolated"] and not found["partial_peak"]
    summed = cost.total("two", [{**found, "peak_bytes": 3, "planned_peak_bytes": 4}] * 2)
    assert (summed["seconds"], summed["cpu_seconds"], summed["num_runs"]) == (260.0, 140.0, 2)
    assert summed["parts"] == {"frame": 180.0, "end to end": 80.0} and not summed["partial_peak"]
    assert found["passes"] == cost.planned_passes(longer, shapes)


def test_cost_stops_where_the_plan_is_wrong():
    recipe = schedules.elastic(tiny_recipe(calibration={"source": "x.txt"}), 0)
    shapes = read_shapes(recipe.model.id)
    passes = cost.planned_passes(recipe, shapes)
    cost.check_passes("run", recipe, shapes, 0, {"passes": passes})
    with pytest.raises(SystemExit, match="run: the plan says"):
        cost.check_passes("run", recipe, shapes, 0, {"passes": {**passes, "forward": 1}})


def test_cost_needs_a_text(common):
    _, stopped = start(cost, *common, "--calibration", "missing.txt")
    assert stopped is not None and "no such file" in stopped
