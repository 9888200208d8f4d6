"""Wall-clock of a whole run against its floating-point operations over this CPU's matrix-product rate.

    python benchmarks/efficiency.py --calibration abc-news.txt

Runs the recipe, without folds and search, from the first to the last second and times its parts;
`--end-to-end-steps` takes fewer of its alike steps on a slow machine, and the last row counts those for all of them.
"ideal" counts what the passes must multiply (a causal half of attention, half of a symmetric matrix, no gradient nobody
reads), all of it at the best rate measured before and after for large square products in the run's precision; "own
precision" takes the float32 rate for what has to be float32. The counts are checked against torch's `FlopCounterMode`.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import check_texts, commit, exit_on_error
from efficiency_count import Counts, Shapes, block_phase_counts, check_counts, end_to_end
from rich.console import Console
from rich.table import Table
from schedules import UNPREPARED

from elastic_sparsity import adapters, attention, block_phase, pipeline, read_recipe
from elastic_sparsity import end_to_end as phase_two
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.doctor import read_facts
from elastic_sparsity.files import write_json
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import DTYPES, resolve_precision
from elastic_sparsity.preparing import versions
from elastic_sparsity.run_folder import RunFolder

HERE = Path(__file__).parent


def rate(rows: int, inner: int, columns: int, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of `F.linear`, mean over about `seconds` (other work slows the run and the rate alike)."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    spent: list[float] = []
    torch.nn.functional.linear(x, weight)
    while len(spent) < 3 or sum(spent) < seconds:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        spent.append(time.perf_counter() - start)
    return 2 * rows * inner * columns * len(spent) / sum(spent)


def rates(shapes: Shapes, dtype: torch.dtype) -> dict[str, float]:
    """Rates at large squares in `dtype` and float32, and at the run's shapes."""
    found = {f"{size} cubed": rate(size, size, size, dtype) for size in (1024, 2048, 4096)}
    found |= {f"{size} cubed, float32": rate(size, size, size, torch.float32) for size in (1024, 2048)}
    linears = {f"{shapes.tokens} x {i} x {o}": (shapes.tokens, i, o) for o, i in shapes.linears.values()}
    rows = phase_two.HEAD_ROWS
    linears[f"head: {rows} x {shapes.width} x {shapes.vocabulary}"] = (rows, shapes.width, shapes.vocabulary)
    return found | {name: rate(*sizes, dtype, 0.3) for name, sizes in linears.items()}


