"""A plan as a picture: sparsity over depth, by level and layer type."""

from pathlib import Path

from elastic_sparsity.allocation_file import AllocationPlan
from elastic_sparsity.errors import OutputError


def plot_plan(plan: AllocationPlan, path: Path) -> None:
    """A PNG: one line a level for whole blocks, thin ones for their linears.

    Raises: OutputError: it cannot be written.
    """
    import matplotlib  # slow import, only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = _by_block(plan)
    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for level, sparsity in enumerate(plan.sparsities):
        (line,) = axis.plot(
            [_sparsity(names, plan, level) for names in blocks], linewidth=2.5, label=f"{100 * sparsity:g} %"
        )
        for place in range(max(map(len, blocks), default=0)):
            values = [_sparsity(names[place : place + 1], plan, level) for names in blocks if place < len(names)]
            axis.plot(values, linewidth=0.6, alpha=0.5, color=line.get_color())
        axis.axhline(sparsity, linewidth=0.8, linestyle=":", color=line.get_color())
    axis.set_xlabel("block")
    axis.set_ylabel("sparsity")
    axis.set_ylim(0, 1)
    axis.set_title("sparsity by depth: blocks (thick), their linears (thin), uniform (dotted)")
    axis.legend()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def _by_block(plan: AllocationPlan) -> list[list[str]]:
    """Linears of every block, in order: a name starts with its block's, up to its first number."""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for name in plan.linears:
        parts = name.split(".")
        end = next((i for i, part in enumerate(parts) if part.isdecimal()), 0) + 1
        blocks.setdefault(tuple(parts[:end]), []).append(name)
    return list(blocks.values())


def _sparsity(names: list[str], plan: AllocationPlan, level: int) -> float:
    linears = [plan.linears[name] for name in names]
    kept = sum(linear.shape[0] * linear.kept[level] for linear in linears)
    return 1 - kept / sum(linear.shape[0] * linear.shape[1] for linear in linears)
