"""The evidence scripts as a user starts them, on tiny random models, and what they refuse; their arithmetic by hand."""

import argparse
import contextlib
import hashlib
import io
import json
import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation
import cells
import cost
import quality
import quality_report
import schedules
import size
import trained
import zero_shot
from conftest import tiny_recipe

from elastic_sparsity import ElasticCheckpoint, optimize
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.files import write_json
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import load_base

RECIPE = """
[model]
id = "random:llama"
[calibration]
source = "given by --calibration"
samples = 8
length = 16
[ladder]
sparsities = [0.6]
patterns = ["2:4"]
[adapters]
ranks = 2
[block]
steps = 4
samples = 4
batch_size = 2
[end_to_end]
trainable = "base"
steps = 12
batch_size = 2
"""


def start(script, *arguments):
    """(what a script prints, why it stopped or None), run in this process as from a command line."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            cells.exit_on_error(script.main)
        except SystemExit as stopped:
            return out.getvalue(), errors.getvalue() if stopped.code == 2 else str(stopped.code)
    return out.getvalue(), None


def started(script, *arguments):
    text, stopped = start(script, *arguments)
    assert stopped is None, stopped
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe, two texts and the data of one task."""
    folder = tmp_path_factory.mktemp("benchmarks")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    for name in ("calibration", "evaluation"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choices(words, k=300)))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "data").mkdir()
    documents = [{"query": f"{i}:", "choices": draw.sample(words, 2), "gold": i % 2} for i in range(4)]
    (folder / "data" / "piqa.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
    return folder


@pytest.fixture(scope="module")
def common(place):
    return ["--recipe", place / "recipe.toml", "--calibration", place / "calibration.txt", "--results", place]


@pytest.fixture(scope="module")
def quality_arguments(place, common):
    return [*common, "--evaluation", place / "evaluation.txt", "--window", 64, "--baseline-samples", 4,
            "--work", place / "work"]  # fmt: skip


@pytest.fixture(scope="module")
def measured(place, quality_arguments):
    """quality.py with every kind of method, the second seed and the tasks asked for later."""
    kinds = ["dense", "wanda", "sparsegpt", "elastic", "independent-full", "epts"]
    started(quality, *quality_arguments, "--methods", *kinds)
    before = json.loads((place / "quality.json").read_text())
    more = ["--seeds", 0, 1, "--task-data", place / "data", "--tasks", "piqa"]
    text = started(quality, *quality_arguments, "--methods", "dense", "elastic", "sparsegpt", *more)
    return before, json.loads((place / "quality.json").read_text()), text


def test_quality_fills_cells_and_goes_on(measured, place):
    before, after, text = measured
    assert set(before["cells"]) == {
        "dense/dense/0", "elastic/0.6/0", "elastic/2:4/0", "independent-full/0.6/0", "independent-full/2:4/0",
        "epts/0.6/0", *(f"{method}/{level}/0" for method in ("wanda", "sparsegpt") for level in ("0.6", "2:4")),
    }  # fmt: skip
    assert set(after["cells"]) == {*before["cells"], "elastic/0.6/1", "elastic/2:4/1"}
    for key, cell in before["cells"].items():
        again = after["cells"][key]
        assert {name: again[name] for name in cell} == cell  # nothing is measured twice
        assert cell.keys() >= {"perplexity", "kl", "bytes", "date", "device", "commit", "versions", "seed"}
        assert cell["kl"] == 0 if cell["method"] == "dense" else cell["kl"] > 0
    for method in ("dense/dense/0", "elastic/2:4/1", "sparsegpt/0.6/0"):
        assert after["cells"][method]["tasks"]["piqa"]["num_documents"] == 4
    assert "tasks" not in after["cells"]["wanda/0.6/0"]
    assert after["cells"]["elastic/0.6/0"]["sittings"][0]["seconds"] > 0
    rows = {(row["level"], row["method"]): row for row in after["table"]}
    assert rows["0.6", "elastic"]["seeds"] == [0, 1] and rows["0.6", "elastic"]["perplexity_spread"] > 0
    assert "full protocol" not in text and " ± " in text
    assert {path.name for path in place.glob("quality*.png")} == {"quality.png", "quality-bytes.png"}


def test_quality_says_what_is_no_full_protocol_and_keeps_questions_apart(measured, quality_arguments):
    text = started(quality, *quality_arguments, "--methods", "dense", "--every", 2, "--name", "quick")
    assert "not the full protocol" in text
    _, stopped = start(quality, *quality_arguments, "--methods", "dense", "--every", 2)
    assert stopped is not None and "every: 1, now 2" in stopped


def asked_of(text, **more):
    """A question as the scripts ask it, about one text file."""
    args = argparse.Namespace(calibration=str(text), evaluation="self", restart=False, **more)
    return args, cells.question_of(args, ())


def test_a_changed_text_of_the_same_name_is_another_question(tmp_path):
    text, file = tmp_path / "news.txt", tmp_path / "results" / "it.json"
    text.write_text("a fox")
    args, first = asked_of(text)
    assert first["calibration"] == "news.txt" and first["evaluation_text_sha256"] is None  # "self" is no file
    assert first["calibration_text_sha256"] == hashlib.sha256(b"a fox").hexdigest()[:16]
    write_json(file, {**cells.begin(args, file, first, {"cells": {}}), "cells": {"dense": 1.0}})
    assert cells.begin(args, file, asked_of(text)[1], {"cells": {}})["cells"] == {"dense": 1.0}  # goes on
    text.write_text("a hen")
    args, second = asked_of(text)
    with pytest.raises(SystemExit) as stopped:
        cells.begin(args, file, second, {"cells": {}})
    assert f"calibration_text_sha256: {first['calibration_text_sha256']}, now " in str(stopped.value)
    args.restart = True
    assert cells.begin(args, file, second, {"cells": {}}) == {"cells": {}, "question": second}


def test_a_result_from_before_texts_were_hashed_is_not_gone_on_with(tmp_path):
    text, file = tmp_path / "news.txt", tmp_path / "it.json"
    text.write_text("a fox")
    args, question = asked_of(text, window=64)
    old = {name: value for name, value in question.items() if not name.endswith("sha256")}
    write_json(file, {"question": old, "cells": {}})
    with pytest.raises(SystemExit, match="calibration_text_sha256: not recorded, now .*--restart") as stopped:
        cells.begin(args, file, question, {"cells": {}})
    assert "evaluation" not in str(stopped.value) and "window" not in str(stopped.value)  # only what differs


def test_ablation_refuses_another_text_of_the_same_name(tmp_path, place):
    (tmp_path / "calibration.txt").write_text("a fox")
    texts = ["--calibration", tmp_path / "calibration.txt", "--evaluation", place / "evaluation.txt"]
    output = tmp_path / "ablation.json"
    common = json.loads((Path(ablation.__file__).parent / "results" / "ablation.json").read_text())["common"]
    write_json(output, {"common": common, "rows": []})
    _, stopped = start(ablation, *texts, "--output", output)
    assert stopped is not None and "calibration_text_sha256: not recorded, now " in stopped
    assert "evaluation_text_sha256: not recorded, now " in stopped and "move it away" in stopped


def test_quality_refuses_another_recipes_checkpoints(measured, place, quality_arguments):
    (place / "other.toml").write_text(RECIPE.replace("ranks = 2", "ranks = 3"))
    other = [*quality_arguments, "--recipe", place / "other.toml", "--name", "other", "--methods", "elastic"]
    _, stopped = start(quality, *other)
    assert stopped is not None and "differs in adapters" in stopped


def test_a_training_that_was_interrupted_goes_on(tmp_path, place, monkeypatch):
    text = tmp_path / "calibration.txt"
    text.write_text((place / "calibration.txt").read_text())
    recipe = schedules.elastic(tiny_recipe(calibration={"source": str(text)}), 0)
    base = load_base(recipe.model.id, recipe.model.dtype)

    def until_the_first_block(recipe, folder, progress):
        def stop(stage, done, total):
            progress(stage, done, total)
            if (stage, done) == ("blocks", 1):
                raise KeyboardInterrupt

        return optimize(recipe, folder, stop)

    with monkeypatch.context() as patch:
        patch.setattr(trained, "optimize", until_the_first_block)
        with pytest.raises(KeyboardInterrupt):
            trained.trained(recipe, tmp_path / "elastic-s0", base)
    checkpoint, sittings = trained.trained(recipe, tmp_path / "elastic-s0", base)
    assert len(sittings) == 2 and all(sitting["seconds"] > 0 for sitting in sittings)
    whole = optimize(recipe, tmp_path / "at-once")
    for level in whole.ladder.levels:
        assert [x.sha256 for x in checkpoint.files_of(level)] == [x.sha256 for x in whole.files_of(level)]
    again, same = trained.trained(recipe, tmp_path / "elastic-s0", base)  # nothing is trained
    assert same == sittings and again.total_bytes() == whole.total_bytes()
    text.write_text(" ".join(reversed(text.read_text().split())))  # of the same name
    with pytest.raises(ConfigError, match="the text now gives"):
        trained.trained(recipe, tmp_path / "elastic-s0", base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--evaluation", "missing.txt"], "no such file"),
        (["--calibration", "missing.txt"], "no such file"),
        (["--task-data", "missing"], "missing"),
        (["--baseline-samples", 9], "--baseline-samples: 9"),
    ],
    ids=str,
)
def test_quality_names_what_is_missing(changes, message, place, quality_arguments):
    _, stopped = start(quality, *quality_arguments, "--name", "missing", *changes)
    assert stopped is not None and message in stopped
    assert not (place / "missing.json").exists()


