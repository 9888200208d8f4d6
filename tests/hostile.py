"""What bad inputs are judged by: a ledger that runs one case after another and counts; and ways to damage bytes.

A case may end in an error of ours or, if the input happens to be good, in a result. Anything else is a problem: another
exception, a traceback, a hang, a changed input, or something left where the output would have been.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import stat
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

from elastic_sparsity import ElasticCheckpoint, cli
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.manifest import CONFIG_NAME

SECONDS = 60  # of one case; the slowest needs 8, but other work may run on the machine
MAX_LINES = 25
MAX_CHARS = 4000
REFUSED, VALID = "refused", "valid"
PROBLEMS = ("tracebacks", "hangs", "damaged", "unclear")


class Hang(BaseException):
    """Not an Exception: no `except Exception` of a library may swallow it."""


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_digests = {}  # of files, by place, size and times


def fingerprint(path):
    """Everything at a path: names, kinds, and of files the bytes. A pipe is not opened."""
    path = os.fspath(path)
    if not os.path.lexists(path):
        return None
    found = {}
    _add(found, ".", path)
    return found


def _add(found, name, path):
    status = os.lstat(path)
    kind, content = stat.S_IFMT(status.st_mode), None
    if kind == stat.S_IFREG:
        content = _digest(path, status)
    elif kind == stat.S_IFLNK:
        content = str(Path(path).readlink())
    found[name] = (kind, content)
    if kind == stat.S_IFDIR:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries)
        for entry in names:
            _add(found, entry if name == "." else f"{name}/{entry}", f"{path}/{entry}")


def _digest(path, status):
    """sha256, kept until the system changes anything about the file; not if it just did, as its clock is coarse."""
    key = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key in _digests:
        return _digests[key]
    digest = hashlib.sha256(Path(path).read_bytes()).digest()
    if time.time_ns() - status.st_ctime_ns > 10**8:
        _digests[key] = digest
    return digest


def run_cli(arguments):
    """`elastic-sparsity ARGUMENTS` in this process, with streams as a terminal has them: (code, stdout, stderr)."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = {
        "stdout": io.TextIOWrapper(out, encoding="utf-8", write_through=True),
        "stderr": io.TextIOWrapper(err, encoding="utf-8", errors="backslashreplace", write_through=True),
    }
    with mock.patch.multiple(sys, argv=["elastic-sparsity", *map(str, arguments)], **streams):
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, out.getvalue().decode(), err.getvalue().decode()