class Clock:
    """Seconds by (phase, part); a part inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.stack: list[tuple[str, str]] = []
        self._inner: list[float] = []

    @contextmanager
    def part(self, name: tuple[str, str]) -> Iterator[None]:
        start = time.perf_counter()
        self.stack.append(name)
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[self.stack.pop()] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def wrap(
        self, owner: Any, attribute: str, phase: str, name: str | Callable[[], str], inside: str | None = None
    ) -> None:
        """Times every call of `owner.attribute` as `name`, where `phase` is under way and the part is `inside`."""
        original, is_static = getattr(owner, attribute), isinstance(vars(owner).get(attribute), staticmethod)

        def timed(*args: Any, **kwargs: Any) -> Any:
            wanted = self.stack and self.stack[-1][0] == phase and inside in (None, self.stack[-1][1])
            if not wanted:
                return original(*args, **kwargs)
            with self.part((phase, name if isinstance(name, str) else name())):
                return original(*args, **kwargs)

        setattr(owner, attribute, staticmethod(timed) if is_static else timed)

    def enter(self, attribute: str, phase: str, part: str, then: Callable[[Any], None] = lambda found: None) -> None:
        """Times calls of the pipeline's function; `then` sees what it returned."""
        original = getattr(pipeline, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part((phase, part)):
                found = original(*args, **kwargs)
            then(found)
            return found

        setattr(pipeline, attribute, timed)


def observe(clock: Clock) -> None:
    """Times the parts of the run that this process will do."""
    phase = "blocks"
    for function, part in (
        ("block_statistics", "statistics"), ("attach_elastic_", "scores and masks"), ("train_block_", "training"),
        ("block_outputs", "outputs"), ("_keep_streams", "keeping for a resume"),
    ):  # fmt: skip
        clock.wrap(block_phase, function, phase, part)
    clock.wrap(RunFolder, "save_block", phase, "keeping for a resume")
    clock.wrap(BlockRunner, "map", phase, "targets", inside="rest")
    phase = "end to end"
    clock.wrap(RunFolder, "save_snapshot", phase, "keeping for a resume")
    clock.wrap(adapters, "_effective_weight", phase, "merging weights and masks")
    clock.wrap(adapters, "_weight_gradients", phase, "their gradients")
    clock.wrap(adapters.ElasticLinear, "mask", phase, "merging weights and masks")
    clock.wrap(attention._CausalAttention, "forward", phase, "attention")
    clock.wrap(attention._CausalAttention, "backward", phase, "attention")
    clock.wrap(phase_two, "head_kl", phase, "head and KL")
    clock.wrap(torch.Tensor, "backward", phase, "backward of the blocks")
    clock.wrap(torch.optim.Adam, "step", phase, "clipping and optimiser")
    clock.wrap(torch.nn.utils, "clip_grad_norm_", phase, "clipping and optimiser")

    def of_model(prepared: tuple[Any, ...]) -> None:
        blocks = prepared[0].base.model.base_model
        clock.wrap(
            blocks, "forward", phase, lambda: "student's blocks" if torch.is_grad_enabled() else "teacher's blocks"
        )

    clock.enter("prepare", "frame", "loading and text", of_model)
    clock.enter("run_block_phase_", "blocks", "rest")
    clock.enter("run_end_to_end_", "end to end", "rest")
    clock.enter("save_run", "frame", "saving")


def show(phases: dict[str, dict], best: float) -> Table:
    table = Table(title=f"whole run; ideal at {best / 1e9:.0f} GFLOP/s")
    for column in ("phase", "part", "10^12 operations", "ideal s", "spent s", "ideal of spent", "own precision"):
        table.add_column(column, justify="left" if column in ("phase", "part") else "right", no_wrap=True)
    for phase, rows in phases.items():
        for part, row in rows.items():
            cells = (f"{row['operations'] / 1e12:.1f}", f"{row['ideal_s']:.1f}", f"{row['spent_s']:.1f}")
            shares = (f"{row['share']:.0%}", f"{row['own_precision_share']:.0%}") if row["operations"] else ("", "")
            table.add_row(phase, part, *cells, *shares, style="bold" if part == "all" else None)
    return table


def rows_of(counts: dict[str, Counts], seconds: dict[str, float], best: float, best_float: float) -> dict[str, dict]:
    """One row a part and their sum."""
    rows = {}
    for part in dict.fromkeys([*counts, *seconds]):
        count, spent = counts.get(part, Counts()), seconds.get(part, 0.0)
        rows[part] = {
            "operations": count.low + count.float32,
            "float32_operations": count.float32,
            "ideal_s": (count.low + count.float32) / best,
            "own_precision_ideal_s": count.low / best + count.float32 / best_float,
            "spent_s": spent,
        }
    return with_shares({**rows, "all": total_of(rows)})


def total_of(rows: dict[str, dict]) -> dict[str, float]:
    first = next(iter(rows.values()))
    return {name: sum(row[name] for row in rows.values()) for name in first if "share" not in name}


def with_shares(rows: dict[str, dict]) -> dict[str, dict]:
    for row in rows.values():
        row["share"] = row["ideal_s"] / row["spent_s"] if row["spent_s"] else 0.0
        row["own_precision_share"] = row["own_precision_ideal_s"] / row["spent_s"] if row["spent_s"] else 0.0
    return rows


def plot(phases: dict[str, dict], path: Path) -> None:
    """Bars of ideal and spent seconds by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [(f"{phase}: {part}", row) for phase, rows in phases.items() for part, row in rows.items()]
    figure, axis = pyplot.subplots(figsize=(9, 0.32 * len(entries) + 1.2), layout="constrained")
    at = range(len(entries))
    axis.barh([y - 0.2 for y in at], [row["spent_s"] for _, row in entries], 0.4, label="spent", color="tab:orange")
    axis.barh([y + 0.2 for y in at], [row["ideal_s"] for _, row in entries], 0.4, label="ideal", color="tab:blue")
    axis.set_yticks(list(at), [name for name, _ in entries])
    axis.invert_yaxis()
    axis.set_xlabel("seconds of the whole recipe")
    axis.legend()
    figure.savefig(path, dpi=110)


def progress(stage: str, done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--recipe", default="smollm2-135m", help="of recipes/; a Llama")
    parser.add_argument("--end-to-end-steps", type=int, help="fewer than the recipe's, on a slow machine")
    parser.add_argument("--checkpoint", type=Path, help="keep it there")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "efficiency.json")
    args = parser.parse_args()
    check_texts(args.calibration)
    changes = {
        "calibration": {"source": args.calibration},
        "end_to_end": {"trainable": "base"},
        **UNPREPARED,  # it has no closed form here
    }
    path = HERE.parent / "recipes" / f"{args.recipe}.toml"
    all_steps = read_recipe(path, changes).end_to_end.steps
    steps = args.end_to_end_steps or all_steps
    recipe = read_recipe(path, {**changes, "end_to_end": {"trainable": "base", "steps": steps}})
    base = load_base(recipe.model.id, recipe.model.dtype)
    ids, _ = calibration_tokens(recipe, base)
    dtype, shapes = DTYPES[resolve_precision(recipe.precision, "cpu")], Shapes.of(base.model, recipe)
    checked = check_counts(recipe, shapes, ids)
    before = rates(shapes, dtype)
    del base
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        observe(clock)
        start = time.perf_counter()
        pipeline.optimize(recipe, args.checkpoint or Path(folder) / "c", progress)
        seconds = time.perf_counter() - start
    after = rates(shapes, dtype)
    clock.seconds["frame", "rest"] = seconds - sum(clock.seconds.values())
    best = max(max(found[f"{size} cubed"] for size in (1024, 2048, 4096)) for found in (before, after))
    best_float = max(max(found[f"{size} cubed, float32"] for size in (1024, 2048)) for found in (before, after))
    counts = {"blocks": block_phase_counts(shapes, recipe), "end to end": end_to_end(shapes, recipe), "frame": {}}
    phases = {
        phase: rows_of(count, {part: t for (of, part), t in clock.seconds.items() if of == phase}, best, best_float)
        for phase, count in counts.items()
    }
    sums = {name: rows["all"] for name, rows in phases.items()}
    phases["whole run"] = with_shares({"all": total_of(sums)})
    if steps != all_steps:
        sums["end to end"] = {name: value * all_steps / steps for name, value in sums["end to end"].items()}
        phases[f"at {all_steps} steps"] = with_shares({"all": total_of(sums)})
    console = Console(width=130)
    for name in before:
        console.print(f"{name}: {before[name] / 1e9:.0f} GFLOP/s before, {after[name] / 1e9:.0f} after")
    console.print(f"operations of one step, counted by torch over ours: {checked}")
    console.print(show(phases, best))
    facts = read_facts()
    record = {
        "date": datetime.date.today().isoformat(),
        "device": f"{facts.cpu}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "commit": commit(),
        "seed": recipe.seed,
        "versions": versions(),
        "protocol": {"recipe": args.recipe, "seconds": seconds, "end_to_end_steps": steps, "recipe_steps": all_steps},
        "rates": {"before": before, "after": after, "denominator": best, "float32": best_float},
        "counted_by_torch_over_ours": checked,
        "phases": phases,
    }
    write_json(args.output, json.loads(json.dumps(record)))
    plot(phases, args.output.with_suffix(".png"))


if __name__ == "__main__":
    exit_on_error(main)
