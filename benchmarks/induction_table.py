"""The induction benchmarks' cells as summaries, tables and a plot. Plain numbers only."""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from elastic_sparsity.folding import TOLERANCES
from elastic_sparsity.report import human_bytes, level_title

Row = Mapping[str, Any]
KINDS = ("plain", "induced")
EVERY_PAIR = "magnitude of N:M"  # variant of a row of induction_parts, see `induction_rows.variant_of`
LEAST_SHARES = {  # of the log gap to dense that induction is meant to close at least; elsewhere lowering is enough
    **dict.fromkeys((("wanda", level) for level in ("0.5", "0.6", "0.7")), 0.08),
    ("wanda", "2:4"): 0.15,
    **dict.fromkeys((("sparsegpt", level) for level in ("0.5", "0.6", "0.7", "2:4")), 0.05),
}


def summary(cells: Mapping[str, Row], dense: float) -> list[dict[str, Any]]:
    """One row a method and level, over the seeds that have both kinds.

    plain, induced: mean perplexity over seeds; "spread": the standard deviation of a sample, None with one seed.
    gap_closed: (log plain - log induced) / (log plain - log dense), of the mean log-perplexities; None where pruning
    loses nothing. log_change: mean over seeds of log(induced / plain) of the same seed, which prunes on the same
    samples, and its spread. verdict: `verdict` of these. least: what gap_closed is meant to reach, None = no figure.
    """
    groups: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for name, cell in cells.items():
        seed, method, level, kind = name.split("/")
        groups.setdefault((method, level), {}).setdefault(int(seed), {})[kind] = cell["perplexity"]
    rows = []
    for (method, level), by_seed in groups.items():
        pairs = {seed: found for seed, found in sorted(by_seed.items()) if len(found) == len(KINDS)}
        if not pairs:
            continue
        logs = {kind: [_log(found[kind]) for found in pairs.values()] for kind in KINDS}
        changes = [after - before for before, after in zip(*logs.values(), strict=True)]
        change, spread = statistics.fmean(changes), _spread(changes)
        closed, least = gap_closed(logs["plain"], logs["induced"], dense), LEAST_SHARES.get((method, level))
        rows.append(
            {
                "method": method,
                "level": level,
                "seeds": list(pairs),
                **{kind: statistics.fmean(found[kind] for found in pairs.values()) for kind in KINDS},
                **{f"{kind}_spread": _spread([found[kind] for found in pairs.values()]) for kind in KINDS},
                "gap_closed": closed,
                "log_change": change,
                "log_change_spread": spread,
                "verdict": verdict(change, spread),
                "least": least,
                "reaches_least": None if least is None or closed is None else closed >= least,
            }
        )
    return rows


def verdict(log_change: float, spread: float | None) -> str:
    """ "lower", "within spread" or "worse": what induction does to perplexity, against the change's spread over seeds.

    With one seed there is no spread to judge by: "one seed".
    """
    if spread is None:
        return "one seed"
    if abs(log_change) <= spread:
        return "within spread"
    return "worse" if log_change > 0 else "lower"


def gap_closed(plain_logs: Sequence[float], induced_logs: Sequence[float], dense: float) -> float | None:
    """Share of the log-perplexity gap to dense; None where there is no gap."""
    plain, gap = statistics.fmean(plain_logs), statistics.fmean(plain_logs) - math.log(dense)
    return (plain - statistics.fmean(induced_logs)) / gap if gap > 0 else None


def _log(perplexity: float) -> float:
    return min(math.log(perplexity), 700.0)  # an overflow is infinite


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def overview(rows: Iterable[Row]) -> str:
    """In one line, how many cells are lower, and how many worse by more than their spread."""
    rows = list(rows)
    lower = sum(row["log_change"] < 0 for row in rows)
    found = {word: sum(row["verdict"] == word for row in rows) for word in ("worse", "one seed")}
    reached = [row["reaches_least"] for row in rows if row["reaches_least"] is not None]
    parts = [f"mean lower in {lower} of {len(rows)} cells", f"worse by more than the spread in {found['worse']}"]
    if found["one seed"]:
        parts.append(f"{found['one seed']} of one seed, not judged")
    if reached:
        parts.append(f"the share meant at least is closed in {sum(reached)} of {len(reached)}")
    return "; ".join(parts)


def table(rows: Sequence[Row], title: str) -> Table:
    found = Table(title=title, caption=overview(rows))
    for column in ("method", "level", "seeds", "plain", "induced", "gap closed", "at least", "log change", "verdict"):
        found.add_column(column, justify="left" if column in ("method", "level", "verdict") else "right")
    for row in rows:
        found.add_row(
            row["method"], level_title(row["level"]), str(len(row["seeds"])),
            *(_with_spread(row[kind], row[f"{kind}_spread"], 2) for kind in KINDS), _percent(row["gap_closed"]),
            _percent(row["least"]), _with_spread(row["log_change"], row["log_change_spread"], 3), row["verdict"],
        )  # fmt: skip
    return found


def _with_spread(value: float, spread: float | None, digits: int) -> str:
    return f"{value:,.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{round(100 * share)} %"


