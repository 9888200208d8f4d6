"""Results as a table and a plot. Knows only rows: level, method, and perplexity, kl, bytes or a task's score."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from elastic_sparsity.errors import ConfigError, OutputError, brief
from elastic_sparsity.terminal import title as as_title

Row = Mapping[str, Any]
SHARES = ("acc", "exact_match", "em", "f1")  # metrics between 0 and 1, by how their names begin
MEAN = "mean"  # the last line of tasks


def mean_score(scores: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Mean of tasks' (value, standard error), and its error: the root of the sum of squares over the number of tasks.

    The error is over documents alone: another choice of tasks would differ by more.
    """
    known = [error for _, error in scores if error is not None]
    mean = sum(value for value, _ in scores) / len(scores)
    return mean, math.sqrt(sum(x * x for x in known)) / len(scores) if len(known) == len(scores) else None


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
    table = Table(title=as_title(title))
    for column in ("level", "zeros", "bytes read", "here", "perplexity", "KL to dense"):
        table.add_column(column, justify="left" if column in ("level", "here") else "right")
    for row in levels:
        perplexity = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        here = "yes" if row["available"] else "no"
        table.add_row(row["title"], f"{100 * row['sparsity']:.2f} %", human_bytes(row["bytes"]), here, perplexity, kl)
    return table


def layer_table(types: Sequence[Row], levels: Sequence[str], what: str = "layer type") -> Table:
    """A rich table of zeros by layer type, or by what is said, and level."""
    table = Table(title=f"zeros by {what}")
    for column in (what, "linears", "weights", *levels):
        table.add_column(column, justify="left" if column == what else "right")
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
        table.add_row(row["name"], "yes" if row["passed"] else "[bold red]NO[/]", as_title(row["detail"]))
    return table


def results_table(rows: Sequence[Row], title: str) -> Table:
    """A rich table, one line a level and method."""
    table = Table(title=as_title(title))
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


def tasks_table(rows: Sequence[Row], title: str) -> Table:
    """A rich table of `task_lines`."""
    table = Table(title=as_title(title))
    head, lines = task_lines(rows)
    for name in head:
        table.add_column(as_title(name), justify="left" if name in ("task", "metric") else "right")
    for line in lines:
        if line[0] == MEAN:
            table.add_section()
        table.add_row(*map(as_title, line))
    return table


def task_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Zero-shot results, shares in percent, with standard errors: a line a task, a column a level and method.

    The last line is the mean over tasks, of the columns that have all of them.

    Returns: the heads of the columns, and the lines.
    Raises: ConfigError: as `check_documents`.
    """
    check_documents(rows)
    columns = list(dict.fromkeys((row["level"], row["method"]) for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["level"], row["method"], row["task"]): row for row in rows}
    same_method = len({method for _, method in columns}) == 1
    head = ["task", "metric", "documents"]
    head += [level_title(level) if same_method else f"{level_title(level)}\n{method}" for level, method in columns]
    lines = []
    for task in tasks:
        found = [cells.get((*column, task)) for column in columns]
        row = next(x for x in found if x is not None)
        values = ["" if x is None else _percent(x["metric"], x["value"], x["error"]) for x in found]
        lines.append([task, row["metric"], str(row["num_documents"]), *values])
    means = {(row["level"], row["method"]): row for row in task_means(rows)}
    if len(tasks) > 1 and means:
        shown = [_percent("acc", means[x]["value"], means[x]["error"]) if x in means else "" for x in columns]
        lines.append([MEAN, "", "", *shown])
    return head, lines


def check_documents(rows: Sequence[Row]) -> None:
    """Raises: ConfigError: if a task's rows answered different documents, as far as they tell by their "sha256"."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.get("sha256") is None:  # of a file from before scores had one
            continue
        first = seen.setdefault(row["task"], row)
        if first["sha256"] != row["sha256"]:
            who, other = (f"{level_title(x['level'])} {x['method']}".strip() for x in (first, row))
            raise ConfigError(
                f"task {brief(row['task'])}: {who} answered documents of sha256 {first['sha256']}, {other} those of "
                f"{row['sha256']}; the data changed between them: measure both on the same."
            )


def task_means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean over tasks and its standard error, for each level and method that has every task, if all are accuracies."""
    tasks = {row["task"] for row in rows}
    if not all(row["metric"].startswith("acc") for row in rows):
        return []
    means = []
    for level, method in dict.fromkeys((row["level"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["level"], row["method"]) == (level, method)]
        if len(mine) == len(tasks):
            value, error = mean_score([(row["value"], row["error"]) for row in mine])
            means.append({"level": level, "method": method, "value": value, "error": error, "num_tasks": len(mine)})
    return means


def _percent(metric: str, value: float, error: float | None) -> str:
    """ "61.2 ± 1.1" for metrics that are shares; others as they are, to four digits."""
    if metric.startswith(SHARES):
        return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def level_title(level: str) -> str:
    """A level's name for people: "0.6" -> "60 %"; others stay as they are."""
    try:
        return f"{100 * float(level):g} %"
    except ValueError:
        return level


def plot_results(rows: Sequence[Row], path: Path, title: str) -> None:
    """Perplexity of every method by level (log scale), with the dense model as a line, as a PNG."""
    with _level_bars(rows, "perplexity", path, title) as axes:
        axes.set_yscale("log")
        axes.set_ylabel("perplexity (log scale, lower is better)")


def plot_tasks(rows: Sequence[Row], path: Path, title: str) -> None:
    """Mean zero-shot accuracy of every method by level with standard errors, and the dense model's, as a PNG."""
    percent = [{**row, "value": 100 * row["value"], "error": 100 * (row["error"] or 0)} for row in task_means(rows)]
    with _level_bars(percent, "value", path, title) as axes:
        axes.set_ylabel("mean accuracy, % (higher is better)")


@contextmanager
def _level_bars(rows: Sequence[Row], key: str, path: Path, title: str) -> Iterator[Any]:
    """Bars of every method by level, with the dense model as a line; written when the block has labelled the axes."""
    import matplotlib  # slow import, only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = [row for row in rows if row["level"] == "dense"]
    levels = list(dict.fromkeys(row["level"] for row in rows if row["level"] != "dense"))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["level"] != "dense"))
    figure, axes = pyplot.subplots(figsize=(1.8 + 1.5 * max(1, len(levels)), 4.2), layout="constrained")
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(sorted(methods, key=lambda m: m == "elastic")):
        found = {row["level"]: row for row in rows if row["method"] == method}
        at = [i + (number - (len(methods) - 1) / 2) * width for i, level in enumerate(levels) if level in found]
        heights = [found[level][key] for level in levels if level in found]
        errors = [found[level]["error"] for level in levels if level in found] if key == "value" else None
        color = "tab:green" if method == "elastic" else None
        bars = axes.bar(at, heights, width, yerr=errors, label=method, color=color)
        axes.bar_label(bars, [f"{h:.3g}" if h < 1000 else f"{h:.0f}" for h in heights], fontsize=8)
    for row in dense:
        axes.axhline(row[key], color="black", linestyle="--", label=f"dense ({row[key]:.1f})")
    axes.set_xticks(range(len(levels)), [level_title(level) for level in levels])
    axes.set_xlabel("level (share of zeros, or N:M)")
    axes.set_title(title)
    axes.legend()
    try:
        yield axes
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)