def test_table_by_hand():
    def cell(level, method, seed, perplexity, **more):
        return {
            "level": level,
            "method": method,
            "seed": seed,
            "perplexity": perplexity,
            "kl": 0.5,
            "bytes": 10,
            **more,
        }

    score = {"metric": "acc", "value": 0.5, "error": 0.03}
    cells = [
        cell("0.5", "elastic", 1, 40.0), cell("0.5", "elastic", 0, 10.0, tasks={"a": score}),
        cell("0.5", "sparsegpt", 0, 80.0, tasks={"a": score, "b": {**score, "value": 0.7, "error": 0.04}}),
        cell("dense", "dense", 0, 5.0), cell("2:4", "wanda", 0, 9.0),
    ]  # fmt: skip
    rows = {(row["level"], row["method"]): row for row in quality_report.summary(cells)}
    assert list(rows) == [("dense", "dense"), ("0.5", "sparsegpt"), ("0.5", "elastic"), ("2:4", "wanda")]
    elastic = rows["0.5", "elastic"]
    assert elastic["perplexity"] == 25 and elastic["seeds"] == [0, 1]
    assert elastic["perplexity_spread"] == pytest.approx(math.sqrt(450))
    assert elastic["gap_closed"] == pytest.approx(math.log(80 / 20) / math.log(80 / 5))
    assert elastic["accuracy"] is None  # one seed has no task
    pruned = rows["0.5", "sparsegpt"]
    assert pruned["gap_closed"] is None and pruned["perplexity_spread"] is None
    assert (pruned["accuracy"], pruned["accuracy_error"]) == (pytest.approx(0.6), pytest.approx(0.025))
    assert rows["2:4", "wanda"]["gap_closed"] is None


