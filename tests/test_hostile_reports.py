"""Bad result files, bad records and bad places for `report`: a named error, or a page in which nothing acts.

As in test_hostile.py.
"""

# ruff: noqa: B023  every function made in a loop is called before the next turn

import copy
import json
import os
import shutil
from random import Random

import pytest
from hostile import HUGE, edited, replaced
from hostile_inputs import make, places
from reports import EVIL, quality, results, with_record
from test_report_page import check_page

from elastic_sparsity import reporting, write_report

pytest_plugins = ("hostile_fixtures",)
pytestmark = pytest.mark.usefixtures("judged", "undrawn")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without plots, which take most of the time."""
    monkeypatch.setattr(
        reporting, "plots_of", lambda _: dict.fromkeys(("sparsity", "bytes", "totals", "zeros", "errors"))
    )


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return with_record(shutil.copytree(tiny_checkpoint, tmp_path / "c"), quality=quality())


def nothing_acts(page):
    text = page.read_text(encoding="utf-8")
    check_page(text)
    return "<script" not in text and "nan" not in text.lower().split()


def texts_of_results(good, random, count):
    """(words, bytes) of files that are no results, or hardly."""
    whole = json.dumps(good).encode()
    kinds = (None, 7, "x", [], {}, [good], {"rows": good})
    yield from ((f"{kind!r:.40}", json.dumps(kind).encode()) for kind in kinds)
    yield from (("a byte order mark", b"\xef\xbb\xbf" + whole), ("UTF-16", whole.decode().encode("utf-16")))
    yield from (
        ("empty", b""),
        ("NULs", bytes(99)),
        ("nested", b'{"rows":' + b"[" * 10**5),
        ("large", b" " * 4_100_000),
    )
    yield from ((f"cut at {at}", whole[:at]) for at in range(0, len(whole), len(whole) // 12))
    for value in (float("nan"), float("inf"), -float("inf"), HUGE, -1, True, "12.3", None, [3.0], 1e308):
        for place in ((good["rows"], "perplexity"), (good["rows"], "kl"), (good["zero_shot"]["rows"], "value")):
            yield f"{place[1]} {value!r:.30}", changed(good, place, value)
    for key in ("level", "device", "date", "checkpoint_id"):
        for value in (EVIL, "", "\ud800", "x" * 10**5, "\x1b[31m", 3, None):
            yield f"{key} {value!r:.30}", changed(good, (good["rows"], key), value)
    for number in range(count):
        if number % 2:
            data = copy.deepcopy(good)
            yield f"{number}: {replaced(data, random)}", json.dumps(data).encode()
        else:
            yield f"edited {number}", edited(whole, random)


def changed(good, place, value):
    """The whole as bytes with one field of a list's first row changed."""
    rows, key = place
    before = rows[0][key]
    rows[0][key] = value
    data = json.dumps(good).encode()
    rows[0][key] = before
    return data


def test_results(ledger, folder, tmp_path):
    path, page = tmp_path / "results.json", ledger.out
    good = results(folder)
    path.write_text(json.dumps(good))
    assert write_report(folder, tmp_path / "page.html", results=[path], card=False).is_file(), "else nothing is tested"
    for number, (words, data) in enumerate(texts_of_results(good, Random(21), 300)):
        path.write_bytes(data)
        options = {"case": words, "inputs": [folder, path], "is_right": lambda: nothing_acts(page)}
        if number % 4:
            ledger.api("write_report", lambda: write_report(folder, page, results=[path], card=False), **options)
        else:
            ledger.cli("report", folder, "--results", path, "--no-card", "--output", page, **options)


def test_places_of_results(ledger, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        folder,
        tmp_path / "pipe",
        tmp_path / "loop",
        tmp_path / ("n" * 300),
        "",
        tmp_path / "a\0b",
        "no.json",
    ):
        if "\0" not in str(path):
            ledger.cli("report", folder, f"--results={path}", "--no-card", "--output", ledger.out, inputs=[folder])
        ledger.api(
            "write_report", lambda: write_report(folder, ledger.out, results=[path], card=False), case=f"{path!r}"
        )


def test_records(ledger, folder):
    """Damaged records that a checkpoint's digest does not cover: mostly a page, and nothing in it acts."""
    good, random, page = {}, Random(22), ledger.out
    for name in ("elastic_config.json", "run.json", "config.json"):
        good[name] = (folder / name).read_bytes()
    for number in range(240):
        name = random.choice(list(good))
        data = json.loads(good[name])
        words = replaced(data, random, values=(EVIL, HUGE, float("nan"), float("-inf"), [EVIL], {EVIL: EVIL}, "\ud800"))
        (folder / name).write_bytes(json.dumps(data).encode() if number % 3 else edited(good[name], random))
        options = {"case": f"{name} {number % 3}: {words}", "inputs": [folder], "is_right": lambda: nothing_acts(page)}
        if number % 4:
            ledger.api("write_report", lambda: write_report(folder, page, card=False), **options)
        else:
            ledger.cli("report", folder, "--no-card", "--output", page, **options)
        (folder / name).write_bytes(good[name])


def test_places_of_the_page(ledger, folder, tmp_path):
    for words, place in places(make(tmp_path / "places")).items():
        ledger.api("write_report", lambda: write_report(folder, place, card=False, force=True), case=words,
                   inputs=[folder])  # fmt: skip
