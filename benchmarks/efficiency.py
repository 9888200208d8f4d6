"""Wall-clock of the smollm2-135m run against its floating-point operations over this CPU's matrix-product rate.

    python benchmarks/efficiency.py --calibration abc-news.txt

Times a shortened run of the recipe (its own shapes; a few of the blocks with all their steps, a few end-to-end steps
after warming up) by part and extrapolates to the whole recipe. "ideal" counts what the passes must multiply (a causal
half of attention, half of a symmetric matrix, no gradient nobody reads), all of it at the best rate measured for large
square products in the run's precision; "own precision" takes the float32 rate for what has to be float32.
The counts are checked against torch's `FlopCounterMode`.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from efficiency_count import Counts, Shapes, block_phase, check_counts, end_to_end
from rich.console import Console
from rich.table import Table

from elastic_sparsity import adapters, attention, pipeline, read_recipe
from elastic_sparsity import end_to_end as phase_two
from elastic_sparsity.arch import architecture_of, decoder_blocks
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.doctor import read_facts
from elastic_sparsity.files import write_json
from elastic_sparsity.models import load_base
from elastic_sparsity.pipeline import versions
from elastic_sparsity.precision import DTYPES, resolve_precision

HERE = Path(__file__).parent
WARM_UP = 6  # end-to-end steps that are not timed: memory is first touched, optimiser states are made


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
    """Seconds by part; a part inside another counts for itself only."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)
        self._inner: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.calls[name].append(spent - self._inner.pop())
            if self._inner:
                self._inner[-1] += spent

    @property
    def idle(self) -> bool:
        return not self._inner

    def wrap(self, owner: Any, attribute: str, name: Callable[..., str | None]) -> Callable[[], None]:
        """Times every call of `owner.attribute` as the part `name(*arguments)`; None = not. Returns the undoing."""
        original, is_static = getattr(owner, attribute), isinstance(vars(owner).get(attribute), staticmethod)

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = name(*args, **kwargs)
            if part is None:
                return original(*args, **kwargs)
            with self.part(part):
                return original(*args, **kwargs)

        before = vars(owner).get(attribute)
        setattr(owner, attribute, staticmethod(timed) if is_static else timed)
        return lambda: setattr(owner, attribute, before) if before is not None else delattr(owner, attribute)


def named(name: str) -> Callable[..., str]:
    return lambda *_args, **_kwargs: name


def changed(recipe: Any, section: str, **fields: Any) -> Any:
    """The recipe with other fields in one section."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=fields)})


def time_block_phase(model: Any, blocks: list, ids: torch.Tensor, recipe: Any, num_blocks: int) -> dict[str, float]:
    """Seconds by part, extrapolated from the first `num_blocks` blocks to all."""
    clock = Clock()
    precision = resolve_precision(recipe.precision, "cpu")
    undo = [
        clock.wrap(pipeline, "block_statistics", named("statistics")),
        clock.wrap(pipeline, "attach_elastic_", named("scores and masks")),
        clock.wrap(pipeline, "train_block_", named("training")),
        clock.wrap(pipeline, "block_outputs", named("outputs")),
        clock.wrap(BlockRunner, "map", lambda *_: "targets" if clock.idle else None),
    ]
    pipeline.decoder_blocks = lambda _model: blocks[:num_blocks]  # type: ignore[assignment, return-value]
    start = time.perf_counter()
    try:
        with attention.training_attention(model):
            generator = torch.Generator().manual_seed(recipe.seed)
            pipeline.run_block_phase_(model, ids, recipe, "base", precision, generator, lambda *_: None)
    finally:
        spent = time.perf_counter() - start
        pipeline.decoder_blocks = decoder_blocks
        for step in reversed(undo):
            step()
    total = len(blocks)
    found = {name: total * statistics.mean(calls) for name, calls in clock.calls.items()}
    first, *later = clock.calls["statistics"]  # the first block sees one stream, later ones one a group
    found["statistics"] = first + (total - 1) * statistics.mean(later)
    found["outputs"] = (total - 1) * statistics.mean(clock.calls["outputs"])
    found["rest"] = spent - sum(map(sum, clock.calls.values()))  # the first hidden states and calls: once
    return found


def attach_rest_(model: Any, blocks: list, recipe: Any) -> None:
    """Elastic linears in every block that has none yet; masks by magnitude, since speed does not depend on them."""
    recipe = changed(recipe, "scores", method="magnitude")
    generator = torch.Generator().manual_seed(1)
    paths = architecture_of(model.config.model_type).linears
    for block in blocks:
        found = {path: block.get_submodule(path) for path in paths}
        if not isinstance(found[paths[0]], adapters.ElasticLinear):
            none = dict.fromkeys(paths)
            pipeline.attach_elastic_(block, found, none, recipe, "base", "bfloat16", generator)  # type: ignore[arg-type]


def time_end_to_end(model: Any, ids: torch.Tensor, recipe: Any, steps: int) -> dict[str, float]:
    """Seconds by part, extrapolated from `steps` steps after the warm-up to all of the recipe's."""
    clock, marks = Clock(), []
    short = changed(recipe, "end_to_end", steps=WARM_UP + steps)
    undo = [
        clock.wrap(adapters, "_effective_weight", named("merging weights and masks")),
        clock.wrap(adapters, "_weight_gradients", named("their gradients")),
        clock.wrap(adapters.ElasticLinear, "mask", named("merging weights and masks")),
        clock.wrap(attention._CausalAttention, "forward", named("attention")),
        clock.wrap(attention._CausalAttention, "backward", named("attention")),
        clock.wrap(phase_two, "head_kl", named("head and KL")),
        clock.wrap(torch.Tensor, "backward", named("backward of the blocks")),
        clock.wrap(torch.optim.Adam, "step", named("clipping and optimiser")),
        clock.wrap(torch.nn.utils, "clip_grad_norm_", named("clipping and optimiser")),
        clock.wrap(
            model.base_model,
            "forward",
            lambda *_args, **_kwargs: "student's blocks" if torch.is_grad_enabled() else "teacher's blocks",
        ),
    ]

    def on_step(_stage: str, done: int, _total: int) -> None:
        marks.append(time.perf_counter())
        if done == WARM_UP:
            clock.calls.clear()

    try:
        with attention.training_attention(model):
            generator = torch.Generator().manual_seed(recipe.seed)
            precision = resolve_precision(recipe.precision, "cpu")
            pipeline.run_end_to_end_(model, ids, short, "base", precision, generator, on_step)
    finally:
        for step in reversed(undo):
            step()
    scale = recipe.end_to_end.steps / steps
    found = {name: scale * sum(calls) for name, calls in clock.calls.items()}
    found["rest"] = scale * (marks[-1] - marks[WARM_UP - 1]) - sum(found.values())
    print("seconds a step:", [round(b - a, 2) for a, b in itertools.pairwise(marks)])
    return found


