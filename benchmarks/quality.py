"""How good is one elastic checkpoint at every level, next to one-shot pruning of each level alone?

Baselines are made by this package from the base model, on the first samples of the very calibration set the checkpoint
was trained on. Protocol: the whole text joined, windows of 2,048 tokens, no overlap (the SparseGPT/Wanda protocol).

    python benchmarks/quality.py elastic-smollm2-135m --calibration abc-news.txt --evaluation wikitext2-test.raw.txt
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

from rich.console import Console

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.config import make_recipe
from elastic_sparsity.files import write_json
from elastic_sparsity.manifest import RUN_NAME
from elastic_sparsity.measure import measure
from elastic_sparsity.pipeline import versions
from elastic_sparsity.report import plot_results, results_table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", help="the text it was trained on; default: the path in its recipe")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--baselines", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--baseline-samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--kl", action="store_true", help="also KL to the dense model (runs it once more a level)")
    parser.add_argument("--name", default="quality")
    args = parser.parse_args()
    checkpoint = ElasticCheckpoint(args.checkpoint)
    training = {"end_to_end_kl": checkpoint.config["training"]["end_to_end_kl"]}
    if (args.checkpoint / RUN_NAME).is_file():  # a copy has none
        training |= json.loads((args.checkpoint / RUN_NAME).read_text(encoding="utf-8"))
    data = dict(checkpoint.config["recipe"])
    data["evaluation"] = {
        "source": args.evaluation,
        "window": args.window,
        "max_windows": args.max_windows,
        "baselines": args.baselines,
        "baseline_samples": args.baseline_samples,
    }
    if args.calibration:
        data["calibration"] = {**data["calibration"], "source": args.calibration}
    recipe = make_recipe(data)
    started = time.monotonic()
    rows = measure(recipe, checkpoint, lambda stage, done, total: log(stage, done, total), kl=args.kl)
    protocol = checkpoint.config["quality"]["protocol"]
    title = f"{protocol['text']}, {protocol['windows'][0]} windows of {protocol['windows'][1]} tokens"
    Console(width=110).print(results_table(rows, title))
    RESULTS.mkdir(exist_ok=True)
    plot_results(rows, RESULTS / f"{args.name}.png", title)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, no GPU",
        "seed": recipe.seed,
        "seconds": round(time.monotonic() - started),
        "versions": versions(),
        "protocol": protocol,
        "calibration": checkpoint.config["data"],
        "baseline_tokens": args.baseline_samples * recipe.calibration.length,
        "training": training,
        "recipe": checkpoint.config["recipe"],
        "rows": rows,
    }
    write_json(RESULTS / f"{args.name}.json", result)


def log(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{datetime.datetime.now():%H:%M:%S} {stage} done", flush=True)


if __name__ == "__main__":
    main()
