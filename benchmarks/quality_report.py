"""quality.py's cells as one table and two plots. Plain numbers only."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from elastic_sparsity.report import human_bytes, level_title, mean_score

Row = Mapping[str, Any]
GAP_OF = "sparsegpt"
CUT = 100  # times the dense perplexity
ORDER = ("dense", "magnitude", "wanda", "ria", "obs", "dsnot", "sparsegpt", "epts", "independent-full",
         "independent-full-all", "independent-lora", "independent", "elastic")  # fmt: skip
STYLES: dict[str, tuple[str, str]] = {  # colour, marker: grey for what prunes only, colours for what trains
    "magnitude": ("0.75", "v"), "wanda": ("0.6", "s"), "ria": ("0.5", "d"), "obs": ("0.7", "<"), "dsnot": ("0.4", "^"),
    "sparsegpt": ("black", "o"), "epts": ("tab:purple", "P"), "independent-full": ("tab:orange", "s"),
    "independent-full-all": ("tab:red", "s"), "independent-lora": ("tab:cyan", "^"), "independent": ("tab:blue", "D"),
    "elastic": ("tab:green", "o"),
}  # fmt: skip


def summary(cells: Iterable[Row]) -> list[dict[str, Any]]:
    """One row a level and method, dense first, over the seeds that are there.

    Perplexity and KL: mean over seeds, and the standard deviation of a sample ("spread"; None with one seed).
    gap_closed: (log SparseGPT - log method) / (log SparseGPT - log dense), of the mean log-perplexity; None where
    SparseGPT loses nothing. Tasks: mean over
    the tasks that every one of the row's seeds has, and its standard error over documents, which more seeds do not
    lower, since all answer the same documents.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        groups.setdefault((cell["level"], cell["method"]), []).append(cell)
    logs = {key: statistics.fmean(math.log(x["perplexity"]) for x in found) for key, found in groups.items()}
    dense = logs.get(("dense", "dense"))
    rows = []
    for (level, method), found in sorted(groups.items(), key=lambda group: _order(*group[0])):
        reference, gap = logs.get((level, GAP_OF)), None
        if reference is not None and dense is not None and reference > dense and method not in ("dense", GAP_OF):
            gap = (reference - logs[level, method]) / (reference - dense)
        rows.append(
            {
                "level": level,
                "method": method,
                "seeds": sorted(x["seed"] for x in found),
                **_mean_and_spread("perplexity", found),
                **_mean_and_spread("kl", found),
                "gap_closed": gap,
                **_tasks(found),
                **{key: _mean([x.get(key) for x in found]) for key in ("seconds", "bytes", "bytes_all")},
            }
        )
    return rows


def _order(level: str, method: str) -> tuple[Any, ...]:
    return level != "dense", ":" in level, level, ORDER.index(method)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean_and_spread(key: str, cells: Sequence[Row]) -> dict[str, float | None]:
    values = [cell[key] for cell in cells]
    return {key: statistics.fmean(values), f"{key}_spread": statistics.stdev(values) if len(values) > 1 else None}


def _tasks(cells: Sequence[Row]) -> dict[str, Any]:
    names = [name for name in cells[0].get("tasks", {}) if all(name in cell.get("tasks", {}) for cell in cells)]
    if not names or not all(cells[0]["tasks"][name]["metric"].startswith("acc") for name in names):
        return {"tasks": len(names), "accuracy": None, "accuracy_error": None}
    means = [mean_score([(cell["tasks"][n]["value"], cell["tasks"][n]["error"]) for n in names]) for cell in cells]
    errors = [error for _, error in means if error is not None]
    error = statistics.fmean(errors) if len(errors) == len(means) else None
    return {"tasks": len(names), "accuracy": statistics.fmean(x for x, _ in means), "accuracy_error": error}


