"""Results as a table and a plot. Knows only rows: level, method, perplexity, kl, bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from elastic_sparsity.errors import OutputError

Row = Mapping[str, Any]


def human_bytes(count: float) -> str:
    """1234567 -> "1.2 MB" (powers of ten, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


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
        table.add_row(_title(row["level"]), row["method"], f"{row['perplexity']:.2f}", kl, size)
    return table


def _title(level: str) -> str:
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
    axes.set_xticks(range(len(levels)), [_title(level) for level in levels])
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
