"""A change to a recipe tried in small: the same short run with it and without, level by level.

    python benchmarks/trial.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt --trial "as it is"
    python benchmarks/trial.py ... --trial "one sample a step" --set end_to_end.batch_size=1 end_to_end.steps=128
    python benchmarks/trial.py ... --trial "folded first" --set model.id='"folded"' --seeds 0 1

A trial is `smollm2-135m` with few samples and steps (options), two samples a step, without folds and search, and what
`--set section.field=value` changes on top; values are JSON, or text where they are none. For each seed it says
perplexity on every n-th window of the evaluation text (not the full protocol), KL to dense over the last quarter of the
run on its own text, and what the run took. For comparing, not for quoting: two block phases that should be alike ended
1 to 2 % apart. Trials go into one JSON, a name each, and are not run again; interrupted, the run of a trial goes on if
--work names a folder, and has no cost then.
"""

import argparse
import hashlib
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cells import add_place, begin, check_texts, exit_on_error, log, question_of, stamp
from rich.console import Console
from rich.table import Table
from schedules import RECIPES, UNPREPARED, changed
from spent import spent

from elastic_sparsity import ElasticCheckpoint, ElasticModel, optimize, read_recipe
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import check_vocabulary, read_text, tokenize, windows
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import is_file, write_json
from elastic_sparsity.precision import autocast_factory, default_device
from elastic_sparsity.run_folder import is_unfinished
from elastic_sparsity.slicing import load_tokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--trial", required=True, help="its name in the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="what it changes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="smollm2-135m", help="of recipes/, or a file")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block-samples", type=int, default=32)
    parser.add_argument("--block-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64, help="end-to-end steps")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--every", type=int, default=24, help="measure every n-th window")
    parser.add_argument("--work", type=Path, help="folder in which an interrupted run goes on, and checkpoints stay")
    parser.add_argument("--restart", action="store_true", help="a new JSON, without the trials that are there")
    add_place(parser, "trial")
    return parser.parse_args()


def changes_of(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Recipe fields by section, from section.field=value. Raises: ConfigError."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, field = path.partition(".")
        if not (equals and dot and section and field):
            raise ConfigError(f"--set: found {setting!r}; expected SECTION.FIELD=VALUE, e.g. end_to_end.steps=128.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found.setdefault(section, {})[field] = value
    return found


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    """The recipe made small, and changed."""
    path = args.recipe if is_file(args.recipe) else RECIPES / f"{args.recipe}.toml"
    small = {
        "calibration": {"source": args.calibration, "samples": args.samples, "length": args.length},
        "block": {"samples": args.block_samples, "steps": args.block_steps},
        "end_to_end": {"steps": args.steps, "batch_size": 2, "trainable": "base"},
        **UNPREPARED,
    }
    recipe, changes = changed(read_recipe(path), small, seed), changes_of(args.set)
    for section in changes:
        if not isinstance(recipe.model_dump().get(section), dict):
            raise ConfigError(f"--set: {section!r} is no section of a recipe.")
    return changed(recipe, changes).model_copy(update={"precision": args.precision})


def run(recipe: Recipe, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains, if no finished checkpoint is there, and measures every level."""
    is_begun = is_unfinished(folder) or (folder / "run.json").is_file()  # what it took before is not known here
    with spent() as cost:
        made = ElasticCheckpoint(folder) if (folder / "run.json").is_file() else optimize(recipe, folder)
    ids = tokenize(load_tokenizer(folder), read_text(args.evaluation))
    all_ST, device = windows(ids, args.window, None), default_device()
    windows_ST, autocast = all_ST[:: args.every], autocast_factory(args.precision, device)
    perplexity = {}
    for level in made.ladder.levels:
        model = ElasticModel.from_pretrained(folder, level=level.name, dtype="float32", device=device)
        check_vocabulary(ids, model.config.vocab_size)
        perplexity[level.name] = evaluate({"it": model}, windows_ST, autocast=autocast)["it"].perplexity
    measured = f"every {args.every} of {len(all_ST)} windows of {args.window} tokens"
    return {"perplexity": perplexity, "kl_on_its_text": made.config["training"]["end_to_end_kl"], "measured": measured,
            **(dict.fromkeys(cost) if is_begun else cost)}  # fmt: skip


def main() -> None:
    args = arguments()
    check_texts(args.calibration, args.evaluation)
    file = args.results / f"{args.name}.json"
    result = begin(args, file, question_of(args, ("trial", "set", "seeds", "work")), {"trials": {}})
    changes = changes_of(args.set)
    before = result["trials"].setdefault(args.trial, {"set": changes, "seeds": {}})
    if before["set"] != changes:
        raise ConfigError(f"--trial: {args.trial!r} is in {file} with {before['set']}, now {changes}; name it anew.")
    for seed in args.seeds:
        if str(seed) in before["seeds"]:
            continue
        recipe = recipe_of(args, seed)
        place = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="trial-")
        with place as work:
            name = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
            found = run(recipe, Path(work) / name, args)
        before["seeds"][str(seed)] = {**found, **stamp(seed)}
        write_json(file, result)
        log(f"{args.trial}, seed {seed}: {' / '.join(f'{x:.2f}' for x in found['perplexity'].values())}")
    show(result)


def show(result: dict[str, Any]) -> None:
    rows = [(name, seed, row) for name, trial in result["trials"].items() for seed, row in trial["seeds"].items()]
    levels = list(rows[0][2]["perplexity"])
    table = Table(title=f"Perplexity, and KL to dense on the run's own text; {rows[0][2]['measured']}")
    for column in ("trial", "seed", *levels, *(f"KL {level}" for level in levels), "CPU s"):
        table.add_column(column, justify="left" if column == "trial" else "right")
    for name, seed, row in rows:
        figures = [f"{row['perplexity'][x]:.2f}" if x in row["perplexity"] else "" for x in levels]
        figures += [f"{row['kl_on_its_text'][x]:.3f}" if x in row["kl_on_its_text"] else "" for x in levels]
        table.add_row(name, seed, *figures, "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}")
    Console(width=170).print(table)


if __name__ == "__main__":
    exit_on_error(main)
