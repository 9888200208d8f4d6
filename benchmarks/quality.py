"""How good is one elastic checkpoint at every level, next to pruning and to tuning of each level alone?

    python benchmarks/quality.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt \\
        --work ../quality-work --seeds 0 1 2 --task-data zero_shot

A cell is one method at one level with one seed. It is written to results/NAME.json as soon as it is measured, trained
checkpoints stay in --work, and an interrupted training goes on where it was: stop the script at any time, and give the
same command again. Other methods, levels, seeds or tasks may be asked for later; they add cells. (A one-shot model is
pruned anew for tasks that are asked for later: ask at once.) What gives no finite figure is recorded as failed.

One-shot, on the first --baseline-samples of the calibration samples of the recipe's own seed: magnitude, wanda, ria,
sparsegpt, dsnot (and obs). Trained: elastic: the recipe. independent: the recipe for one level alone, on the tokens
that the elastic run spends on it; independent-lora: the same, adapters only; independent-full: the same tokens, all in
full-weight block tuning. epts: EPTS's schedule with the token-passes of the whole elastic run. On request:
elastic-uninduced: the recipe without its induction stage, whose token-passes go into more end-to-end steps;
independent-same: independent with as many steps as the whole elastic run; independent-full-block: full weights, the
block phase's tokens only; epts-official: EPTS's own 1,280 steps a block and samples. `schedules.py` has the
accounting. --sweep-full-lr LR ... adds independent-full with other learning rates, of the first seed alone.

Pruned and trained models are measured as shipped, rounded to the checkpoint's dtype; the dense one as it computes.
Perplexity: the whole text joined, windows of 2,048 tokens, no overlap (the SparseGPT/Wanda protocol); --every N takes
every N-th window only, and then says so. KL to dense: on every --kl-every-th of them. Tasks: lm-evaluation-harness;
--limit N takes the first N documents of each, and then says so.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import schedules
import torch
from cells import add_place, begin, check_texts, exit_on_error, log, question_of, stamp
from quality_models import ONE_SHOT, TRAINED, Cell, Maker
from quality_plots import plot_bytes, plot_levels
from quality_report import failures, scored_rows, summary, table, task_tables
from rich.console import Console
from torch import Tensor
from trained import question
from zero_shot import add_task_arguments, asked_tasks, scores

from elastic_sparsity import read_recipe
from elastic_sparsity.arch import linears_of
from elastic_sparsity.calibration_text import calibration_tokens, evaluation_windows
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.evaluate import KeptHidden, evaluate
from elastic_sparsity.files import is_file, write_json
from elastic_sparsity.ladder import Level
from elastic_sparsity.measure import zero_shot_protocol
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import DTYPES, autocast_factory, resolve_precision, weights_under
from elastic_sparsity.report import check_documents

METHODS = ("dense", *ONE_SHOT, *TRAINED)
ON_REQUEST = ("obs", "elastic-uninduced", "independent-same", "independent-full-block", "epts-official")
DEFAULT = tuple(method for method in METHODS if method not in ON_REQUEST)
LEFT_OUT = ("recipe", "model", "methods", "levels", "seeds", "work", "task_data", "task_folder", "tasks", "limit",
            "batch_size", "precision", "sweep_full_lr")  # fmt: skip


def cells_of(args: argparse.Namespace, recipe: Recipe) -> Iterator[Cell]:
    """In the order in which they are measured: a whole table with the first seed first."""
    ladder = recipe.build_ladder()
    levels = [ladder.find(name) for name in args.levels] if args.levels else list(ladder.levels)
    if "dense" in args.methods:
        yield Cell("dense", "dense", recipe.seed)
    one_shot = [method for method in args.methods if method in ONE_SHOT]
    yield from (Cell(method, level.name, recipe.seed) for level in levels for method in one_shot)
    for rate in dict.fromkeys(args.sweep_full_lr):
        if rate != args.full_lr:
            yield from (Cell(f"independent-full@{rate:g}", level.name, args.seeds[0]) for level in levels)
    for seed in args.seeds:
        for method in (method for method in args.methods if method in TRAINED):
            yield from (Cell(method, x.name, seed) for x in levels if not method.startswith("epts") or is_of_epts(x))


def is_of_epts(level: Level) -> bool:
    return level.pattern is None and level.sparsity <= 0.7


@dataclass
class Gauge:
    """Measures any model of the run.

    Attributes:
        dense: the reference, run once a window for all models.
    """

    dense: KeptHidden
    windows_ST: Tensor
    kl_every: int
    autocast: Callable[[], Any]

    def __call__(self, model: Any) -> dict[str, float]:
        """Perplexity on all windows, KL to the reference on every `kl_every`-th; each window runs once.

        Raises: NumericsError: if a figure is not finite.
        """
        with weights_under(self.autocast, linears_of(model).values()):
            return self._measured(model)

    def _measured(self, model: Any) -> dict[str, float]:
        reference, windows_ST = self.dense.model, self.windows_ST
        if model is reference:
            found = evaluate({"it": model}, windows_ST, autocast=self.autocast)["it"]
            return {"perplexity": found.perplexity, "kl": 0.0, "kl_tokens": found.num_tokens}
        chosen = torch.zeros(windows_ST.shape[0], dtype=torch.bool)
        chosen[:: self.kl_every] = True
        with_kl = evaluate({"it": model}, windows_ST[chosen], reference=reference, reference_hidden=self.dense,
                           autocast=self.autocast)["it"]  # fmt: skip
        parts = [with_kl]
        if not chosen.all():
            parts.append(evaluate({"it": model}, windows_ST[~chosen], autocast=self.autocast)["it"])
        tokens = sum(part.num_tokens for part in parts)
        nll = sum(math.log(part.perplexity) * part.num_tokens for part in parts) / tokens
        assert with_kl.kl is not None
        return {"perplexity": math.exp(min(nll, 700.0)), "kl": with_kl.kl, "kl_tokens": with_kl.num_tokens}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m", help="of recipes/, or a file")
    parser.add_argument("--model", help="instead of the recipe's")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", type=Path, help="folder of the trained checkpoints, outside the repository")
    parser.add_argument("--methods", nargs="*", default=DEFAULT, choices=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}; default: all but {', '.join(ON_REQUEST)}")  # fmt: skip
    parser.add_argument("--levels", nargs="*", help="levels of the recipe's ladder; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trained methods")
    parser.add_argument("--baseline-samples", type=int, default=128, help="that one-shot methods see")
    parser.add_argument("--full-lr", type=float, default=schedules.FULL_LR, help="of independent-full")
    parser.add_argument("--sweep-full-lr", nargs="*", type=float, default=[], metavar="LR", help="others, of one seed")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--every", type=int, default=1, help="every n-th window: a quick figure, not the protocol's")
    parser.add_argument("--kl-every", type=int, default=4, help="KL on every n-th of the measured windows")
    add_task_arguments(parser, required=False)
    add_place(parser, "quality")
    parser.add_argument("--restart", action="store_true", help="measure all again; trained checkpoints stay")
    args = parser.parse_args()
    if min(args.every, args.kl_every, args.window, args.baseline_samples) < 1:
        parser.error("--every, --kl-every, --window and --baseline-samples are whole numbers from 1 on.")
    if min(args.full_lr, *args.sweep_full_lr, 1.0) <= 0:
        parser.error("--full-lr and --sweep-full-lr are positive.")
    return args


def asked_recipe(args: argparse.Namespace) -> Recipe:
    path = Path(args.recipe) if is_file(args.recipe) else schedules.RECIPES / f"{args.recipe}.toml"
    source = str(Path(args.calibration).resolve()) if is_file(args.calibration) else args.calibration
    changes: dict[str, dict[str, Any]] = {"calibration": {"source": source}}
    changes["evaluation"] = {"source": args.evaluation, "window": args.window, "max_windows": None}
    if args.model:
        changes["model"] = {"id": args.model}
    recipe = read_recipe(path, changes)
    if args.baseline_samples > recipe.calibration.samples:
        raise ConfigError(
            f"--baseline-samples: {args.baseline_samples} is more than the recipe's calibration.samples "
            f"({recipe.calibration.samples})."
        )
    return schedules.elastic(recipe, recipe.seed)


def main() -> None:
    args = arguments()
    check_texts(args.calibration, args.evaluation)
    recipe = asked_recipe(args)
    cells = list(cells_of(args, recipe))
    tasks = asked_tasks(args) if args.task_data else {}
    base = load_base(recipe.model.id, recipe.model.dtype)
    stored = base.model.dtype if recipe.checkpoint.dtype == "auto" else DTYPES[recipe.checkpoint.dtype]
    precision = resolve_precision(args.precision, base.model.device.type)
    if precision == "float32":
        base.model.float()
    windows_ST, protocol = evaluation_windows(recipe, base, None)
    windows_ST = windows_ST[:: args.every]
    ids_ST, _ = calibration_tokens(recipe, base)  # a text that cannot be used should not cost a run
    file = args.results / f"{args.name}.json"
    asked = {f"recipe.{name}": value for name, value in question(recipe.model_dump(mode="json")).items()}
    asked |= question_of(args, LEFT_OUT) | {"evaluation_sha256": protocol["sha256"], "precision": precision}
    if recipe.calibration.self_samples:  # then the text's hash does not say it
        asked["calibration_sha256"] = token_hash(ids_ST)
    result = begin(args, file, asked, {"windows": list(windows_ST.shape), "cells": {}})
    if tasks:
        used = zero_shot_protocol(args.limit, args.precision)
        if result.setdefault("task_protocol", used) != used:
            raise SystemExit(f"{file}: its tasks have the protocol {result['task_protocol']}, not {used}.")
    autocast = autocast_factory(precision, base.model.device.type)
    maker = Maker(recipe, base, stored, args.work, args.baseline_samples, args.full_lr, autocast)
    check_meanings(result, maker, file)
    gauge = Gauge(KeptHidden(base.model), windows_ST, args.kl_every, autocast)
    for cell in cells:
        fill(cell, maker, gauge, result, tasks, args, lambda: write_json(file, result))
    show(result, file)


def check_meanings(result: dict[str, Any], maker: Maker, file: Path) -> None:
    """Stops if a method's name stood for other amounts of training when a cell was measured."""
    for key, found in result["cells"].items():
        cell = Cell(found["method"], found["level"], found["seed"])
        if cell.kind.startswith("independent-full") and "amounts" not in found:
            raise SystemExit(
                f"{file}: {key} is of a release that gave independent-full the block phase's tokens and samples only, "
                "or all tokens on few samples. Give --restart or another --name."
            )
        if "amounts" in found and found["amounts"] != maker.amounts(cell):
            raise SystemExit(
                f"{file}: {key} was trained with {found['amounts']}, its method now means {maker.amounts(cell)}. "
                "Give --restart or another --name."
            )


