"""Results as a table and a plot. Knows only rows: level, method, perplexity, kl, bytes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from elastic_sparsity.errors import ConfigError, OutputError, brief

Row = Mapping[str, Any]


def human_bytes(count: float) -> str:
    """1234567 -> "1.2 MB" (powers of ten, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """A size as people write it: "60MB" -> 60_000_000, "1.5GiB" -> 1_610_612_736, "5000" -> 5000.

    Raises: ConfigError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]) or len(text) > 40:
        raise ConfigError(f"{brief(text)} is no size; write e.g. 60MB, 1.5GB or 512MiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


def levels_table(levels: Sequence[Row], title: str) -> Table:
    """A rich table of what a checkpoint offers, one line a level."""
    table = Table(title=title)
    for column in ("level", "zeros", "bytes read", "here", "perplexity", "KL to dense"):
        table.add_column(column, justify="left" if column in ("level", "here") else "right")
    for row in levels:
        perplexity = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        here = "yes" if row["available"] else "no"
        table.add_row(row["title"], f"{100 * row['sparsity']:.2f} %", human_bytes(row["bytes"]), here, perplexity, kl)
    return table


def layer_table(types: Sequence[Row], levels: Sequence[str]) -> Table:
    """A rich table of zeros by layer type and level."""
    table = Table(title="zeros by layer type")
    for column in ("layer type", "linears", "weights", *levels):
        table.add_column(column, justify="left" if column == "layer type" else "right")
    for row in types:
        cells = [f"{100 * share:.2f} %" for share in row["sparsity"]]
        table.add_row(row["name"], str(row["count"]), f"{row['weights']:,}", *cells)
    return table


def checks_table(checks: Sequence[Row]) -> Table:
    """A rich table of what `verify` found."""
    table = Table(title="verification")
    for column in ("promise", "holds", "seen"):
        table.add_column(column)
    for row in checks:
        table.add_row(row["name"], "yes" if row["passed"] else "[bold red]NO[/]", escape(row["detail"]))
    return table


def results_table(rows: Sequence[Row], title: str) -> Table:
    """A rich table, one line a level and method."""
    table = Table(title=title)
    for column in ("level", "method", "perplexity", "KL to dense", "bytes on disk"):
        table.add_column(column, justify="left" if column in ("level", "method") else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["level"]):
            table.add_section()
        previous = row["level"]
        kl = "" if row.get("kl") is None else f"{row['kl']:.4f}"
        size = human_bytes(row["bytes"]) if row.get("bytes") else ""
        table.add_row(level_title(row["level"]), row["method"], f"{row['perplexity']:.2f}", kl, size)
    return table


def level_title(level: str) -> str:
    """A level's name for people: "0.6" -> "60 %"; others stay as they are."""
    try:
        return f"{100 * float(level):g} %"
    except ValueError:
        return level


def plot_results(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity of every method by level (log scale), with the dense model as a line, as a PNG."""
    import matplotlib  # slow import, only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = [row for row in rows if row["level"] == "dense"]
    levels = list(dict.fromkeys(row["level"] for row in rows if row["level"] != "dense"))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["level"] != "dense"))
    figure, axes = pyplot.subplots(figsize=(1.8 + 1.5 * len(levels), 4.2), layout="constrained")
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(sorted(methods, key=lambda m: m == "elastic")):
        values = {row["level"]: row["perplexity"] for row in rows if row["method"] == method}
        at = [i + (number - (len(methods) - 1) / 2) * width for i, level in enumerate(levels) if level in values]
        heights = [values[level] for level in levels if level in values]
        bars = axes.bar(at, heights, width, label=method, color="tab:green" if method == "elastic" else None)
        axes.bar_label(bars, [f"{h:.3g}" if h < 1000 else f"{h:.0f}" for h in heights], fontsize=8)
    for row in dense:
        axes.axhline(row["perplexity"], color="black", linestyle="--", label=f"dense ({row['perplexity']:.1f})")
    axes.set_yscale("log")
    axes.set_xticks(range(len(levels)), [level_title(level) for level in levels])
    axes.set_xlabel("level (share of zeros, or N:M)")
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)