def time_frame(base: Any, num_blocks: int, recipe: Any, seconds: dict[str, float]) -> None:
    """Saving the checkpoint."""
    start = time.perf_counter()
    weights = torch.ones(num_blocks, recipe.build_ladder().num_groups)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_model_(base.model, base, recipe, Path(folder) / "c", {}, torch.float32, weights)
    seconds["saving"] = time.perf_counter() - start


def show(phases: dict[str, dict], best: float) -> Table:
    table = Table(title=f"whole run, extrapolated; ideal at {best / 1e9:.0f} GFLOP/s")
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


def commit() -> str:
    found = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "efficiency.json")
    args = parser.parse_args()
    changes = {"calibration": {"source": args.calibration}}
    recipe = read_recipe(HERE.parent / "recipes" / "smollm2-135m.toml", changes)
    start = time.perf_counter()
    base = load_base(recipe.model.id, recipe.model.dtype)
    ids, _ = calibration_tokens(recipe, base)
    frame = {"loading and text": time.perf_counter() - start}
    model, dtype = base.model, DTYPES[resolve_precision(recipe.precision, "cpu")]
    shapes, blocks = Shapes.of(model, recipe), list(decoder_blocks(model))
    before = rates(shapes, dtype)
    model_counts = block_phase(shapes, recipe), end_to_end(shapes, recipe)
    seconds = time_block_phase(model, blocks, ids, recipe, args.blocks)
    attach_rest_(model, blocks, recipe)
    later = time_end_to_end(model, ids, recipe, args.steps)
    time_frame(base, len(blocks), recipe, frame)
    after = rates(shapes, dtype)
    best = max(max(found[f"{size} cubed"] for size in (1024, 2048, 4096)) for found in (before, after))
    best_float = max(max(found[f"{size} cubed, float32"] for size in (1024, 2048)) for found in (before, after))
    phases = {
        "blocks": rows_of(model_counts[0], seconds, best, best_float),
        "end to end": rows_of(model_counts[1], later, best, best_float),
        "frame": rows_of({}, frame, best, best_float),
    }
    phases["whole run"] = with_shares({"all": total_of({name: rows["all"] for name, rows in phases.items()})})
    checked = check_counts(model, shapes, recipe, ids)
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
        "protocol": {
            "recipe": "smollm2-135m",
            "blocks": args.blocks,
            "steps": args.steps,
            "warm_up": WARM_UP,
            "extrapolated_to": {"blocks": len(blocks), "steps": recipe.end_to_end.steps},
        },
        "rates": {"before": before, "after": after, "denominator": best, "float32": best_float},
        "counted_by_torch_over_ours": checked,
        "phases": phases,
    }
    write_json(args.output, json.loads(json.dumps(record)))
    plot(phases, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
