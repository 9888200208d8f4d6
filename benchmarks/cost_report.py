"""cost.py's rows as a table and a plot. Plain numbers only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


def table(rows: Sequence[Row], title: str) -> Table:
    """A line a schedule; ~ marks what is extrapolated, >= a peak that only a part of the run was seen to reach."""
    found = Table(title=title)
    columns = ("schedule", "runs", "seconds", "elastic / this", "CPU seconds", "elastic / this",
               "10^6 passes, forward", "and with backward", "peak GB",
               "plan's peak GB")  # fmt: skip
    for column in columns:
        found.add_column(column, justify="left" if column == "schedule" else "right")
    for row in rows:
        about = "~" if row["extrapolated"] else ""
        ratio = "~" if about or rows[0]["extrapolated"] else ""
        passes = (f"{count / 1e6:,.3g}" for count in row["passes"].values())
        found.add_row(
            row["name"], str(row["num_runs"]), f"{about}{row['seconds']:,.0f}",
            f"{ratio}{row['elastic_over_this']:.2f}", f"{about}{row['cpu_seconds']:,.0f}",
            f"{ratio}{row['cpu_elastic_over_this']:.2f}", *passes,
            f"{'>= ' if row['partial_peak'] else ''}{row['peak_bytes'] / 1e9:.2f}",
            f"{row['planned_peak_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    return found


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Stacked bars of where the seconds go; extrapolated ones are hatched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 1.3 + 0.55 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        left = 0.0
        for number, (part, seconds) in enumerate(row["parts"].items()):
            axis.barh(y, seconds / 60, left=left, color=f"C{number}", hatch="//" if row["extrapolated"] else None,
                      edgecolor="white", linewidth=0, label=part if y == 0 else None)  # fmt: skip
            left += seconds / 60
        text = f" {'~' if row['extrapolated'] else ''}{row['seconds'] / 60:,.3g} min"
        axis.text(left, y, f"{text} ({row['seconds'] / rows[0]['seconds']:.2f}x)", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(row["seconds"] for row in rows) / 60)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("minutes (hatched: extrapolated by counted blocks and steps)")
    axis.set_title(title, fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