def plot(rows: Sequence[Row], dense: float, path: Path) -> None:
    """A panel a method: plain and induced perplexity by level, logarithmic; bars' ends are the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(methods), figsize=(1.5 + 3.5 * len(methods), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    for axis, method in zip(axes[0], methods, strict=True):
        mine = [row for row in rows if row["method"] == method]
        for number, kind in enumerate(KINDS):
            places = [place + 0.4 * number - 0.2 for place in range(len(mine))]
            axis.bar(places, [row[kind] for row in mine], 0.4, label=kind, capsize=2,
                     yerr=[row[f"{kind}_spread"] or 0.0 for row in mine])  # fmt: skip
        axis.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
        axis.set_yscale("log")
        axis.set_xticks(range(len(mine)), [level_title(row["level"]) for row in mine])
        axis.set_title(method, fontsize=10)
    axes[0][0].set_ylabel("perplexity (log scale, lower is better)")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parts_summary(
    cells: Mapping[str, Row], rows: Mapping[str, Row], dense: float, default: Collection[str] = ()
) -> list[dict[str, Any]]:
    """One row a method and part: perplexity and gap closed by level against "none" of the same method, and costs.

    default: whether `elastic-sparsity induce` does all of the part without being asked; the argument names them.
    lower: levels whose perplexity is below that of "none"; compared: levels that have both. seconds, cpu_seconds,
    peak_bytes, added_bytes: of the induction behind one cell, the largest of the levels (see `spent`).
    added_parameters: if there are any it is not zero-overhead. logits_moved: the dense model's, relative to the
    largest; None where nothing was changed. refused: why a part is not measured.
    """
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for name, cell in cells.items():
        part, method, level = name.split("/")
        groups.setdefault((method, part), {})[level] = cell
    found = []
    for (method, part), by_level in groups.items():
        plain, pairs = groups.get((method, "none"), {}), {}
        for level in by_level if part != "none" else ():
            if level in plain:
                pairs[level] = (_log(plain[level]["perplexity"]), _log(by_level[level]["perplexity"]))
        variants = ("magnitude", EVERY_PAIR) if method == "magnitude" else ("wanda",)
        notes = [rows[key] for key in (f"{part}/{variant}" for variant in ("any", *variants)) if key in rows]
        moved = [note["logits_moved"] for note in notes if "logits_moved" in note]
        found.append(
            {
                "method": method,
                "part": part,
                "default": part in default,
                "perplexity": {level: cell["perplexity"] for level, cell in by_level.items()},
                "gap_closed": {level: gap_closed([x], [y], dense) for level, (x, y) in pairs.items()},
                "lower": sum(after < before for before, after in pairs.values()),
                "compared": len(pairs),
                **{key: max(cell["induction"][key] for cell in by_level.values())
                   for key in ("seconds", "cpu_seconds", "peak_bytes", "added_bytes")},
                "added_parameters": max((x.get("residual", {}).get("added_parameters", 0) for x in notes), default=0),
                "logits_moved": max(moved, default=None),
            }
        )  # fmt: skip
    refused = {name.split("/")[0]: row["refused"] for name, row in rows.items() if "refused" in row}
    return found + [{"part": part, "refused": why} for part, why in refused.items()]


def parts_table(summary: Sequence[Row], title: str) -> Table:
    """A section a method; in a cell perplexity and the share of the log gap to dense that is closed."""
    measured = [row for row in summary if "refused" not in row]
    levels = list(dict.fromkeys(level for row in measured for level in row["perplexity"]))
    notes = [f"{row['part']}: refused: {row['refused']}" for row in summary if "refused" in row]
    added = {row["part"]: row["added_parameters"] for row in measured if row["added_parameters"]}
    notes += [f"*{part}: not zero-overhead, it adds {count:,} parameters" for part, count in added.items()]
    limit = TOLERANCES[torch.float32]
    moved = {row["part"]: row["logits_moved"] for row in measured if (row["logits_moved"] or 0) > limit}
    notes += [f"{part}: moved the dense logits by {error:.1e}, above {limit:.0e}" for part, error in moved.items()]
    found = Table(title=f"{title}: perplexity (share of the log gap to dense closed)", caption="\n".join(notes) or None)
    words = ("method", "part", "default")
    for column in (*words, *map(level_title, levels), "lower at", "seconds", "CPU s", "peak", "added"):
        found.add_column(column, justify="left" if column in words else "right")
    for method in dict.fromkeys(row["method"] for row in measured):
        found.add_section()
        for row in (row for row in measured if row["method"] == method):
            shares = {level: f" ({_percent(share)})" for level, share in row["gap_closed"].items() if share is not None}
            known = {level: f"{value:,.1f}{shares.get(level, '')}" for level, value in row["perplexity"].items()}
            shown = [known.get(level, "") for level in levels]
            mark = "*" if row["added_parameters"] else ""
            lower = f"{row['lower']} of {row['compared']}" if row["compared"] else ""
            memory = [human_bytes(row["peak_bytes"]), human_bytes(row["added_bytes"])]
            cost = [f"{row['seconds']:,.0f}", f"{row['cpu_seconds']:,.0f}", *memory]
            name = (mark + row["part"], "yes" if row["default"] else "")
            found.add_row(method, *name, *shown, lower, *(cost if row["peak_bytes"] else [""] * 4))
    return found
