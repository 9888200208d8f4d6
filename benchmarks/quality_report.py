"""quality.py's cells as tables. Plain numbers only."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from elastic_sparsity.report import check_documents, human_bytes, level_title, mean_score, tasks_table

Row = Mapping[str, Any]
GAP_OF = "sparsegpt"
ORDER = ("dense", "magnitude", "wanda", "ria", "obs", "dsnot", "sparsegpt", "epts", "epts-official",
         "independent-full-block", "independent-full", "independent-lora", "independent", "independent-same",
         "elastic-uninduced", "elastic")  # fmt: skip
LABELS = {
    "elastic-uninduced": "elastic, no induction", "epts": "epts, equal passes", "epts-official": "epts, its own steps",
}  # fmt: skip


def label_of(method: str) -> str:
    """A method's name for people."""
    return LABELS.get(method, method.replace("@", ", lr "))


def summary(cells: Iterable[Row]) -> list[dict[str, Any]]:
    """One row a level and method, dense first, over the seeds that are there.

    Perplexity and KL: mean over seeds, and the standard deviation of a sample ("spread"; None with one seed).
    gap_closed: (log SparseGPT - log method) / (log SparseGPT - log dense), of the mean log-perplexity; None where
    SparseGPT loses nothing. Tasks: mean over the tasks that every one of the row's seeds has, its spread over seeds,
    and its standard error over documents, which more seeds do not lower, since all answer the same documents.
    failed: seeds without a finite figure; the others make the row, and without any its figures are None.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        groups.setdefault((cell["level"], cell["method"]), []).append(cell)
    finite = {key: [x for x in found if "failure" not in x] for key, found in groups.items()}
    logs = {key: statistics.fmean(math.log(x["perplexity"]) for x in found) for key, found in finite.items() if found}
    dense = logs.get(("dense", "dense"))
    rows = []
    for level, method in sorted(groups, key=lambda group: _order(*group)):
        reference, mine, gap = logs.get((level, GAP_OF)), logs.get((level, method)), None
        has_gap = dense is not None and reference is not None and reference > dense
        if has_gap and mine is not None and method not in ("dense", GAP_OF):
            gap = (reference - mine) / (reference - dense)
        found = finite[level, method]
        rows.append(
            {
                "level": level,
                "method": method,
                "seeds": sorted(x["seed"] for x in found),
                "failed": sorted(x["seed"] for x in groups[level, method] if "failure" in x),
                **_mean_and_spread("perplexity", found),
                **_mean_and_spread("kl", found),
                "gap_closed": gap,
                **_tasks(found),
                **{key: _mean([x.get(key) for x in found]) for key in ("seconds", "bytes", "bytes_all")},
            }
        )
    return rows


def _order(level: str, method: str) -> tuple[Any, ...]:
    kind, _, rate = method.partition("@")
    return level != "dense", ":" in level, level, ORDER.index(kind), float(rate or 0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean_and_spread(key: str, cells: Sequence[Row]) -> dict[str, float | None]:
    values = [cell[key] for cell in cells]
    return {key: _mean(values), f"{key}_spread": _spread(values)}


def _tasks(cells: Sequence[Row]) -> dict[str, Any]:
    names = [x for x in (cells[0].get("tasks", {}) if cells else {}) if all(x in c.get("tasks", {}) for c in cells)]
    if not names or not all(cells[0]["tasks"][name]["metric"].startswith("acc") for name in names):
        return {"tasks": len(names), "accuracy": None, "accuracy_error": None, "accuracy_spread": None}
    means = [mean_score([(cell["tasks"][n]["value"], cell["tasks"][n]["error"]) for n in names]) for cell in cells]
    errors = [error for _, error in means if error is not None]
    error = statistics.fmean(errors) if len(errors) == len(means) else None
    values = [x for x, _ in means]
    return {"tasks": len(names), "accuracy": _mean(values), "accuracy_error": error, "accuracy_spread": _spread(values)}


def table(rows: Sequence[Row], title: str, documents: str = "", caption: str = "") -> Table:
    """A line a level and method.

    Args:
        documents: which ones of a task were asked, for the head of its column.
    """
    tasks = max((row["tasks"] for row in rows), default=0)
    found = Table(title=title, caption=caption or None)
    columns = ("level", "method", "seeds", "perplexity", "gap closed", "KL to dense",
               f"mean of {tasks} tasks, %\n{documents}".strip(), "seconds to make", "bytes")  # fmt: skip
    for column in columns:
        if tasks or "tasks" not in column:
            found.add_column(column, justify="left" if column in ("level", "method") else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["level"]):
            found.add_section()
        previous = row["level"]
        cells = [
            level_title(row["level"]), label_of(row["method"]), str(len(row["seeds"])),
            _with_error(row["perplexity"], row["perplexity_spread"], 1, 2) + _failed(row),
            "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %",
            _with_error(row["kl"], row["kl_spread"], 1, 3),
            *([_accuracy(row, tasks)] if tasks else []),
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            "" if row["bytes"] is None else human_bytes(row["bytes"]),
        ]  # fmt: skip
        found.add_row(*cells, style="bold" if row["method"] == "elastic" else None)
    return found


def _failed(row: Row) -> str:
    if not row["failed"]:
        return ""
    return f" ({len(row['failed'])} failed)" if row["seeds"] else "failed"


def _accuracy(row: Row, tasks: int) -> str:
    """ "45.2 ± 0.6, seeds ± 0.2 (6)": standard error over documents, deviation over seeds, and tasks if not all."""
    if row["accuracy"] is None:
        return ""
    text = _with_error(100 * row["accuracy"], row["accuracy_error"], 100, 1)
    if row["accuracy_spread"] is not None:
        text += f", seeds ± {100 * row['accuracy_spread']:.1f}"
    return text if row["tasks"] == tasks else f"{text} ({row['tasks']})"


def _with_error(value: float | None, error: float | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def scored_rows(cells: Iterable[Row]) -> list[dict[str, Any]]:
    """A row a cell and task, as `elastic_sparsity.report` reads them."""
    return [
        {"level": cell["level"], "method": cell["method"], "seed": cell["seed"], **score}
        for cell in cells
        for score in cell.get("tasks", {}).values()
    ]


def task_tables(cells: Iterable[Row], documents: str) -> list[Table]:
    """A table a level, with the dense model in each: tasks by methods with standard errors, means over seeds.

    Raises: ConfigError: if a task's scores are of different documents.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    scored = scored_rows(cells)
    check_documents(scored)
    for row in sorted(scored, key=lambda row: _order(row["level"], row["method"])):
        groups.setdefault((row["level"], row["method"], row["task"]), []).append(row)
    merged = []
    for (_, method, _), rows in groups.items():
        errors = [row["error"] for row in rows if row["error"] is not None]
        error = statistics.fmean(errors) if len(errors) == len(rows) else None
        value = statistics.fmean(row["value"] for row in rows)
        merged += [{**row, "method": label_of(method), "value": value, "error": error} for row in rows[:1]]
    dense = [row for row in merged if row["level"] == "dense"]
    levels = list(dict.fromkeys(row["level"] for row in merged if row["level"] != "dense"))
    title = f"zero-shot, % right ± standard error over documents, mean over seeds, {documents}"
    shown = [dense + [row for row in merged if row["level"] == level] for level in levels] or [dense]
    return [tasks_table(rows, title) for rows in shown if rows]


def failures(cells: Iterable[Row]) -> list[str]:
    """A line a figure that could not be measured."""
    lines = []
    for cell in cells:
        where = f"{cell['method']} {level_title(cell['level'])}, seed {cell['seed']}"
        if "failure" in cell:
            lines.append(f"{where} failed: {cell['failure']}")
        lines += [f"{where} failed on {task}: {why}" for task, why in cell.get("task_failures", {}).items()]
    return lines
