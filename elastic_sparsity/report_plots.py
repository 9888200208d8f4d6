"""Figures of a report as SVG text for a page: no font, no script, no link, and the page's own colours for ink and grid.

Equal facts give equal text. Text from a checkpoint is drawn as it is: matplotlib escapes it, and its formulas are off.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from elastic_sparsity import report_words as words
from elastic_sparsity.report_facts import Facts

INK, GRID, PAPER = "#0a0b0c", "#0d0e0f", "#0e0f10"  # stand-ins for the page's own colours
PALETTE = ("#0d9488", "#e08a1e", "#7c6ff0", "#dc5087", "#3b8fd9", "#8a8f98", "#a3782e", "#5f9e3a")
MARKERS = "os^DvPX*"
MAX_LABELS = 12
MAX_ROWS, MAX_COLUMNS = 40, 4000  # of a heat map
WIDTH = 4.7  # inches: on a phone's width the text keeps its size


def perplexity_by_sparsity(facts: Facts) -> str | None:
    """Perplexity against zeros for every method, dense as a line; None if nothing finite was measured."""
    at = {level.name: level for level in facts.levels}
    lines: dict[str, list[tuple[float, float]]] = {}
    patterns: dict[str, list[tuple[float, float]]] = {}
    for row in facts.figures:
        if row.level in at and _drawable(row.perplexity) and row.method in facts.methods[: words.DRAWN_METHODS]:
            level = at[row.level]
            kind = patterns if level.is_pattern else lines
            kind.setdefault(row.method, []).append((100 * level.sparsity, row.perplexity or 0.0))
    if not lines and not patterns:
        return None
    with _figure("sparsity", height=3.6) as (figure, made):
        axes = _axes(figure, "zeros, % of sparsified weights", "perplexity (log, lower is better)")
        for number, method in enumerate(facts.methods[: words.DRAWN_METHODS]):
            style = {"color": PALETTE[number], "marker": MARKERS[number], "zorder": 3 if method == "elastic" else 2}
            width = 2.2 if method == "elastic" else 1.4
            if method in lines:
                axes.plot(*zip(*sorted(lines[method]), strict=True), label=method, lw=width, ms=5, **style)
            if method in patterns:
                label = None if method in lines else method
                hollow = {"mfc": "none", "mew": 1.6, "ls": "none", "ms": 8, "label": label}
                axes.plot(*zip(*patterns[method], strict=True), **hollow, **style)
        _dense_line(axes, facts)
        _log_scale(axes)
        shares = sorted({round(100 * level.sparsity, 1) for level in facts.levels})
        if len(shares) <= 8:
            axes.set_xticks(shares)
        if patterns:
            axes.plot([], [], color=INK, marker="o", mfc="none", mew=1.6, ms=8, ls="none", label="N:M level")
        _legend(axes)
    return made[0]


def perplexity_by_bytes(facts: Facts) -> str | None:
    """Perplexity against what each level reads, and against a file of its own; None if nothing was measured."""
    rows = [(level, facts.figure(level.name, "elastic")) for level in facts.levels]
    found = [(x, row.perplexity or 0.0) for x, row in rows if row is not None and _drawable(row.perplexity)]
    if not found:
        return None
    with _figure("bytes", height=3.6) as (figure, made):
        axes = _axes(figure, "MB (tensors)", "perplexity (log, lower is better)")
        chain = sorted((x for x in found if not x[0].is_pattern), key=lambda x: x[0].sparsity)
        patterns = [x for x in found if x[0].is_pattern]
        for points, style, fill in ((chain, None, None), (patterns, "none", "none")):
            kept, values = [level for level, _ in points], [value for _, value in points]
            alone, read = [level.alone_bytes / 1e6 for level in kept], [level.bytes / 1e6 for level in kept]
            axes.plot(alone, values, color=PALETTE[5], marker="s", ls=style or "--", lw=1.8, ms=5, mfc=fill)
            axes.plot(read, values, color=PALETTE[0], marker="o", ls=style or "-", lw=1.8, ms=6, mfc=fill)
        for level, value in found if len(found) <= MAX_LABELS else ():
            at = (level.bytes / 1e6, value)
            axes.annotate(level.title, at, (-6, -9), textcoords="offset points", ha="right", fontsize=8)
        axes.axvline(facts.total_bytes / 1e6, color=PALETTE[0], ls=":", lw=1.4)
        axes.plot([], [], color=PALETTE[0], marker="o", label="read from the one checkpoint")
        axes.plot([], [], color=PALETTE[0], ls=":", label="the one checkpoint, all levels")
        axes.plot([], [], color=PALETTE[5], marker="s", ls="--", label="a bitmask file of its own (computed)")
        _dense_line(axes, facts)
        _log_scale(axes)
        axes.margins(x=0.12)
        _legend(axes)
    return made[0]


def total_bytes(facts: Facts) -> str:
    """Bytes of all levels together: this checkpoint against files for each level."""
    rows = words.totals(facts)
    with _figure("totals", height=2.2) as (figure, made):
        axes = _axes(figure, "MB for all levels together", "")
        axes.grid(axis="y", visible=False)
        colors = [PALETTE[0], *[PALETTE[5]] * (len(rows) - 1)]
        bars = axes.barh([name for name, _ in rows], [count / 1e6 for _, count in rows], color=colors, height=0.6)
        axes.bar_label(bars, [words.size(count) for _, count in rows], padding=4, fontsize=8, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.tick_params(axis="y", labelsize=8)
    return made[0]


def zeros_by_layer(facts: Facts) -> str | None:
    """Heat maps of zeros by layer type and block, one a level; None if there are too many to draw."""
    if len(facts.types) > MAX_ROWS or len(facts.blocks) > MAX_COLUMNS:
        return None
    numbers = spread(len(facts.levels), words.DRAWN_MAPS)
    columns = min(2, len(numbers))
    rows = -(-len(numbers) // columns)
    with _figure("zeros", height=0.7 + rows * (0.35 + 0.16 * len(facts.types))) as (figure, made):
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for spare in panels.flat[len(numbers) :]:
            spare.set_visible(False)
        names = [kind.rpartition(".")[2] for kind in facts.types]
        image = None
        for axes, number in zip(panels.flat, numbers, strict=False):
            table = [[math.nan if x is None else 100 * x for x in row] for row in facts.zeros[number]]
            image = _heat_map(axes, table, names, vmin=0, vmax=100)
            axes.set_title(facts.levels[number].title, fontsize=9, loc="left", color=INK)
        for axes in panels.flat[max(0, len(numbers) - columns) : len(numbers)]:  # those with none below
            _block_axis(axes, facts.blocks, most=6)
        _color_bar(figure, image, panels, "zeros, %")
    return made[0]


def block_errors(facts: Facts) -> str | None:
    """Heat map of every block's final training loss by level, on a log scale; None without a record."""
    numbers = spread(len(facts.loss_levels), words.DRAWN_LOSSES)
    names, table = [facts.loss_levels[i] for i in numbers], [facts.block_losses[i] for i in numbers]
    if not table or len(table[0]) > MAX_COLUMNS:
        return None
    logs = [[math.log10(x) if _drawable(x) else math.nan for x in map(_or_nan, row)] for row in table]
    finite = [x for row in logs for x in row if math.isfinite(x)]
    if not finite:
        return None
    with _figure("errors", height=1.2 + min(0.42 * len(names), 3.2)) as (figure, made):
        axes = figure.subplots()
        low, high = min(finite), max(finite)
        image = _heat_map(axes, logs, [words.level_title(x) for x in names], vmin=low, vmax=max(high, low + 0.1))
        _block_axis(axes, range(len(table[0])))
        _color_bar(figure, image, axes, "log10 of the loss")
    return made[0]


