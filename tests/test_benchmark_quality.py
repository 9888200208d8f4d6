"""quality.py as a user starts it, on tiny random models, and what it refuses; its arithmetic by hand."""
# ruff: noqa: F811  arguments of tests are the fixtures imported here

import argparse
import io
import json
import math
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_recipe
from rich.console import Console
from test_benchmarks import RECIPE, common, place, start, started  # noqa: F401  two are fixtures

import quality  # isort: skip  found by test_benchmarks
import quality_models  # isort: skip
import quality_plots  # isort: skip
import quality_report  # isort: skip
import schedules  # isort: skip
import trained  # isort: skip
from quality_models import TRAINED, Cell, Maker  # isort: skip

from elastic_sparsity import optimize, read_recipe
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.evaluate import KeptHidden, evaluate
from elastic_sparsity.files import write_json
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import load_base
from elastic_sparsity.tiny import tiny_model


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


def test_every_method_stands_for_other_work(place):
    """Steps and samples of 0.6 by hand: half of 40 end-to-end steps, of which each is as long as a block's."""
    recipe = schedules.elastic(
        read_recipe(place / "recipe.toml", {"calibration": {"source": str(place / "calibration.txt")}}), 0
    )
    maker = Maker(recipe, None, torch.float32, None, 4, 1e-3, nullcontext)

    def work(method):
        it = maker.amounts(Cell(method, "0.6", 0))
        return it["block_steps"], it["block_samples"], it["end_to_end_steps"]

    epts_steps = schedules.epts(recipe, read_shapes(recipe.model.id)).block.steps
    assert {method: work(method) for method in TRAINED if method != "elastic-uninduced"} == {
        "elastic": (4, 4, 40),
        "independent": (4, 4, 20),
        "independent-same": (4, 4, 40),
        "independent-lora": (4, 4, 20),
        "independent-full": (24, 8, 0),
        "independent-full-block": (4, 4, 0),
        "epts": (epts_steps, 8, 0),
        "epts-official": (1280, 8, 0),
    }
    level = recipe.build_ladder().levels[0]
    rates = [
        maker.recipe_of(level, Cell(x, "0.6", 0)).block.base_lr for x in ("independent-full", "independent-full@3e-05")
    ]
    assert rates == [1e-3, 3e-5]


def test_a_sweep_is_of_one_seed_and_leaves_the_chosen_rate_out(place):
    recipe = read_recipe(place / "recipe.toml", {"calibration": {"source": str(place / "calibration.txt")}})
    asked = argparse.Namespace(levels=["0.6"], methods=["independent-full", "epts-official"], seeds=[5, 7],
                               full_lr=3e-4, sweep_full_lr=[1e-4, 3e-4, 0.001, 1e-4])  # fmt: skip
    assert [cell.key for cell in quality.cells_of(asked, recipe)] == [
        "independent-full@0.0001/0.6/5", "independent-full@0.001/0.6/5", "independent-full/0.6/5",
        "epts-official/0.6/5", "independent-full/0.6/7", "epts-official/0.6/7",
    ]  # fmt: skip


def test_the_chosen_rate_of_a_sweep_is_not_trained_again(place, quality_arguments):
    few = [*quality_arguments, "--levels", "0.6", "--name"]
    text = started(quality, *few, "sweep", "--methods", "--sweep-full-lr", 0.01)
    assert "independent-full@0.01-0.6-s0: training" in text and "independent-full, lr 0.01" in text
    text = started(quality, *few, "chosen", "--methods", "independent-full", "--full-lr", 0.01)
    assert "training" not in text and "independent-full learns at 0.01" in " ".join(text.split())
    tried, chosen = (json.loads((place / f"{name}.json").read_text())["cells"] for name in ("sweep", "chosen"))
    figures = {"perplexity", "kl", "bytes", "amounts", "sittings"}
    found, again = tried["independent-full@0.01/0.6/0"], chosen["independent-full/0.6/0"]
    assert {x: found[x] for x in figures} == {x: again[x] for x in figures}


