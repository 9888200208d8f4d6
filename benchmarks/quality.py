"""How good is one elastic checkpoint at every level, next to pruning and to tuning of each level alone?

    python benchmarks/quality.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt \\
        --work ../quality-work --seeds 0 1 2 --task-data zero_shot

A cell is one method at one level with one seed. It is written to results/NAME.json as soon as it is measured, trained
checkpoints stay in --work, and an interrupted training goes on where it was: stop the script at any time, and give the
same command again. Other methods, levels, seeds or tasks may be asked for later; they add cells.

Methods: dense; magnitude, wanda, ria, sparsegpt, dsnot (and obs): one-shot, on the first --baseline-samples of the
calibration samples of the recipe's own seed; elastic: the recipe; independent: the recipe for one level alone, on the
tokens that the elastic run spends on it; independent-lora: the same, adapters only; independent-full: full-weight block
tuning, with the block phase's tokens; independent-full-all: with all of the level's tokens; epts: EPTS's schedule with
the token-passes of the whole elastic run (`schedules.py` has the accounting). All are measured as shipped, rounded to
the checkpoint's dtype. Perplexity: the whole text joined, windows of 2,048 tokens, no overlap (the SparseGPT/Wanda
protocol); --every N takes every N-th window only, and then says so. KL to dense: on every --kl-every-th of them.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import schedules
import torch
from cells import add_place, begin, check_texts, exit_on_error, log, question_of, stamp
from quality_report import plot_bytes, plot_levels, summary, table
from rich.console import Console
from size import bitmask_bytes
from torch import Tensor
from trained import question, trained
from zero_shot import add_task_arguments, asked_tasks, scores

from elastic_sparsity import ElasticCheckpoint, read_recipe
from elastic_sparsity.baselines import METHODS as ONE_SHOT
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens, evaluation_windows
from elastic_sparsity.config import Recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import is_file, write_json
from elastic_sparsity.ladder import Level
from elastic_sparsity.measure import zero_shot_protocol
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import DTYPES, autocast_factory, resolve_precision
from elastic_sparsity.slicing import load_level
from elastic_sparsity.supernet import linear_sizes

TRAINED = ("elastic", "independent", "independent-lora", "independent-full", "independent-full-all", "epts")
DEFAULT = ("dense", "magnitude", "wanda", "ria", "dsnot", "sparsegpt", "elastic", "independent", "independent-lora",
           "independent-full", "epts")  # fmt: skip
LEFT_OUT = ("recipe", "model", "methods", "levels", "seeds", "work", "task_data", "task_folder", "tasks", "limit",
            "batch_size", "precision")  # fmt: skip


class Cell(NamedTuple):
    """What is measured together; `level` is "dense" for the dense model."""

    method: str
    level: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/{self.level}/{self.seed}"


@dataclass(frozen=True)
class Subject:
    """A model to measure, and what is known of it before: bytes, and seconds it took to make."""

    model: Any
    facts: dict[str, Any]


@dataclass
class Maker:
    """Makes the model of any cell.

    Attributes:
        recipe: of `schedules.elastic`, with its own seed.
        work: where trained checkpoints are kept.
    """

    recipe: Recipe
    base: BaseModel
    stored: torch.dtype
    work: Path | None
    baseline_samples: int
    full_lr: float
    autocast: Callable[[], Any]

    @cached_property
    def baseline_tokens(self) -> Tensor:
        return calibration_tokens(self.recipe, self.base)[0][: self.baseline_samples]

    @cached_property
    def names(self) -> list[str]:
        return [size.name for size in linear_sizes(self.base.model)]

    def make(self, cell: Cell) -> Subject:
        if cell.method == "dense":
            return Subject(self.base.model, {"bytes": self.base.model.num_parameters() * self.stored.itemsize})
        level = self.recipe.build_ladder().find(cell.level)
        return self.pruned(level, cell.method) if cell.method in ONE_SHOT else self.tuned(level, cell)

    def pruned(self, level: Level, method: str) -> Subject:
        model, started = copy.deepcopy(self.base.model), time.monotonic()
        prune_one_shot_(
            model, self.baseline_tokens, level, method, damping=self.recipe.scores.damping,
            batch_size=self.recipe.block.batch_size, autocast=self.autocast,
        )  # fmt: skip
        seconds = round(time.monotonic() - started, 1)
        return self.shipped(model, {"seconds": seconds})

    def shipped(self, model: Any, facts: dict[str, Any]) -> Subject:
        """A model of one level as its bitmask file holds it."""
        computed = self.base.model.dtype
        size = bitmask_bytes(model, self.base.tokenizer, self.names, self.stored)
        return Subject(model.to(computed), {**facts, "bytes": size})

    def tuned(self, level: Level, cell: Cell) -> Subject:
        checkpoint, sittings = self.checkpoint(level, cell)
        model = load_level(checkpoint, checkpoint.find(level.name), checkpoint.dtype)
        facts = {
            "seconds": round(sum(sitting["seconds"] for sitting in sittings), 1) if sittings else None,
            "sittings": sittings,
            "calibration_sha256": checkpoint.config["data"]["calibration_sha256"],
        }
        if cell.method == "elastic":
            sizes = {"bytes": checkpoint.bytes_of(level), "bytes_all": checkpoint.total_bytes()}
            return Subject(model.to(self.base.model.device, self.base.model.dtype), {**facts, **sizes})
        return self.shipped(model.to(self.base.model.device), facts)

    def checkpoint(self, level: Level, cell: Cell) -> tuple[ElasticCheckpoint, list[dict[str, Any]]]:
        if self.work is None:
            raise ConfigError(f"{cell.method}: is trained; name a folder outside the repository with --work.")
        whole = cell.method in ("elastic", "epts")
        name = f"{cell.method}-s{cell.seed}" if whole else f"{cell.method}-{level.name.replace(':', 'of')}-s{cell.seed}"
        return trained(self.recipe_of(level, cell), self.work / name, self.base)

    def recipe_of(self, level: Level, cell: Cell) -> Recipe:
        recipe = schedules.elastic(self.recipe, cell.seed)
        if cell.method == "elastic":
            return recipe
        if cell.method == "epts":
            return schedules.epts(recipe, read_shapes(recipe.model.id, recipe.model.dtype))
        if cell.method.startswith("independent-full"):
            return schedules.full_weight(recipe, level, self.full_lr, all_tokens=cell.method.endswith("all"))
        trainable = "adapters" if cell.method == "independent-lora" else "as elastic"
        return schedules.independent(recipe, level, trainable=trainable)


def cells_of(args: argparse.Namespace, recipe: Recipe) -> Iterator[Cell]:
    """In the order in which they are measured: a whole table with the first seed first."""
    ladder = recipe.build_ladder()
    levels = [ladder.find(name) for name in args.levels] if args.levels else list(ladder.levels)
    if "dense" in args.methods:
        yield Cell("dense", "dense", recipe.seed)
    one_shot = [method for method in args.methods if method in ONE_SHOT]
    yield from (Cell(method, level.name, recipe.seed) for level in levels for method in one_shot)
    for seed in args.seeds:
        for method in (method for method in args.methods if method in TRAINED):
            yield from (Cell(method, x.name, seed) for x in levels if method != "epts" or is_of_epts(x))


def is_of_epts(level: Level) -> bool:
    return level.pattern is None and level.sparsity <= 0.7


def quality(
    model: Any, reference: Any, windows_ST: Tensor, kl_every: int, autocast: Callable[[], Any]
) -> dict[str, float]:
    """Perplexity on all windows, KL to the reference on every `kl_every`-th; each window runs once."""
    if model is reference:
        found = evaluate({"it": model}, windows_ST, autocast=autocast)["it"]
        return {"perplexity": found.perplexity, "kl": 0.0, "kl_tokens": found.num_tokens}
    chosen = torch.zeros(windows_ST.shape[0], dtype=torch.bool)
    chosen[::kl_every] = True
    with_kl = evaluate({"it": model}, windows_ST[chosen], reference=reference, autocast=autocast)["it"]
    parts = [with_kl]
    if not chosen.all():
        parts.append(evaluate({"it": model}, windows_ST[~chosen], autocast=autocast)["it"])
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
    known = ("dense", *ONE_SHOT, *TRAINED)
    parser.add_argument("--methods", nargs="*", default=DEFAULT, choices=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--levels", nargs="*", help="levels of the recipe's ladder; default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the trained methods")
    parser.add_argument("--baseline-samples", type=int, default=128)
    parser.add_argument("--full-lr", type=float, default=schedules.FULL_LR, help="of independent-full")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--every", type=int, default=1, help="every n-th window: a quick figure, not the protocol's")
    parser.add_argument("--kl-every", type=int, default=4, help="KL on every n-th of the measured windows")
    add_task_arguments(parser, required=False)
    add_place(parser, "quality")
    parser.add_argument("--restart", action="store_true", help="measure all again; trained checkpoints stay")
    args = parser.parse_args()
    if min(args.every, args.kl_every, args.window, args.baseline_samples) < 1:
        parser.error("--every, --kl-every, --window and --baseline-samples are whole numbers from 1 on.")
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
    calibration_tokens(recipe, base)  # a text that cannot be used should not cost a run
    file = args.results / f"{args.name}.json"
    asked = {f"recipe.{name}": value for name, value in question(recipe.model_dump(mode="json")).items()}
    asked |= question_of(args, LEFT_OUT) | {"evaluation_sha256": protocol["sha256"], "precision": precision}
    result = begin(args, file, asked, {"windows": list(windows_ST.shape), "cells": {}})
    if tasks:
        used = zero_shot_protocol(args.limit, args.precision)
        if result.setdefault("task_protocol", used) != used:
            raise SystemExit(f"{file}: its tasks have the protocol {result['task_protocol']}, not {used}.")
    autocast = autocast_factory(precision, base.model.device.type)
    maker = Maker(recipe, base, stored, args.work, args.baseline_samples, args.full_lr, autocast)
    for cell in cells:
        fill(cell, maker, result, windows_ST, tasks, args, lambda: write_json(file, result))
    show(result, file)


def fill(
    cell: Cell,
    maker: Maker,
    result: dict[str, Any],
    windows_ST: Tensor,
    tasks: dict[str, Any],
    args: argparse.Namespace,
    keep: Callable[[], None],
) -> None:
    """Measures what a cell still lacks; every figure is kept as soon as it is there."""
    found = result["cells"].get(cell.key)
    missing = [name for name in tasks if found is None or name not in found.get("tasks", {})]
    if found is not None and not missing:
        return
    subject = maker.make(cell)
    if found is None:
        started = time.monotonic()
        measured = quality(subject.model, maker.base.model, windows_ST, args.kl_every, maker.autocast)
        spent = {"seconds_to_measure": round(time.monotonic() - started, 1)}
        found = result["cells"][cell.key] = {**cell._asdict(), **measured, **subject.facts, **spent, **stamp()}
        keep()
        log(f"{cell.key} {measured['perplexity']:.2f}")
    precision = result["question"]["precision"]
    for score in scores(subject.model, maker.base.tokenizer, tasks, missing, args, precision, cell.key):
        found.setdefault("tasks", {})[score["task"]] = {**score, **stamp(packages=("lm-eval", "datasets"))}
        keep()


def show(result: dict[str, Any], file: Path) -> None:
    """Prints the table, writes it into the JSON beside the cells, and draws both plots."""
    result["table"] = summary(result["cells"].values())
    write_json(file, result)
    title = title_of(result)
    Console(width=150).print(table(result["table"], title))
    plot_levels(result["table"], file.with_suffix(".png"), title)
    plot_bytes(result["table"], file.with_name(f"{file.stem}-bytes.png"), title)


def title_of(result: dict[str, Any]) -> str:
    count, length = result["windows"]
    every = result["question"]["every"]
    quick = "" if every == 1 else f", every {every}th of the text's: not the full protocol"
    return f"{result['question']['evaluation']}, {count} windows of {length} tokens{quick}"


if __name__ == "__main__":
    exit_on_error(main)
