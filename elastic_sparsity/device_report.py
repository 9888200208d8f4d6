"""What doctor, bench and profiles found, as tables and sentences."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from elastic_sparsity.device_profile import Measurement, Profile
from elastic_sparsity.doctor import FEATURES, Facts, Verdict
from elastic_sparsity.report import human_bytes, level_title
from elastic_sparsity.ways import DENSE

GAIN, LOSS = 1.05, 0.95  # speedups between them are noise of one run


def machine_table(facts: Facts) -> Table:
    """A rich table of what the machine is."""
    table = Table(title="this machine", show_header=False)
    here = facts.features
    features = ", ".join(f"{name} {'yes' if name in here else 'no'}" for name in FEATURES) if here is not None else None
    rows = {
        "CPU": f"{facts.cpu} ({facts.architecture})",
        "features": features or "unknown: this system does not tell",
        "memory": f"{human_bytes(facts.memory_bytes)}, {human_bytes(facts.free_bytes)} free",
        "torch": f"{facts.torch}, {facts.threads} threads on {facts.cores} cores",
    }
    kernels = [f"{x.name} {'yes' if x.problem is None else f'no ({x.problem})'}" for x in facts.instruction_paths]
    rows["packed kernels"] = f"{facts.active_path or 'none'} in use; {', '.join(kernels)}"
    for gpu in facts.gpus:
        rows[gpu.name] = f"{gpu.architecture}, {human_bytes(gpu.memory_bytes)}"
    if not facts.gpus:
        rows["GPU"] = "none that torch can use"
    for name, text in rows.items():
        table.add_row(escape(name), escape(text))
    return table


def ways_table(rows: list[Verdict]) -> Table:
    """A rich table of the ways to run a level, and why each exists here or does not."""
    table = Table(title="ways to run a level")
    for column in ("way", "device", "levels", "here", "why"):
        table.add_column(column, no_wrap=column != "why")
    words = {True: "[green]yes[/]", False: "no", None: "unknown"}
    for row in rows:
        table.add_row(row.way.name, row.device, row.levels, words[row.works], escape(row.reason))
    return table


def title_of(profile: Profile) -> str:
    """The profile's name, and that it is an estimate if it is one."""
    return f"{profile.name} (estimate, not measured)" if profile.is_estimate else profile.name


def speed_table(profile: Profile) -> Table:
    """A rich table of whole models: one line a level and way, tokens a second and speedup over the best dense way."""
    batches = [row.batch for row in profile.measurements[0].decode] if profile.measurements else []
    table = Table(title=escape(f"{title_of(profile)}: tokens a second, prefill and decode at each batch"))
    _name_columns(table, "level", "way")
    for column in ("prefill", *(f"batch {batch}" for batch in batches)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in profile.measurements:
        decode = [_speed(x.batch / x.step_s, x.speedup) for x in row.decode]
        prefill = _speed(row.prefill.tokens_per_s, row.prefill.speedup)
        table.add_row(escape(level_title(row.level)), escape(row.way), prefill, *decode)
    return table


def _name_columns(table: Table, *columns: str) -> None:
    for column in columns:
        table.add_column(column, no_wrap=True)


def _speed(tokens_per_s: float, speedup: float) -> str:
    number = f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"
    return f"{number}\n{speedup:.2f}x"


def sizes_table(profile: Profile) -> Table:
    """A rich table of what each level and way weighs."""
    table = Table(title=escape(f"{title_of(profile)}: bytes"))
    _name_columns(table, "level", "way")
    for column in ("in memory", "read a token", "from disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in profile.measurements:
        sizes = (row.resident_bytes, row.streamed_bytes, row.disk_bytes)
        table.add_row(escape(level_title(row.level)), escape(row.way), *map(human_bytes, sizes))
    return table


def shapes_table(profile: Profile) -> Table:
    """A rich table of single linears, microseconds a call: one line a shape, level and way."""
    tokens = sorted({row.tokens for row in profile.shapes})
    table = Table(title=escape(f"{title_of(profile)}: microseconds a linear"))
    _name_columns(table, "outputs x inputs", "level", "way")
    for count in tokens:
        table.add_column("1 token" if count == 1 else f"{count} tokens", justify="right")
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in profile.shapes:
        key = (f"{row.outputs} x {row.inputs}", level_title(row.level), row.way)
        found.setdefault(key, {})[row.tokens] = row.seconds
    for key, seconds in sorted(found.items()):
        cells = [f"{1e6 * seconds[count]:.1f}" if count in seconds else "" for count in tokens]
        table.add_row(*map(escape, key), *cells)
    return table


def lines_table(profile: Profile) -> Table:
    """A rich table of the numbers that predictions rest on."""
    table = Table(title=escape(f"{title_of(profile)}: what predictions rest on"))
    for column in ("way", "GB a second", "microseconds a linear", "largest error"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, entry in profile.ways.items():
        error = "not measured" if entry.fit_error is None else f"{100 * entry.fit_error:.0f} %"
        table.add_row(escape(name), f"{entry.bytes_per_s / 1e9:.3g}", f"{1e6 * entry.overhead_s:.3g}", error)
    return table


def verdict_lines(profile: Profile) -> Iterator[str]:
    """What to use, in words: for every level, each way against the fastest dense one at each batch."""
    for level in dict.fromkeys(row.level for row in profile.measurements):
        rows = [row for row in profile.measurements if row.level == level]
        dense = [row for row in rows if row.way.startswith(f"{DENSE}-")]
        for row in rows:
            yield from _verdicts(row, dense)


def _verdicts(row: Measurement, dense: list[Measurement]) -> Iterator[str]:
    texts: dict[str, list[str]] = {}
    for number, entry in enumerate(row.decode):
        best = min(dense, key=lambda found: found.decode[number].step_s)
        if best is row:
            continue
        share = row.streamed_bytes / best.streamed_bytes
        at = f"batch {entry.batch} ({entry.speedup:.2f}x)"
        if entry.speedup >= GAIN:
            text = f"decodes faster than {best.way} and reads {share:.2f} of its bytes: use it at"
        elif share < 1:
            how = "is slower than" if entry.speedup < LOSS else "is no faster than"
            text = f"{how} {best.way} and reads {share:.2f} of its bytes: use it only where memory is short, at"
        else:
            text = f"gains nothing: use {best.way} at"
        texts.setdefault(text, []).append(at)
    for text, batches in texts.items():
        yield f"{row.way} at {level_title(row.level)} {text} {', '.join(batches)}."
    if texts and not row.way.startswith(DENSE) and row.prefill.speedup < LOSS:
        yield f"{row.way} at {level_title(row.level)} reads prompts slower than dense ({row.prefill.speedup:.2f}x)."