def test_documents_are_told():
    assert quality.documents_of({}) == "all documents"
    assert quality.documents_of({"task_protocol": {"documents": 2}}) == "only the first 2 documents"


def test_a_broken_cell_is_recorded_and_the_script_goes_on(place, quality_arguments, monkeypatch):
    def broken(model, *args, **options):
        prune_one_shot_(model, *args, **options)
        if (args[1].name, args[2]) == ("0.6", "wanda"):
            model.model.layers[0].self_attn.q_proj.weight.data.fill_(math.inf)

    monkeypatch.setattr(quality_models, "prune_one_shot_", broken)
    few = [*quality_arguments, "--name", "broken", "--methods", "dense", "magnitude", "wanda", "--levels", "0.6", "2:4"]
    text = started(quality, *few)
    found = json.loads((place / "broken.json").read_text())["cells"]
    assert found["wanda/0.6/0"]["failure"] == "evaluation: the loss of it is not finite."
    assert "perplexity" not in found["wanda/0.6/0"] and found["wanda/0.6/0"]["commit"]
    assert all(found[f"{x}/0"]["perplexity"] > 1 for x in ("dense/dense", "magnitude/0.6", "wanda/2:4"))
    line = "wanda 60 %, seed 0 failed: evaluation: the loss of it is not finite."
    assert line in text and re.search(r"wanda +│ +0 +│ +failed", text)
    monkeypatch.setattr(quality_models, "prune_one_shot_", None)  # nothing is made again
    assert line in started(quality, *few)
    assert (place / "broken.png").is_file()


def test_cells_of_other_work_are_not_gone_on_with(measured, place, quality_arguments):
    _, after, _ = measured
    full = "independent-full/0.6/0"
    for name, amounts, message in (
        ("before", None, f"{full} is of a release that gave independent-full the block phase's tokens"),
        (
            "changed",
            {"block_steps": 3},
            f"{full} was trained with {{'block_steps': 3}}, its method now means {{'block_st",
        ),
    ):
        cells = {**after["cells"], full: {**after["cells"][full], "amounts": amounts}}
        if amounts is None:
            del cells[full]["amounts"]
        write_json(place / f"{name}.json", {**after, "cells": cells})
        _, stopped = start(quality, *quality_arguments, "--name", name, "--methods", "dense")
        assert stopped is not None and message in stopped


def test_tasks_of_changed_data_or_another_limit_are_refused(measured, place, quality_arguments, tmp_path):
    write_json(place / "tasks.json", measured[1])
    documents = (place / "data" / "piqa.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "piqa.jsonl").write_text("".join(documents[::-1]))
    more = ["--name", "tasks", "--methods", "wanda", "--levels", "0.6", "--tasks", "piqa", "--task-data"]
    _, stopped = start(quality, *quality_arguments, *more, tmp_path)
    assert stopped is not None and stopped.startswith("error: task 'piqa': dense dense answered documents of sha256 ")
    assert "tasks" not in json.loads((place / "tasks.json").read_text())["cells"]["wanda/0.6/0"]
    _, stopped = start(quality, *quality_arguments, *more, place / "data", "--limit", 2)
    assert stopped is not None and "'documents': 2" in stopped


def test_figures_of_a_kept_reference_are_those_of_one_that_runs():
    dense, pruned = (tiny_model("llama", seed=seed) for seed in (0, 1))
    ids_ST = torch.randint(1, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    kept, runs = KeptHidden(dense), KeptHidden(dense, 0)
    found = [quality.Gauge(x, ids_ST, 2, nullcontext)(pruned) for x in (kept, kept, runs)]
    assert found[0] == found[1] == found[2] and found[0]["kl_tokens"] == 3 * 23
    whole = evaluate({"it": pruned}, ids_ST, autocast=nullcontext)["it"].perplexity
    assert found[0]["perplexity"] == pytest.approx(whole, rel=1e-12)


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
        (["--evaluation", "missing.txt"], "text source 'missing.txt': no such file."),
        (["--calibration", "missing.txt"], "text source 'missing.txt': no such file."),
        (["--task-data", "missing"], "task data: 'missing' is no folder."),
        (
            ["--baseline-samples", 9],
            "--baseline-samples: 9 is more than the recipe's calibration.samples (8).",
        ),
        (
            ["--methods", "elastic"],
            "elastic: is trained; name a folder outside the repository with --work.",
        ),
    ],
    ids=["evaluation", "calibration", "tasks", "samples", "work"],
)
def test_quality_names_what_is_missing(changes, message, place, quality_arguments):
    _, stopped = start(quality, *quality_arguments[:-2], "--name", "missing", *changes)  # without --work
    assert stopped == f"error: {message}\n"
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
    assert pruned["accuracy_spread"] is None
    assert rows["2:4", "wanda"]["gap_closed"] is None