class Ledger:
    """Counts of what happened, by entry point, and every problem in words.

    Args:
        room: an empty folder; outputs of cases go to `room / "out"`, and the working folder is `room / "here"`.
    """

    def __init__(self, room):
        self.room = Path(room)
        self.outputs, self.here = self.room / "outputs", self.room / "here"
        self.outputs.mkdir()
        self.here.mkdir()
        self.counts = defaultdict(Counter)
        self.slowest = (0.0, "")
        self.problems = []
        self.files = set()

    @property
    def out(self):
        return self.outputs / "out"

    def api(self, entry, call, *, case, inputs=(), keep=None, is_right=None):
        """Runs `call()`; it may raise an ElasticSparsityError.

        Args:
            case: the input in words, for the report of a problem.
            inputs: files and folders that must not change.
            keep: of a call that may change an input: gets its fingerprints before and after, says whether that is fine.
            is_right: says whether a result is what it should be, where that is known.
        """

        def attempt():
            try:
                result = call()
            except ElasticSparsityError as error:
                return REFUSED, str(error)
            if isinstance(result, str) and result.startswith(REFUSED):
                return REFUSED, result
            return VALID, ""

        return self._judge(f"API {entry}", attempt, case, inputs, keep, is_right)

    def cli(self, *arguments, inputs=(), case=None, keep=None, is_right=None, damage_code=2):
        """Runs a command; it may exit with 2 and a message. (`damage_code`: what `inspect --verify` has for damage.)"""
        case = case or " ".join(map(repr, map(str, arguments)))

        def attempt():
            code, stdout, stderr = run_cli(arguments)
            if "Traceback" in stderr or "Traceback" in stdout:
                raise AssertionError(f"a traceback on a stream: {stderr[-500:]}")
            if "\x1b" in stdout + stderr or "\a" in stdout + stderr:
                raise AssertionError(f"a control character for the terminal: {stderr[-500:]!r}")
            if code == 0:
                return VALID, ""
            if code not in (2, damage_code):
                raise AssertionError(f"exit code {code}: {stderr[-500:]}")
            return REFUSED, stderr if code == 2 else "a table of what is damaged"

        return self._judge(f"CLI {arguments[0]}" if arguments else "CLI", attempt, case, inputs, keep, is_right)

    def _judge(self, entry, attempt, case, inputs, keep, is_right):
        row = self.counts[entry]
        before = {path: fingerprint(path) for path in (*inputs, self.outputs, self.here)}
        started, outcome, message = time.monotonic(), None, ""
        try:
            with time_limit():
                outcome, message = attempt()
        except Hang:
            self._problem(row, "hangs", entry, case, f"runs longer than {SECONDS} s")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._problem(row, "tracebacks", entry, case, f"{type(error).__name__}: {str(error)[:600]}{_place(error)}")
        seconds = time.monotonic() - started
        row["seconds"] += seconds
        self.slowest = max(self.slowest, (seconds, f"{entry}: {case[:120]}"))
        row[outcome or REFUSED] += 1
        if outcome == REFUSED and (len(message) > MAX_CHARS or message.count("\n") > MAX_LINES or not message.strip()):
            lines = message.count("\n")
            self._problem(row, "unclear", entry, case, f"{lines} lines, {len(message)} characters: {message[:300]!r}")
        if outcome == VALID and is_right is not None and not is_right():
            self._problem(row, "damaged", entry, case, "a result other than it should be")
        self._check_files(row, entry, case, outcome, before, keep)
        return outcome, message

    def _check_files(self, row, entry, case, outcome, before, keep):
        for path, old in before.items():
            new = fingerprint(path)
            if new == old or (path == self.outputs and outcome == VALID and not _leftovers(new)):
                continue
            if keep is not None and path not in (self.outputs, self.here) and keep(old, new):
                continue
            self._problem(row, "damaged", entry, case, f"{path} changed: {_difference(old, new)}")
        if outcome == VALID and (self.out / CONFIG_NAME).is_file():
            ElasticCheckpoint(self.out).check_extras()
        for path in (self.outputs, self.here):
            if fingerprint(path) != before[path]:
                shutil.rmtree(path)
                path.mkdir()
                os.chdir(self.here)

    def _problem(self, row, kind, entry, case, what):
        row[kind] += 1
        self.problems.append(f"{kind}: {entry}: {case[:300]}\n      {what}")

    def check(self, since=0):
        """Fails with the first problems, if there are any."""
        found = self.problems[since:]
        assert not found, f"{len(found)} problems:\n  " + "\n  ".join(found[:40])

    def total(self):
        return sum(row[REFUSED] for row in self.counts.values())

    def table(self):
        """The counts as text."""
        columns = (REFUSED, VALID, *PROBLEMS)
        lines = ["{:26}{:>11}".format("entry point", "bad inputs") + "".join(f"{column:>12}" for column in columns)]
        lines[0] += "  seconds"
        total = Counter()
        for entry, row in sorted(self.counts.items()):
            lines.append(_line(entry, row, columns))
            total.update(row)
        seconds, case = self.slowest
        return "\n".join([*lines, _line("all", total, columns), f"slowest case: {seconds:.1f} s, {case}"])


def _line(entry, row, columns):
    refused = Counter(row)
    refused[REFUSED] -= row["tracebacks"] + row["hangs"]
    counts = "".join(f"{refused[column]:>12}" for column in columns)
    return f"{entry:26}{row[REFUSED]:>11}{counts}{row['seconds']:>9.1f}"


def _place(error):
    trace, last = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if f"{os.sep}elastic_sparsity{os.sep}" in file:
            last = f"  [{Path(file).name}:{trace.tb_lineno}]"
        trace = trace.tb_next
    return last


def _leftovers(listing):
    return [name for name in listing or () if ".partial-" in name]


def _difference(old, new):
    old, new = old or {}, new or {}
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))[:5]


# Damage


def edited(data, random, most=4):
    """`data` after a few flips, cuts, insertions and repetitions."""
    data = bytearray(data)
    for _ in range(random.randint(1, most)):
        kind, place = random.choice(("flip", "flip", "cut", "insert", "repeat")), random.randrange(len(data) + 1)
        if kind == "flip" and data:
            data[place % len(data)] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del data[place : place + random.choice((1, 2, 7, len(data)))]
        elif kind == "insert":
            data[place:place] = random.randbytes(random.randint(1, 9))
        else:
            data[place:place] = data[place : place + random.randint(1, 60)]
    return bytes(data)


def nodes(tree, path=()):
    """Paths to everything in parsed JSON, below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from nodes(value, (*path, key))


GONE = object()
HUGE = 10**400
JSON_VALUES = (
    GONE, GONE, GONE, None, True, False, 0, 1, -1, 2, 3, 16, 33, 10**9, 2**63, HUGE, 0.5, 1e308, -1e-300,
    float("nan"), float("inf"), "", "x", "0.5", "2:4", "../x", "\0", "é" * 300, "\ud800", [], [0], [[]], {}, {"x": 1},
    [0.5] * 300,
)  # fmt: skip


def replaced(tree, random, values=JSON_VALUES):
    """Changes one place of parsed JSON, in place; says where and to what."""
    path = random.choice(list(nodes(tree)))
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    value = random.choice(values)
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return f"{'.'.join(map(str, path))} -> {'gone' if value is GONE else repr(value)[:40]}"
