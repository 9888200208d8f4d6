"""The induction benchmarks' summaries by hand: means, spreads, gap closed, verdicts."""

import math

import pytest
from test_benchmarks import cells  # noqa: F401  puts the benchmarks on the path

from induction_table import gap_closed, overview, parts_summary, parts_table, summary, table, verdict  # isort: skip

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console


def cells_of(method, level, plain, induced):
    return {
        f"{seed}/{method}/{level}/{kind}": {"perplexity": value}
        for kind, values in (("plain", plain), ("induced", induced))
        for seed, value in enumerate(values)
    }


def row_of(plain, induced, method="wanda", level="2:4", dense=10.0):
    (row,) = summary(cells_of(method, level, plain, induced), dense)
    return row


def test_means_spreads_and_gap_by_hand():
    row = row_of([160.0, 40.0], [80.0, 20.0])
    assert (row["plain"], row["induced"], row["seeds"]) == (100, 50, [0, 1])
    assert row["plain_spread"] == pytest.approx(math.sqrt(2) * 60)
    assert row["gap_closed"] == pytest.approx(math.log(2) / math.log(8))  # of the mean logs: 80, 40 and 10
    assert row["log_change"] == pytest.approx(-math.log(2)) and row["log_change_spread"] == pytest.approx(0, abs=1e-12)
    assert (row["verdict"], row["least"], row["reaches_least"]) == ("lower", 0.15, True)


@pytest.mark.parametrize(
    ("plain", "induced", "expected"),
    [
        ([100, 100, 100], [90, 91, 92], "lower"),
        ([100, 100, 100], [110, 111, 112], "worse"),
        ([100, 100, 100], [90, 100, 112], "within spread"),
        ([100, 100, 100], [100, 100, 100], "within spread"),
        ([50, 100, 200], [51, 102, 204], "worse"),  # every seed by 2 %, however much seeds differ
        ([100], [50], "one seed"),
        ([100], [200], "one seed"),
    ],
)
def test_verdicts(plain, induced, expected):
    assert row_of(plain, induced)["verdict"] == expected


@given(st.floats(-5, 5), st.floats(0, 5))
def test_a_verdict_follows_its_definition(change, spread):
    assert (verdict(change, spread) == "worse") == (change > spread)
    assert (verdict(change, spread) == "lower") == (change < -spread)
    assert verdict(change, None) == "one seed"


@given(st.floats(1.5, 1e6), st.floats(1, 1e6))
def test_gap_closed_is_zero_for_nothing_and_one_for_dense(plain, dense):
    found = gap_closed([math.log(plain)], [math.log(plain)], dense)
    assert (found is None) == (math.log(plain) <= math.log(dense))
    if found is not None and plain > 1.001 * dense:
        assert found == 0 and gap_closed([math.log(plain)], [math.log(dense)], dense) == pytest.approx(1)


def test_seeds_without_a_pair_do_not_count():
    given = cells_of("wanda", "0.5", [20.0, 30.0], [15.0])
    (row,) = summary(given, 10.0)
    assert row["seeds"] == [0] and row["plain"] == 20 and row["plain_spread"] is None
    assert summary({"0/wanda/0.5/plain": {"perplexity": 20.0}}, 10.0) == []


def test_pruning_that_loses_nothing_has_no_gap_and_overflow_is_a_number():
    row = row_of([9.0], [8.0])
    assert row["gap_closed"] is None and row["reaches_least"] is None
    assert row_of([math.inf, math.inf], [100.0, 100.0])["verdict"] == "lower"


def test_the_overview_counts():
    rows = [
        *summary(cells_of("wanda", "2:4", [100, 100], [50, 50]), 10.0),
        *summary(cells_of("sparsegpt", "0.5", [100, 100], [99, 99]), 10.0),
        *summary(cells_of("magnitude", "4:8", [100, 100], [120, 121]), 10.0),
        *summary(cells_of("magnitude", "0.7", [100], [90]), 10.0),
    ]
    text = overview(rows)
    assert "lower in 3 of 4 cells" in text and "more than the spread in 1" in text and "1 of one seed" in text
    assert "closed in 1 of 2" in text  # Wanda's; SparseGPT's 0.4 % is below 5 %
    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table(rows, "a title"))
    shown = console.export_text()
    assert "worse" in shown and "15 %" in shown and "50 %" in shown and "one seed" in shown


def part(perplexity, seconds=1.0, peak=2_000_000):
    cost = {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak, "added_bytes": peak // 2}
    return {"perplexity": perplexity, "induction": cost}


def test_parts_by_hand():
    given = {
        "none/wanda/0.5": part(40.0, 0.0, 0), "none/wanda/2:4": part(80.0, 0.0, 0),
        "gains/wanda/0.5": part(20.0, 3.0), "gains/wanda/2:4": part(90.0, 4.0, 5_000_000),
        "residual rotation/wanda/2:4": part(80.0),
    }  # fmt: skip
    notes = {
        "residual rotation/any": {"residual": {"added_parameters": 1234}, "logits_moved": 2e-5},
        "gains/any": {},
        "values/any": {"refused": "no form"},
    }
    rows = parts_summary(given, notes, 10.0, ["gains"])
    none, gains, rotation, refused = rows
    assert [row["default"] for row in (none, gains, rotation)] == [False, True, False]
    assert none["gap_closed"] == {} and none["compared"] == 0
    assert gains["gap_closed"]["0.5"] == pytest.approx(0.5) and gains["gap_closed"]["2:4"] < 0
    assert (gains["lower"], gains["compared"], gains["seconds"], gains["peak_bytes"]) == (1, 2, 4.0, 5_000_000)
    assert rotation["added_parameters"] == 1234 and rotation["gap_closed"] == {"2:4": 0} and rotation["lower"] == 0
    assert refused == {"part": "values", "refused": "no form"}
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(parts_table(rows, "a title"))
    shown = console.export_text()
    assert shown.count(" yes ") == 1
    assert "20.0 (50 %)" in shown and "1 of 2" in shown and "5.0 MB" in shown and "2.5 MB" in shown
    assert "rotation: moved the dense logits by 2.0e-05, above 1e-05" in shown and "gains: moved" not in shown
    assert "*residual rotation" in shown and "adds 1,234 parameters" in shown and "values: refused: no form" in shown