def table(rows: Sequence[Row], title: str) -> Table:
    """A line a level and method."""
    tasks = max((row["tasks"] for row in rows), default=0)
    found = Table(title=title)
    columns = ("level", "method", "seeds", "perplexity", "gap closed", "KL to dense", f"mean of {tasks} tasks, %",
               "seconds to make", "bytes")  # fmt: skip
    for column in columns:
        if tasks or "tasks" not in column:
            found.add_column(column, justify="left" if column in ("level", "method") else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["level"]):
            found.add_section()
        previous = row["level"]
        accuracy = "" if row["accuracy"] is None else _with_error(100 * row["accuracy"], row["accuracy_error"], 100, 1)
        if accuracy and row["tasks"] < tasks:
            accuracy += f" ({row['tasks']})"
        cells = [
            level_title(row["level"]), row["method"], str(len(row["seeds"])),
            _with_error(row["perplexity"], row["perplexity_spread"], 1, 2),
            "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %",
            _with_error(row["kl"], row["kl_spread"], 1, 3),
            *([accuracy] if tasks else []),
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            human_bytes(row["bytes"]),
        ]  # fmt: skip
        found.add_row(*cells, style="bold" if row["method"] == "elastic" else None)
    return found


def _with_error(value: float, error: float | None, scale: float, digits: int) -> str:
    return f"{value:,.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def plot_levels(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity of every method by sparsity, and beside it of the N:M patterns; bars are the spread over seeds."""
    patterns = list(dict.fromkeys(row["level"] for row in rows if ":" in row["level"]))
    with _figure(path, (9, 4.8), [3, 0.5 + 0.7 * len(patterns)] if patterns else [1]) as (figure, axes):
        at_pattern = {name: i for i, name in enumerate(patterns)}
        methods = [method for method in ORDER if any(row["method"] == method for row in rows)]
        for number, method in enumerate(m for m in methods if m != "dense"):
            mine = [row for row in rows if row["method"] == method]
            plain = [row for row in mine if ":" not in row["level"]]
            _errorbar(axes[0], [100 * float(row["level"]) for row in plain], plain, method, "-", method)
            if patterns:
                shift = 0.06 * (number - len(methods) / 2)
                nm = [row for row in mine if ":" in row["level"]]
                _errorbar(axes[-1], [at_pattern[row["level"]] + shift for row in nm], nm, method, "none", None)
        for axis in axes:
            for row in rows:
                if row["method"] == "dense":
                    axis.axhline(row["perplexity"], color="black", linestyle="--", linewidth=1)
        for row in rows:
            if row["method"] == "dense":
                axes[0].annotate(f"dense {row['perplexity']:.1f}", (0.01, row["perplexity"]), va="bottom", fontsize=8,
                                 xycoords=("axes fraction", "data"))  # fmt: skip
        _log_scale(axes[0])
        _cut(axes, rows, at_pattern)
        axes[0].set_ylabel("perplexity (log scale, lower is better)")
        axes[0].set_xlabel("sparsity, % of zeros")
        sparsities = {100 * float(row["level"]) for row in rows if row["level"] != "dense" and ":" not in row["level"]}
        axes[0].set_xticks(sorted(sparsities))
        if patterns:
            axes[-1].set_xticks(range(len(patterns)), patterns)
            axes[-1].set_xlim(-0.6, len(patterns) - 0.4)
            axes[-1].set_xlabel("N:M")
        handles = axes[0].get_legend_handles_labels()
        figure.legend(handles[0][::-1], handles[1][::-1], loc="outside right upper", fontsize=8)
        axes[0].set_title(title, fontsize=10)