def spread(count: int, most: int) -> list[int]:
    """Which of `count` things are drawn: all, or of many the first, the last and some between."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and 0 < value < 1e30


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


@contextmanager
def _figure(name: str, height: float) -> Iterator[tuple[Any, list[str]]]:
    """A figure to draw on; when the block ends, the list holds its SVG. `name` sets its ids apart on the page."""
    import matplotlib  # slow imports, only here
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    style |= {"font.size": 9, "text.color": INK}
    made: list[str] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that its own font lacks: the page's fonts draw the text
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, made
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    made.append(_for_page(buffer.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """What of matplotlib's file belongs into a page: ids of this figure's own, the page's colours, no size."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda x: f' id="{name}-{x[1]}"' if x[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--line)").replace(PAPER, "var(--card)")


def _axes(figure: Any, x_label: str, y_label: str) -> Any:
    axes = figure.subplots()
    _quiet(axes)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    return axes


def _quiet(axes: Any) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.tick_params(which="both", color=GRID, labelcolor=INK)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7.5, facecolor=PAPER, edgecolor="none", framealpha=0.85, labelcolor=INK)


def _dense_line(axes: Any, facts: Facts) -> None:
    dense = facts.figure("dense", "dense")
    if dense is not None and _drawable(dense.perplexity):
        label = f"dense ({words.perplexity(dense)})"
        axes.axhline(dense.perplexity, color=INK, ls="--", lw=1.2, label=label)


def _log_scale(axes: Any) -> None:
    """Perplexities as people write them, at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))


def _heat_map(axes: Any, table: Sequence[Sequence[float]], names: Sequence[str], **scale: float) -> Any:
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="none", **scale)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks(range(len(names)), [name[:24] for name in names])
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    return image


def _block_axis(axes: Any, blocks: Sequence[int], most: int = 12) -> None:
    step = max(1, -(-len(blocks) // most))
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel("block", color=INK)


def _color_bar(figure: Any, image: Any, panels: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=0.04, aspect=30, pad=0.02)
    bar.set_label(label, color=INK, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=GRID, labelcolor=INK, labelsize=7.5)