def test_the_plot_by_bytes_names_only_what_was_measured(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    cells = {("dense", "dense"): 9e6, ("elastic", "0.5"): 5e6, ("elastic", "2:4"): 6e6, ("sparsegpt", "0.5"): 4e6}
    same = {"perplexity": 20.0, "perplexity_spread": None, "bytes_all": 7e6}
    rows = [{"method": method, "level": level, "bytes": size, **same} for (method, level), size in cells.items()]
    quality_plots.plot_bytes(rows, tmp_path / "bytes.png", "title")
    named = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert named == {"dense", "elastic (in the one file)", "sparsegpt (bitmask file)"}


def test_failures_spread_and_task_tables_by_hand():
    def cell(method, seed, value, **more):
        score = {"task": "piqa", "metric": "acc", "value": value, "error": 0.03, "num_documents": 9, "sha256": "ab"}
        return {"level": "0.6", "method": method, "seed": seed, "perplexity": 20.0, "kl": 0.5, "bytes": 10,
                "seconds": 7.0, "tasks": {"piqa": score}, **more}  # fmt: skip

    failed = {"level": "0.6", "method": "elastic", "seed": 2, "failure": "it is not finite."}
    cells = [
        cell("epts", 0, 0.3, task_failures={"boolq": "no number"}), cell("elastic", 0, 0.50), cell("elastic", 1, 0.54),
        failed, {**failed, "method": "independent-full@0.01"}, {**cell("dense", 0, 0.7), "level": "dense"},
    ]  # fmt: skip
    rows = {row["method"]: row for row in quality_report.summary(cells)}
    elastic, swept = rows["elastic"], rows["independent-full@0.01"]
    assert elastic["accuracy_spread"] == pytest.approx(0.04 / math.sqrt(2)) and elastic["accuracy_error"] == 0.03
    assert (elastic["seeds"], elastic["failed"], elastic["perplexity"]) == ([0, 1], [2], 20.0)
    assert (swept["seeds"], swept["perplexity"], swept["accuracy"], swept["bytes"]) == ([], None, None, None)
    text = printed(quality_report.table(list(rows.values()), "title", "only the first 9 documents", "caption of it"))
    figures = ["52.0 ± 3.0, seeds ± 2.8", "epts, equal passes", "independent-full, lr 0.01", "20.00 ± 0.00 (1 failed)"]
    for words in (*figures, "only the first 9 documents", "mean of 1 tasks, %", "caption of it"):
        assert words in text, words
    (tasks,) = quality_report.task_tables(cells, "all documents")
    text = printed(tasks)
    assert re.search("70.0 ± 3.0 .* 30.0 ± 3.0 .* 52.0 ± 3.0", text) and "epts, equal passes" in text
    assert quality_report.failures(cells) == [
        "epts 60 %, seed 0 failed on boolq: no number", "elastic 60 %, seed 2 failed: it is not finite.",
        "independent-full@0.01 60 %, seed 2 failed: it is not finite.",
    ]  # fmt: skip
    cells[1]["tasks"]["piqa"]["sha256"] = "cd"
    with pytest.raises(ConfigError, match="task 'piqa'"):
        quality_report.task_tables(cells, "all documents")


def printed(table):
    console = Console(width=170, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()