def _cut(axes: Sequence[Any], rows: Sequence[Row], at_pattern: Mapping[str, int]) -> None:
    """Ends the y axis where models stop to be any use, and writes what lies above it at its upper edge."""
    dense = [row["perplexity"] for row in rows if row["method"] == "dense"]
    if not dense or max(row["perplexity"] for row in rows) <= CUT * dense[0]:
        return
    axes[0].set_ylim(top=1.3 * CUT * dense[0])
    above: dict[str, list[str]] = {}
    for row in rows:
        if row["perplexity"] > CUT * dense[0]:
            above.setdefault(row["level"], []).append(f"{row['method']} {row['perplexity']:,.0f} ↑")
    for level, texts in above.items():
        axis, x = (axes[-1], at_pattern[level]) if level in at_pattern else (axes[0], 100 * float(level))
        axis.annotate("\n".join(texts), (x, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=7,
                      color="0.3", bbox={"color": "white", "pad": 1})  # fmt: skip


def plot_bytes(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity by the bytes that a level reads, of the one elastic file or of a bitmask file of its own; below, what
    all levels take together."""
    shown = ("sparsegpt", "epts", "independent-full", "independent-lora", "independent", "elastic")
    with _figure(path, (9, 6), [1], heights=[4, 1]) as (figure, axes):
        axis = axes[0]
        for method in shown:
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
            plain, nm = [[row for row in mine if (":" in row["level"]) is pattern] for pattern in (False, True)]
            what = "in the one file" if method == "elastic" else "bitmask file"
            _errorbar(axis, [row["bytes"] / 1e6 for row in plain], plain, method, "-", f"{method} ({what})")
            _errorbar(axis, [row["bytes"] / 1e6 for row in nm], nm, method, "none", None)
            for row in mine if method in ("elastic", "sparsegpt") else ():
                place = (row["bytes"] / 1e6, row["perplexity"])
                offset = (-4, -12) if method == "elastic" else (6, 3)
                axis.annotate(level_title(row["level"]), place, offset, textcoords="offset points", fontsize=7)
        for row in rows:
            if row["method"] == "dense":
                axis.plot(row["bytes"] / 1e6, row["perplexity"], "k*", markersize=11, label="dense")
        _log_scale(axis)
        axis.set_ylabel("perplexity (log scale, lower is better)")
        axis.set_xlabel("MB of weights that a level reads")
        axis.set_title(title, fontsize=10)
        bars = _totals(rows)
        axes[1].barh(range(len(bars)), [size / 1e6 for _, size, _ in bars], color=[color for *_, color in bars])
        for y, (_, size, _) in enumerate(bars):
            axes[1].text(size / 1e6, y, f" {human_bytes(size)}", va="center", fontsize=8)
        axes[1].set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
        axes[1].invert_yaxis()
        axes[1].set_xlabel("MB for all levels together")
        axes[1].set_xlim(0, 1.15 * max([size / 1e6 for _, size, _ in bars], default=1))
        figure.legend(loc="outside right upper", fontsize=8)


def _totals(rows: Sequence[Row]) -> list[tuple[str, float, str]]:
    """(name, bytes, colour) of what all of elastic's levels take together, by way of storing."""
    elastic = {row["level"]: row["bytes_all"] for row in rows if row["method"] == "elastic"}
    bars = [("one elastic file", max(elastic.values()), "tab:green")] if elastic else []
    for method in ("independent", GAP_OF):
        alone = {row["level"]: row["bytes"] for row in rows if row["method"] == method}
        if elastic and elastic.keys() <= alone.keys():
            bars.append((f"{len(elastic)} bitmask files", sum(alone[level] for level in elastic), "tab:blue"))
            break
    dense = [row["bytes"] for row in rows if row["method"] == "dense"]
    if elastic and dense:
        bars.append((f"{len(elastic)} dense files", len(elastic) * dense[0], "0.6"))
    return bars


def _errorbar(axis: Any, x: Sequence[float], rows: Sequence[Row], method: str, line: str, label: str | None) -> None:
    color, marker = STYLES[method]
    axis.errorbar(
        x, [row["perplexity"] for row in rows], [row["perplexity_spread"] or 0.0 for row in rows], label=label,
        color=color, marker=marker, linestyle=line, markersize=5, capsize=2,
        linewidth=2.2 if method == "elastic" else 1.2, zorder=3 if method == "elastic" else 2,
    )  # fmt: skip


def _log_scale(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(visible=True, axis="y", alpha=0.3)


@contextmanager
def _figure(
    path: Path, size: tuple[float, float], widths: Sequence[float], heights: Sequence[float] = (1,)
) -> Iterator[tuple[Any, Any]]:
    """A figure with panels in one row or one column, written at the end; panels of a row share the y axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(heights), len(widths), figsize=size, layout="constrained", sharey="row", squeeze=False,
        width_ratios=widths, height_ratios=heights,
    )  # fmt: skip
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    yield figure, list(axes.flat)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