def test_cost_in_part_counts_and_extrapolates(place, common):
    """Five fresh processes: the elastic run and the one of its level in two parts each, EPTS in one."""
    (place / "one.toml").write_text(RECIPE.replace('patterns = ["2:4"]', ""))
    text = started(cost, *common, "--recipe", place / "one.toml", "--blocks", 2, "--steps", 2, "--epts-steps", 2)
    result = json.loads((place / "cost.json").read_text())
    assert result["finished"] and (place / "cost.png").is_file()
    rows = {row["name"].split(",")[0] if "same" not in row["name"] else "same": row for row in result["rows"]}
    assert all(row["extrapolated"] and row["partial_peak"] and row["peak_bytes"] > 1e8 for row in rows.values())
    assert "~" in text and ">=" in text
    elastic, alone = rows["elastic"], rows["independent"]
    trained = "forward and backward"
    assert alone["passes"][trained] == elastic["passes"][trained] == 2 * (4 * 2 * 16 + 12 * 2 * 16)
    assert rows["epts schedule"]["passes"][trained] == 2 * 1280 * 7 * 16
    assert rows["same"]["seconds"] == pytest.approx(alone["seconds"])  # of one level, the same steps
    for row in result["single"]:
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))


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
    row = {"extrapolated": False, "seconds": 100.0, "step_seconds": 2.0, "parts": {"frame": 90.0, "end to end": 10.0}}
    recipe = schedules.elastic(tiny_recipe(calibration={"source": "x.txt"}, end_to_end={"steps": 5}), 0)
    longer = schedules.changed(recipe, {"end_to_end": {"steps": 20}})
    shapes = read_shapes(recipe.model.id)
    found = cost.with_more_steps(row, recipe, longer, shapes)
    assert (found["seconds"], found["parts"]) == (130.0, {"frame": 90.0, "end to end": 40.0})
    assert found["extrapolated"] and not found["partial_peak"]
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