def fill(
    cell: Cell,
    maker: Maker,
    gauge: Gauge,
    result: dict[str, Any],
    tasks: dict[str, Any],
    args: argparse.Namespace,
    keep: Callable[[], None],
) -> None:
    """Measures what a cell still lacks; every figure, and what failed, is kept as soon as it is there."""
    found = result["cells"].get(cell.key)
    done = {} if found is None else {**found.get("tasks", {}), **found.get("task_failures", {})}
    missing = [name for name in tasks if name not in done]
    if found is not None and ("failure" in found or not missing):
        return
    try:
        subject = maker.make(cell)
        if found is None:
            started = time.monotonic()
            measured = gauge(subject.model)
            spent = {"seconds_to_measure": round(time.monotonic() - started, 1)}
            found = result["cells"][cell.key] = {**cell._asdict(), **measured, **subject.facts, **spent, **stamp()}
            keep()
            log(f"{cell.key} {measured['perplexity']:.2f}")
    except NumericsError as error:
        if found is not None or cell.method == "dense":  # without the reference nothing can be told
            raise
        amounts = {"amounts": maker.amounts(cell)} if cell.kind in TRAINED else {}
        result["cells"][cell.key] = {**cell._asdict(), "failure": str(error), **amounts, **stamp()}
        keep()
        log(f"{cell.key} failed: {error}")
        return
    for name in missing:
        fill_task(cell, name, subject.model, maker, result, tasks, args)
        keep()


