"""What a log file shows of a long command."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from elastic_sparsity.cli_progress import LINE_SECONDS, ProgressLines, progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines():
    """(what was written, the reporter, its clock)"""
    written, clock = [], Clock()
    return written, ProgressLines(written.append, clock), clock


def test_a_line_at_the_start_every_minute_and_at_the_end(lines):
    written, report, clock = lines
    for done in range(1001):
        report("folds", done, 1000)
        clock.now += 0.5
    assert written[0] == "folds 0/1,000"
    assert written[1:-1] == [
        f"folds {done}/1,000  0:0{done // 120}:00 left {text}"
        for done, text in zip(range(120, 1000, 120), ["0:07:20", "0:06:20", "0:05:20", "0:04:20", "0:03:20", "0:02:20",
                                                      "0:01:20", "0:00:20"], strict=True)
    ]  # fmt: skip
    assert written[-1] == "folds 1,000/1,000  0:08:20 left 0:00:00"


def test_a_resumed_stage_counts_from_where_it_goes_on(lines):
    written, report, clock = lines
    report("blocks", 20, 30)
    clock.now += LINE_SECONDS
    report("blocks", 22, 30)
    assert written == ["blocks 20/30", "blocks 22/30  0:01:00 left 0:04:00"]


def test_a_stage_that_begins_anew_is_timed_anew_and_nothing_is_said_twice(lines):
    written, report, clock = lines
    for done in (0, 1, 1, 2, 2):
        report("search", done, 2)
    clock.now += 500
    report("other", 0, 2)
    report("search", 0, 2)
    clock.now += 10
    report("search", 2, 2)
    assert written == ["search 0/2", "search 2/2  0:00:00 left 0:00:00", "other 0/2", "search 0/2",
                       "search 2/2  0:00:10 left 0:00:00"]  # fmt: skip


def test_a_log_file_gets_whole_dated_lines(capsys):
    with progress(quiet=False) as report:
        report("a stage of two", 0, 2)
        logging.getLogger("elastic_sparsity.x").info(
            "a message that is longer than a terminal is wide %s\x1b[31m", "-" * 99
        )
        report("a stage of two", 2, 2)
    out, err = capsys.readouterr()
    day = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO "
    wanted = ["a stage of two 0/2", "a message that .* -{99}\\\\x1b\\[31m", "a stage of two 2/2  0:00:00 left 0:00:00"]
    assert not out
    assert [bool(re.fullmatch(day + text, line)) for text, line in zip(wanted, err.splitlines(), strict=True)] == [
        True
    ] * 3


def test_quiet_is_quiet(capsys):
    with progress(quiet=True) as report:
        report("a stage", 0, 2)
        logging.getLogger("elastic_sparsity.x").info("a message")
        report("a stage", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_quiet_does_not_hide_a_warning(capsys):
    with progress(quiet=True):
        logging.getLogger("elastic_sparsity.x").warning("a phase is off")
    assert "WARNING a phase is off" in capsys.readouterr().err


SCRIPT = """
from elastic_sparsity.cli_progress import progress
with progress(quiet=False) as report:
    report("a stage", 1, 2)
    report("a stage", 2, 2)
"""


def test_a_terminal_gets_bars():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # the other end is closed
        pass
    assert running.wait(60) == 0
    os.close(ours)
    assert "━" in seen.decode() and "2/2" in seen.decode() and "INFO" not in seen.decode()