def test_size_weighs_what_is_written(tiny_checkpoint, tmp_path):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    rows = {row["way"]: row for row in size.size_rows(checkpoint, tmp_path)}
    weights = sum(spec.size for spec in checkpoint.linears.values())
    width = checkpoint.dtype.itemsize
    elastic = rows["elastic"]
    assert elastic["download"]["0.6"] == checkpoint.download_bytes(checkpoint.ladder.find(0.6))
    assert elastic["linears"]["all"] < rows["bitmask"]["linears"]["all"]
    for way in ("bitmask", "dense"):
        parts = [rows[way]["linears"][level.name] for level in checkpoint.ladder.levels]
        assert rows[way]["linears"]["all"] == sum(parts)
    # Headers of the files, and of a bitmask also the rows' offsets, are all that is more than bits and values.
    assert 0 <= rows["dense"]["linears"]["2:4"] - width * weights < 4096
    least = weights / 8 + width * weights / 2
    assert (
        least
        < rows["bitmask"]["linears"]["2:4"]
        < least + 8 * sum(x.shape[0] + 2 for x in checkpoint.linears.values()) + 8192
    )
    assert rows["epts"]["computed"] and "2:4" not in rows["epts"]["linears"]
    assert rows["epts"]["linears"]["0.5"] >= (width + 2) * weights


def test_size_from_the_command_line(tiny_checkpoint, tmp_path):
    text = started(size, tiny_checkpoint, "--results", tmp_path)
    result = json.loads((tmp_path / "size.json").read_text())
    assert list(result["models"]) == ["checkpoint"] and (tmp_path / "size.png").is_file()
    assert "EPTS" in text and result["commit"] is not None
    _, stopped = start(size, tmp_path / "nothing", "--results", tmp_path)
    assert stopped is not None and "nothing" in stopped


def test_zero_shot_goes_on_where_it_stopped(tiny_checkpoint, place):
    common = [tiny_checkpoint, "--task-data", place / "data", "--tasks", "piqa", "--results", place]
    started(zero_shot, *common, "--levels", 0.6)
    text = started(zero_shot, *common, "--levels", 0.6, "--dense")
    rows = json.loads((place / "zero_shot.json").read_text())["rows"]
    assert [(row["level"], row["method"], row["task"]) for row in rows] == [
        ("0.6", "elastic", "piqa"), ("dense", "dense", "piqa"),
    ]  # fmt: skip
    assert "goes on after 1 cells" in text and (place / "zero_shot.png").is_file()
    _, stopped = start(zero_shot, *common, "--limit", 2)
    assert stopped is not None and "has the protocol" in stopped
    started(zero_shot, *common, "--levels", 0.6, "--baselines", "wanda")
    rows = json.loads((place / "zero_shot.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["elastic", "dense", "wanda"]
    other = [*common, "--levels", 0.7, "--baselines", "wanda", "--calibration", place / "evaluation.txt"]
    _, stopped = start(zero_shot, *other)
    assert stopped is not None and "gives samples of sha256" in stopped
