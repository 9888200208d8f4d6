"""quality.py's rows as two plots. Plain numbers only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quality_report import GAP_OF, ORDER, Row, label_of

from elastic_sparsity.report import human_bytes, level_title

CUT = 100  # times the dense perplexity
STYLES: dict[str, tuple[str, str]] = {  # colour, marker: grey for what prunes only, colours for what trains
    "magnitude": ("0.75", "v"), "wanda": ("0.6", "s"), "ria": ("0.5", "d"), "obs": ("0.7", "<"), "dsnot": ("0.4", "^"),
    "sparsegpt": ("black", "o"), "epts": ("tab:purple", "P"), "epts-official": ("tab:pink", "P"),
    "independent-full-block": ("tab:red", "s"), "independent-full": ("tab:orange", "s"),
    "independent-lora": ("tab:cyan", "^"), "independent": ("tab:blue", "D"), "independent-same": ("navy", "D"),
    "elastic": ("tab:green", "o"), "elastic-uninduced": ("yellowgreen", "o"),
}  # fmt: skip


def plot_levels(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity of every method by sparsity, and beside it of the N:M patterns; bars are the spread over seeds.

    Left out: what failed, and learning rates that were only tried.
    """
    rows = _shown(rows)
    patterns = list(dict.fromkeys(row["level"] for row in rows if ":" in row["level"]))
    with _figure(path, (9, 4.8), [3, 0.5 + 0.7 * len(patterns)] if patterns else [1]) as (figure, axes):
        at_pattern = {name: i for i, name in enumerate(patterns)}
        methods = [method for method in ORDER if any(row["method"] == method for row in rows)]
        for number, method in enumerate(m for m in methods if m != "dense"):
            mine = [row for row in rows if row["method"] == method]
            plain = [row for row in mine if ":" not in row["level"]]
            _errorbar(axes[0], [100 * float(row["level"]) for row in plain], plain, method, "-", label_of(method))
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


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["perplexity"] is not None and row["method"] in ORDER]


def _cut(axes: Sequence[Any], rows: Sequence[Row], at_pattern: Mapping[str, int]) -> None:
    """Ends the y axis where models stop to be any use, and writes what lies above it at its upper edge."""
    dense = [row["perplexity"] for row in rows if row["method"] == "dense"]
    if not dense or max(row["perplexity"] for row in rows) <= CUT * dense[0]:
        return
    axes[0].set_ylim(top=1.3 * CUT * dense[0])
    above: dict[str, list[str]] = {}
    for row in rows:
        if row["perplexity"] > CUT * dense[0]:
            above.setdefault(row["level"], []).append(f"{label_of(row['method'])} {row['perplexity']:,.0f} ↑")
    for level, texts in above.items():
        axis, x = (axes[-1], at_pattern[level]) if level in at_pattern else (axes[0], 100 * float(level))
        axis.annotate("\n".join(texts), (x, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=7,
                      color="0.3", bbox={"color": "white", "pad": 1})  # fmt: skip


def plot_bytes(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity by the bytes that a level reads, of the one elastic file or of a bitmask file of its own; below, what
    all levels take together."""
    rows = _shown(rows)
    compared = ("sparsegpt", "epts", "independent-full", "independent-lora", "independent", "elastic")
    shown = [method for method in compared if any(row["method"] == method for row in rows)]
    with _figure(path, (9, 6), [1], heights=[4, 1]) as (figure, axes):
        axis = axes[0]
        for method in shown:
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
            plain, nm = [[row for row in mine if (":" in row["level"]) is pattern] for pattern in (False, True)]
            what = "in the one file" if method == "elastic" else "bitmask file"
            _errorbar(axis, [row["bytes"] / 1e6 for row in plain], plain, method, "-", f"{label_of(method)} ({what})")
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
        if axes[0].get_legend_handles_labels()[0]:  # none of the methods compared may be there
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
