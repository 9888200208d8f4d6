"""What does one elastic run cost, next to a run for each of its levels, and to EPTS's schedule?

    python benchmarks/cost.py --calibration abc-news.txt                          # whole runs, EPTS in part: hours
    python benchmarks/cost.py --calibration abc-news.txt --blocks 3 --steps 12    # all in part: minutes

Every run is a fresh process of the whole model, one after the other, on one machine. Seconds are those of the process,
with imports, loading and saving, by wall clock and by CPU (user and system, all threads): other work on the same cores
stretches the first much more than the second. Peak is its largest resident size (Linux). A run "in part" stops its
block phase after --blocks blocks, makes --steps steps in each of them and as many end to end (in a process of its own,
on masks by magnitude), and is extrapolated by the counted blocks and steps: marked ~, and its peak is a lower bound,
marked >=. EPTS runs in part by --epts-blocks and --epts-steps. Token-passes are the package's plan; what ran is counted
at the decoder blocks, and the script fails where the plan is wrong. Every run goes into results/NAME.json when it ends:
after an interruption the same command goes on with the next one, unless machine, threads, text or recipe are others.

Schedules, all of them without folds and search: elastic: the recipe. independent: a run a level, with the tokens that
the elastic run spends on it; "same steps": each of them as long as the elastic run, counted from the same timings.
Which of the two gives elastic's quality is for `quality.py` to say: its methods independent and, on request,
independent-same. epts: 1,280 steps a block of 2,048 tokens, seven groups, no end-to-end phase, as its official code
does it, but by this package's faster code and in samples as long as the recipe's (theirs: one of 2,048 tokens a step).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import schedules
from cells import add_place, begin, check_texts, device, exit_on_error, log, question_of, stamp
from cost_child import CLOCKS
from cost_report import plot, table
from rich.console import Console

from elastic_sparsity import read_recipe
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.files import is_file, write_json
from elastic_sparsity.model_shapes import ModelShapes, read_shapes
from elastic_sparsity.models import load_base
from elastic_sparsity.planning import plan

DIRECTIONS = ("forward", "forward and backward")
CHILD = Path(__file__).with_name("cost_child.py")


def run_child(recipe: Recipe, blocks: int, scratch: Path) -> dict[str, Any]:
    """A fresh process's times, passes and peak; `blocks` = 0 for the whole run."""
    file = scratch / "recipe.json"
    file.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = [sys.executable, str(CHILD), str(file), str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cost.py: a run failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def planned_passes(recipe: Recipe, shapes: ModelShapes, blocks: int = 0) -> dict[str, int]:
    """Token-passes through blocks by direction, of a whole run or of one that stops after `blocks` blocks."""
    depth, passes = shapes.depth, dict.fromkeys(DIRECTIONS, 0)
    for work in schedules.planned_work(recipe, shapes):
        stopped = {"blocks' arguments": depth, "next inputs": blocks + 1}.get(work.name, blocks)
        if work.is_head:
            continue
        if blocks and blocks < depth:
            part = schedules.planned_work(recipe, replace(shapes, depth=stopped))
            work = next(x for x in part if (x.name, x.phase) == (work.name, work.phase))
        passes[work.direction] += work.passes
    return passes


def check_passes(name: str, recipe: Recipe, shapes: ModelShapes, blocks: int, found: dict[str, Any]) -> None:
    planned = {key: value for key, value in planned_passes(recipe, shapes, blocks).items() if value}
    if planned != found["passes"]:
        raise SystemExit(f"cost.py: {name}: the plan says {planned} token-passes, counted were {found['passes']}.")


def cost_of(name: str, recipe: Recipe, shapes: ModelShapes, blocks: int, steps: int, scratch: Path) -> dict[str, Any]:
    """One run's cost, whole (`blocks` and `steps` 0) or extrapolated from parts of it."""
    wanted, depth = recipe.block.steps, shapes.depth
    blocks, steps = (blocks or depth), (steps or max(wanted, recipe.end_to_end.steps))
    has_end = recipe.end_to_end.trainable != "off"
    is_whole = blocks >= depth and steps >= max(wanted, recipe.end_to_end.steps if has_end else 0)
    planned = plan(recipe, gpu=False, probe=False)
    host = next(peak.bytes for peak in planned.peaks if peak.place == "host")
    row: dict[str, Any] = {"name": name, "passes": planned_passes(recipe, shapes), "planned_peak_bytes": host}
    log(f"{name}: {'whole' if is_whole else 'in part'}")
    if is_whole:
        found = run_child(recipe, 0, scratch)
        check_passes(name, recipe, shapes, 0, found)
        parts = {clock: whole_parts(found[clock]) for clock in CLOCKS}
        return {**row, "extrapolated": False, **times(parts), "runs": [found], "peak_bytes": found["peak_bytes"]}
    first = schedules.changed(recipe, {"block": {"steps": min(wanted, steps)}, "end_to_end": {"trainable": "off"}})
    runs = [run_child(first, blocks if blocks < depth else 0, scratch)]
    check_passes(name, first, shapes, blocks, runs[0])
    ends = min(recipe.end_to_end.steps, steps)
    if has_end:
        one_batch = {"steps": 0, "samples": min(recipe.block.samples, recipe.block.batch_size)}
        changes = {"block": one_batch, "scores": {"method": "magnitude"}, "end_to_end": {"steps": ends}}
        second = schedules.changed(recipe, changes)
        runs.append(run_child(second, 0, scratch))
        check_passes(f"{name}, end to end", second, shapes, 0, runs[1])
    counts = (depth, wanted, min(wanted, steps), recipe.end_to_end.steps, ends)
    parts = {clock: extrapolated_parts([found[clock] for found in runs], *counts) for clock in CLOCKS}
    timed = {"blocks": min(blocks, depth), "of_blocks": depth, "steps_a_block": min(wanted, steps), "of_steps": wanted}
    if has_end:
        timed |= {"end_to_end_steps": ends, "of_end_to_end_steps": recipe.end_to_end.steps}
    peak = max(found["peak_bytes"] for found in runs)
    return {**row, "extrapolated": True, "timed": timed, **times(parts), "runs": runs, "peak_bytes": peak}


def times(parts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A row's fields from its parts by clock: wall-clock seconds are plain, CPU seconds have "cpu_" before them."""
    wall, cpu = (parts[clock] for clock in CLOCKS)
    return {"seconds": sum(wall.values()), "parts": wall, "cpu_seconds": sum(cpu.values()), "cpu_parts": cpu}


def whole_parts(found: Mapping[str, Any]) -> dict[str, float]:
    """Of a whole run, by one clock."""
    training, ends = sum(found["training"]), sum(found.get("end to end", []))
    blocks = sum(found["block phase"])
    return {
        "frame": found["seconds"] - blocks - ends,
        "blocks but training": blocks - training,
        "training of blocks": training,
        "end to end": ends,
    }


def extrapolated_parts(
    runs: Sequence[Mapping[str, Any]], depth: int, steps: int, timed_steps: int, ends: int, timed_ends: int
) -> dict[str, float]:
    """Seconds of a whole run's parts from runs in part, by one clock.

    Args:
        runs: the block phase's run, and the end-to-end phase's if there is one.
        depth, steps, ends: blocks, steps a block and end-to-end steps of the whole run; timed_*: those of `runs`.
    """
    first = runs[0]
    other = [whole - training for whole, training in zip(first["blocks"], first["training"], strict=True)]
    rest = statistics.fmean(other[1:]) if len(other) > 1 else other[0]  # the first block's streams are one
    a_step = sum(first["training"]) / max(1, len(first["training"]) * timed_steps)
    last = runs[-1]
    end_to_end = sum(last["end to end"]) / timed_ends * ends if len(runs) > 1 else 0.0
    frame = last["seconds"] - sum(last["block phase"]) - sum(last.get("end to end", []))
    return {
        "frame": frame,
        "blocks but training": other[0] + (depth - 1) * rest,
        "training of blocks": depth * steps * a_step,
        "end to end": end_to_end,
    }


def total(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs one after the other: times and passes add up, the peak is the largest."""
    parts = {
        clock: {part: sum(row[key][part] for row in rows) for part in rows[0][key]}
        for clock, key in zip(CLOCKS, ("parts", "cpu_parts"), strict=True)
    }
    return {
        "name": name,
        "num_runs": len(rows),
        "extrapolated": any(row["extrapolated"] for row in rows),
        "partial_peak": any(row.get("partial_peak", row["extrapolated"]) for row in rows),
        **times(parts),
        "passes": {direction: sum(row["passes"][direction] for row in rows) for direction in DIRECTIONS},
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "planned_peak_bytes": max(row["planned_peak_bytes"] for row in rows),
    }


def with_more_steps(row: dict[str, Any], recipe: Recipe, longer: Recipe, shapes: ModelShapes) -> dict[str, Any]:
    """A timed run's cost if its end-to-end phase had the steps of `longer`."""
    factor = longer.end_to_end.steps / max(1, recipe.end_to_end.steps)
    parts = {
        clock: {**row[key], "end to end": factor * row[key]["end to end"]}
        for clock, key in zip(CLOCKS, ("parts", "cpu_parts"), strict=True)
    }
    return {**row, "extrapolated": row["extrapolated"] or factor > 1, "partial_peak": row["extrapolated"],
            **times(parts), "passes": planned_passes(longer, shapes)}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m", help="of recipes/, or a file")
    parser.add_argument("--model", help="instead of the recipe's")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--blocks", type=int, default=0, help="time only the first; 0 = all")
    parser.add_argument("--steps", type=int, default=0, help="time only so many of each kind; 0 = all")
    parser.add_argument("--epts-blocks", type=int, default=2, help="0 = all")
    parser.add_argument("--epts-steps", type=int, default=16, help="0 = all")
    add_place(parser, "cost")
    parser.add_argument("--restart", action="store_true", help="time all runs again")
    args = parser.parse_args()
    if min(args.blocks, args.steps, args.epts_blocks, args.epts_steps) < 0 or 1 in (args.blocks, args.epts_blocks):
        parser.error("--blocks and --epts-blocks: 0, or from 2 on (the first block is cheaper than the others).")
    return args


def main() -> None:
    args = arguments()
    check_texts(args.calibration)
    path = Path(args.recipe) if is_file(args.recipe) else schedules.RECIPES / f"{args.recipe}.toml"
    source = str(Path(args.calibration).resolve()) if is_file(args.calibration) else args.calibration
    changes: dict[str, dict[str, Any]] = {
        "calibration": {"source": source, "self_share": 0.0},  # else the first run alone would write it
        "memory": {"weights": "resident"},
        **schedules.UNPREPARED,
    }
    if args.model:
        changes["model"] = {"id": args.model}
    recipe = read_recipe(path, changes)
    if recipe.calibration.self_samples:
        raise ConfigError(
            "--calibration: text of the model's own would be sampled by the first run alone; name a file."
        )
    recipe = schedules.elastic(recipe, recipe.seed)
    shapes = read_shapes(recipe.model.id, recipe.model.dtype)
    calibration_tokens(recipe, load_base(recipe.model.id, recipe.model.dtype))  # a text that cannot be used: say so now
    levels = recipe.build_ladder().levels
    alone = [schedules.independent(recipe, level) for level in levels]
    longer = [schedules.independent(recipe, level, same_steps=True) for level in levels]
    epts = schedules.epts(recipe, shapes, official=True)
    file = args.results / f"{args.name}.json"
    result = begin(args, file, asked_of(args, {"recipe": recipe, "epts": epts}), {"single": []})
    timed = {row["name"]: row for row in result["single"]}
    record = {**result, "protocol": " ".join(str(__doc__).split()), "finished": False}
    with tempfile.TemporaryDirectory() as place:
        jobs = [("elastic", recipe, args.blocks, args.steps)]
        jobs += [(f"independent {x.name}", r, args.blocks, args.steps) for x, r in zip(levels, alone, strict=True)]
        jobs += [("epts", epts, args.epts_blocks, args.epts_steps)]
        for name, wanted, blocks, steps in jobs:
            if name not in timed:
                timed[name] = {**cost_of(name, wanted, shapes, blocks, steps, Path(place)), **stamp(recipe.seed)}
                write_json(file, {**record, "single": list(timed.values())})
            about = ", extrapolated" if timed[name]["extrapolated"] else ""
            log(f"{name}: {timed[name]['seconds']:.0f} s, CPU {timed[name]['cpu_seconds']:.0f} s{about}")
    single = [timed[name] for name, *_ in jobs]
    apart = single[1:-1]
    same_steps = [with_more_steps(*each, shapes) for each in zip(apart, alone, longer, strict=True)]
    rows = [
        total("elastic", single[:1]),
        total("independent, a level's tokens each", apart),
        total("independent, same steps each", same_steps),
        total("epts schedule", single[-1:]),
    ]
    for row in rows:
        row["elastic_over_this"] = rows[0]["seconds"] / row["seconds"]
        row["cpu_elastic_over_this"] = rows[0]["cpu_seconds"] / row["cpu_seconds"]
    write_json(file, {**record, **stamp(recipe.seed), "finished": True, "rows": rows, "single": single})
    commits = dict.fromkeys(row["commit"] for row in single)
    title = f"{Path(args.recipe).stem}, {recipe.model.id}, {single[0]['device']}, commit {' and '.join(commits)}"
    Console(width=170).print(table(rows, title))
    plot(rows, file.with_suffix(".png"), title)


def asked_of(args: argparse.Namespace, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What seconds depend on; of the text the name and the hash, not where it lies."""
    asked = question_of(args, ("recipe", "model")) | {"device": device()}
    for name, recipe in recipes.items():
        data = recipe.model_dump(mode="json", exclude={"evaluation"})
        data["calibration"]["source"] = Path(recipe.calibration.source).name
        asked |= {f"{name}.{section}": fields for section, fields in data.items()}
    return asked


if __name__ == "__main__":
    exit_on_error(main)
