"""What each choice is worth on the real model, at equal tokens.

Runs `recipes/smollm2-135m.toml` with fewer steps, two samples each, and without folds and search, one change at a time,
and measures WikiText-2 perplexity of every level from the saved checkpoint. Rows already in the JSON are not run again,
so the script can be stopped and resumed.

    python benchmarks/ablation.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from cells import check_texts, differences, exit_on_error, read_result, stamp, text_hashes
from rich.console import Console
from rich.table import Table
from schedules import UNPREPARED

from elastic_sparsity import optimize, read_recipe
from elastic_sparsity.files import write_json
from elastic_sparsity.measure import evaluate_path

HERE = Path(__file__).parent
OFF = {"end_to_end": {"trainable": "off"}}
# name -> changes to the reference; the first row of each part is the reference
BLOCK_PHASE = {
    "reference: own streams, shared inheritance, 2:4 free": {},
    "mixer: fixed equal weights (EPTS: one mixed input)": {"mixer": {"mode": "fixed"}},
    "mixer: learned weights": {"mixer": {"mode": "learned"}},
    "mixer: dense input": {"mixer": {"mode": "dense"}},
    "inheritance off (independent groups)": {"adapters": {"inheritance": "none"}},
    "inheritance detached (the paper's figure)": {"adapters": {"inheritance": "detached"}},
    "2:4 within 50 %": {"scores": {"patterns": "within"}},
    "base values trained too": {"block": {"base_lr": 1e-4}},
    "plain MSE": {"block": {"loss": "mse"}},
}
END_TO_END = {
    "both phases": {},
    "both, base values trained in both": {"block": {"base_lr": 1e-4}},
    "both, mixer: fixed equal weights": {"mixer": {"mode": "fixed"}},
    "end-to-end phase only": {"block": {"steps": 0}},
    "both, inheritance off": {"adapters": {"inheritance": "none"}},
    "both, 2:4 within 50 %": {"scores": {"patterns": "within"}},
    "both, adapters only": {"end_to_end": {"trainable": "adapters"}},
}


def merged(*changes: dict) -> dict:
    result: dict = {}
    for change in changes:
        for section, fields in change.items():
            result.setdefault(section, {}).update(fields)
    return result


def run_row(name: str, changes: dict, args: argparse.Namespace) -> dict:
    recipe = read_recipe(HERE.parent / "recipes" / "smollm2-135m.toml", changes)
    scratch = Path(tempfile.mkdtemp(prefix="ablation-"))
    try:
        started = time.monotonic()
        optimize(recipe, scratch / "checkpoint")
        seconds = time.monotonic() - started
        rows, protocol = evaluate_path(
            str(scratch / "checkpoint"), args.evaluation, window=args.window, max_windows=args.windows
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    perplexity = {row["level"]: round(row["perplexity"], 2) for row in rows}
    return {"name": name, "perplexity": perplexity, "seconds": round(seconds), "protocol": protocol}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--part", choices=("block", "end-to-end", "both"), default="both")
    parser.add_argument("--samples", type=int, default=12, help="of the block phase")
    parser.add_argument("--block-steps", type=int, default=12)
    parser.add_argument("--steps", type=int, default=80, help="end-to-end steps")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "ablation.json")
    args = parser.parse_args()
    check_texts(args.calibration, args.evaluation)
    small = {
        "calibration": {"source": args.calibration, "samples": 400},
        "block": {"samples": args.samples, "steps": args.block_steps, "batch_size": 1},
    }
    common = {**small, "window": args.window, "windows": args.windows, "end_to_end_steps": args.steps}
    common["calibration"] = {**small["calibration"], "source": Path(args.calibration).name}
    common |= text_hashes(args)
    jobs = []
    if args.part != "end-to-end":
        jobs += [("block phase only", n, merged(small, UNPREPARED, OFF, c)) for n, c in BLOCK_PHASE.items()]
    if args.part != "block":
        end = {"end_to_end": {"trainable": "base", "steps": args.steps, "batch_size": 2}}
        jobs += [("with end to end", n, merged(small, UNPREPARED, end, c)) for n, c in END_TO_END.items()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    before = read_result(args.output, ("common", "rows")) if args.output.exists() else {"rows": [], "common": common}
    other = differences(before["common"], common)
    if other:
        parser.error(f"{args.output}: is of another question: {other}; move it away, or ask for the same.")
    done = before["rows"]
    for part, name, changes in jobs:
        if any(row["name"] == name and row["part"] == part for row in done):
            continue
        done.append({"part": part, **run_row(name, changes, args), **stamp(seed=0)})
        write_json(args.output, {**stamp(seed=0), "common": common, "rows": done})
        show(done)


def show(rows: list[dict]) -> None:
    table = Table(title="WikiText-2 perplexity")
    levels = list(rows[0]["perplexity"])
    for column in ("part", "variant", *levels, "seconds"):
        table.add_column(column, justify="left" if column in ("part", "variant") else "right")
    for row in rows:
        cells = [f"{row['perplexity'][level]:.2f}" for level in levels]
        table.add_row(row["part"], row["name"], *cells, str(row["seconds"]))
    Console(width=150).print(table)


if __name__ == "__main__":
    exit_on_error(main)
