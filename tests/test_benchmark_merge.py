"""Results measured side by side become one, or are refused with the reason."""

import json

import pytest
from test_benchmarks import start, started

import merge  # isort: skip  found by test_benchmarks


def cell(perplexity, **more):
    return {"perplexity": perplexity, "date": "2026-11-27", **more}


def write(folder, name, *, cells, question=None, **more):
    result = {"question": question or {"seed": 0}, "dense": None, "cells": cells, **more}
    (folder / f"{name}.json").write_text(json.dumps(result))


def merged(folder, *parts, name="whole"):
    text = started(merge, *parts, "--name", name, "--results", folder)
    return json.loads((folder / f"{name}.json").read_text()), text


def test_cells_of_all_parts_are_there_and_tables_are_not(tmp_path):
    write(tmp_path, "a", cells={"wanda/0.5": cell(30.0)}, table=[1], date="2026-11-26")
    write(tmp_path, "b", cells={"wanda/0.6": cell(40.0)}, dense=21.9, date="2026-11-27", summary=[2])
    found, text = merged(tmp_path, "a", tmp_path / "b.json")
    assert found == {
        "question": {"seed": 0},
        "dense": 21.9,
        "cells": {"wanda/0.5": cell(30.0), "wanda/0.6": cell(40.0)},
        "date": "2026-11-26",
    }
    assert "2 cells of 2 results" in text
    again, _ = merged(tmp_path, "whole", "b")
    assert again == found, "a part may be the target itself"


def test_a_cell_that_two_parts_hold_keeps_what_each_has_more(tmp_path):
    write(tmp_path, "a", cells={"x": cell(30.0, seconds=5, tasks={"piqa": 0.6})}, dense=21.9)
    write(tmp_path, "b", cells={"x": cell(30.0 * (1 + 1e-9), seconds=9, tasks={"boolq": 0.4})}, dense=21.9)
    found, _ = merged(tmp_path, "a", "b")
    assert found["cells"] == {"x": cell(30.0, seconds=5, tasks={"piqa": 0.6, "boolq": 0.4})}


def scored(**score):
    return cell(30.0, tasks={"piqa": {"value": 0.6, "sha256": "ab", "date": "2026-11-27", **score}})


def test_a_task_that_two_parts_hold_keeps_the_first_stamp(tmp_path):
    write(tmp_path, "a", cells={"x": scored()})
    write(tmp_path, "b", cells={"x": scored(date="2026-11-28")})
    found, _ = merged(tmp_path, "a", "b")
    assert found["cells"] == {"x": scored()}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scored(value=0.5), "cells: x: piqa: value is 0.5, before it was 0.6"),
        (scored(sha256="cd"), "cells: x: piqa: sha256 is cd, before it was ab"),
        (cell(30.0, task_failures={"piqa": "NaN"}), "cells: x: piqa: failed in one result and has a figure in another"),
        ({"failure": "NaN"}, "cells: x: failed in one result and has a figure in another"),
    ],
)
def test_scores_that_disagree_are_refused(tmp_path, other, message):
    write(tmp_path, "a", cells={"x": scored()})
    write(tmp_path, "b", cells={"x": other})
    for parts in (("a", "b"), ("b", "a")):
        _, stopped = start(merge, *parts, "--name", "whole", "--results", tmp_path)
        assert stopped is not None and (message in stopped or parts[0] == "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": {"seed": 1}}, "is of another question: seed: 0, now 1"),
        ({"cells": {"x": cell(31.0)}}, "cells: x: perplexity is 31.0, before it was 30.0"),
        ({"dense": 25.0}, "dense: is 25.0, before it was 21.9"),
    ],
)
def test_parts_that_disagree_are_refused_and_nothing_is_written(tmp_path, change, message):
    write(tmp_path, "a", cells={"x": cell(30.0)}, dense=21.9)
    write(tmp_path, "b", **({"cells": {"y": cell(40.0)}, "dense": 21.9} | change))
    _, stopped = start(merge, "a", "b", "--name", "whole", "--results", tmp_path)
    assert stopped is not None and message in stopped and "b.json" in stopped
    assert not (tmp_path / "whole.json").exists()


def test_a_result_that_is_no_part_is_not_overwritten(tmp_path):
    for name in ("a", "whole"):
        write(tmp_path, name, cells={"x": cell(30.0)})
    _, stopped = start(merge, "a", "--name", "whole", "--results", tmp_path)
    assert stopped is not None and "whole.json: is there already" in stopped
    _, stopped = start(merge, "a", "missing", "--name", "new", "--results", tmp_path)
    assert stopped is not None and "missing.json: cannot be read" in stopped