def fill_task(
    cell: Cell, name: str, model: Any, maker: Maker, result: dict[str, Any], tasks: dict[str, Any],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    found, precision = result["cells"][cell.key], result["question"]["precision"]
    try:
        (score,) = scores(model, maker.base.tokenizer, tasks, [name], args, precision, cell.key)
    except NumericsError as error:
        found.setdefault("task_failures", {})[name] = str(error)
        log(f"{cell.key} {name} failed: {error}")
        return
    check_documents([*scored_rows(result["cells"].values()), {**cell._asdict(), **score}])
    found.setdefault("tasks", {})[name] = {**score, **stamp(packages=("lm-eval", "datasets"))}


def show(result: dict[str, Any], file: Path) -> None:
    """Prints the tables, writes the first into the JSON beside the cells, and draws both plots."""
    cells = result["cells"].values()
    result["table"] = summary(cells)
    write_json(file, result)
    title, console = title_of(result), Console(width=150)
    console.print(table(result["table"], title, documents_of(result), caption_of(result)))
    for task_table in task_tables(cells, documents_of(result)):
        Console(width=220).print(task_table)
    for line in failures(cells):
        console.print(line, markup=False, style="red")
    plot_levels(result["table"], file.with_suffix(".png"), title)
    plot_bytes(result["table"], file.with_name(f"{file.stem}-bytes.png"), title)


def title_of(result: dict[str, Any]) -> str:
    count, length = result["windows"]
    every = result["question"]["every"]
    quick = "" if every == 1 else f", every {every}th of the text's: not the full protocol"
    return f"{result['question']['evaluation']}, {count} windows of {length} tokens{quick}"


def documents_of(result: dict[str, Any]) -> str:
    """Which documents of a task were asked."""
    limit = result.get("task_protocol", {}).get("documents", "all")
    return "all documents" if limit == "all" else f"only the first {limit} documents"


def caption_of(result: dict[str, Any]) -> str:
    asked = result["question"]
    return (
        "±: of perplexity and KL the standard deviation over seeds, of accuracies the standard error over documents. "
        "Seconds to make: of elastic and EPTS the whole run's, on every level, of the others the one level's. "
        f"One-shot methods see {asked['baseline_samples']} samples of {asked['recipe.calibration']['length']} tokens; "
        f"independent-full learns at {asked['full_lr']:g}."
    )


if __name__ == "__main__":
    exit_on_error(main)
