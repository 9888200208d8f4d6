"""Milliseconds of packed levels against dense, and how far both are from what the memory allows: two models, this CPU.

    python benchmarks/latency.py                  # SmolLM2-135M, and LLaMA-7B's layer shapes at random (3 blocks)
    python benchmarks/latency.py --smollm2 DIR --llama DIR   # checkpoints made before

Speed depends on shapes and levels only, so the checkpoints made here are not trained. Dense float32 and bfloat16 and
packed bfloat16 of a level are loaded side by side and take turns; a ratio is the median of ratios within single rounds,
over the faster dense one (`elastic-sparsity bench` does the same). "limit": the bytes that one token reads over the
read bandwidth measured here; "of it": that over the time measured.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cells import exit_on_error, stamp
from rich.console import Console
from rich.table import Table
from size import LLAMA_7B, SMOLLM2, make_checkpoint, random_llama

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.bench import bench
from elastic_sparsity.doctor import read_facts
from elastic_sparsity.files import write_json
from elastic_sparsity.ways import Way, linear_bytes

HERE = Path(__file__).parent
LEVELS = ("0.5", "0.6", "0.7", "2:4")
WAYS = ("dense-float32", "dense-bfloat16", "packed-bfloat16")


def read_bandwidth(repeats: int = 20) -> float:
    """Bytes a second of torch summing 1.6 GB of integers with its threads: the best that a product could read."""
    numbers = [torch.ones(100_000_000, dtype=torch.int64) for _ in range(2)]
    seconds = []
    for number in range(repeats):
        start = time.perf_counter()
        numbers[number % 2].sum()
        seconds.append(time.perf_counter() - start)
    return numbers[0].numel() * 8 / statistics.median(seconds)


def weight_share(checkpoint: ElasticCheckpoint, level: str, way: str) -> float:
    """Resident bytes of the sparsified linears as a share of dense bfloat16's."""
    runtime, _, dtype = way.rpartition("-")
    found = checkpoint.find(level)
    specs = checkpoint.linears.values()
    mine = sum(linear_bytes(spec, found, Way(runtime=runtime, dtype=dtype)) for spec in specs)
    return mine / sum(2 * spec.size for spec in specs)


def measure(checkpoint: ElasticCheckpoint, bandwidth: float, args: argparse.Namespace) -> list[dict]:
    """One row a level and way."""
    profile = bench(
        checkpoint.folder, levels=LEVELS, ways=WAYS, batches=args.batch, prompt=args.prompt, new_tokens=args.new_tokens,
        repeats=args.repeats,
    )  # fmt: skip
    return [
        {
            "level": row.level,
            "way": row.way,
            "weight_share": weight_share(checkpoint, row.level, row.way),
            "resident_bytes": row.resident_bytes,
            "prefill_tokens_per_s": row.prefill.tokens_per_s,
            "prefill_speedup": row.prefill.speedup,
            "decode": [x.model_dump() for x in row.decode],
            "limit_s": row.streamed_bytes / bandwidth,
        }
        for row in profile.measurements
    ]


def show(title: str, rows: list[dict]) -> Table:
    batches = [entry["batch"] for entry in rows[0]["decode"]]
    table = Table(title=title)
    columns = ("level", "way", "weights", "ms a token", "limit", "of it", "prefill", *(f"batch {b}" for b in batches))
    for column in columns:
        table.add_column(column, justify="left" if column in ("level", "way") else "right", no_wrap=True)
    for row in rows:
        one = next(entry for entry in row["decode"] if entry["batch"] == 1)
        table.add_row(
            row["level"], row["way"], f"{row['weight_share']:.3f}", f"{1000 * one['step_s']:.2f}",
            f"{1000 * row['limit_s']:.2f}", f"{row['limit_s'] / one['step_s']:.0%}", f"{row['prefill_speedup']:.2f}x",
            *(f"{entry['speedup']:.2f}x" for entry in row["decode"]),
        )  # fmt: skip
    return table


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Speedup of packed over the faster dense at batch 1, beside what the bytes alone would give."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5.2 * len(results), 3.8), layout="constrained", squeeze=False
    )
    for axis, (title, rows) in zip(axes[0], results.items(), strict=True):
        packed = [row for row in rows if row["way"] == "packed-bfloat16"]
        dense = {row["level"]: row for row in rows if row["way"] == "dense-bfloat16"}
        at = range(len(packed))
        found = [next(x["speedup"] for x in row["decode"] if x["batch"] == 1) for row in packed]
        bars = axis.bar([x - 0.2 for x in at], found, 0.4, label="measured", color="tab:green")
        axis.bar_label(bars, [f"{x:.2f}x" for x in found])
        bytes_alone = [dense[row["level"]]["limit_s"] / row["limit_s"] for row in packed]
        axis.bar([x + 0.2 for x in at], bytes_alone, 0.4, label="ratio of the bytes read", color="lightgrey")
        axis.axhline(1, color="black", linestyle="--", label="the faster dense way")
        axis.set_xticks(list(at), [row["level"] for row in packed])
        axis.set_xlabel("level")
        axis.set_ylabel("decoding at batch 1, times dense")
        axis.set_title(title)
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="elastic checkpoint; default: an untrained one made here")
    parser.add_argument("--llama", type=Path, help="elastic checkpoint of LLaMA-7B's layer shapes")
    parser.add_argument("--blocks", type=int, default=3, help="of the random model with LLaMA-7B's layer shapes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "latency.json")
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    facts = read_facts()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        small = ElasticCheckpoint(args.smollm2) if args.smollm2 else make_checkpoint(work / "s", SMOLLM2)
        if args.llama:
            large = ElasticCheckpoint(args.llama)
        else:
            shapes = (*LLAMA_7B[:4], args.blocks, LLAMA_7B[5])
            large = make_checkpoint(work / "l", str(random_llama(work / "dense", shapes)))
        models = {"SmolLM2-135M": small, "LLaMA-7B's layer shapes": large}
        results = {name: measure(checkpoint, bandwidth, args) for name, checkpoint in models.items()}
    console = Console(width=140)
    console.print(f"read bandwidth: {bandwidth / 1e9:.1f} GB/s; {facts.cpu}, kernels: {facts.active_path}")
    for name, rows in results.items():
        console.print(show(name, rows))
    record = {
        **stamp(seed=0),
        "instruction_path": facts.active_path,
        "read_bandwidth": bandwidth,
        "protocol": {
            "prompt": args.prompt,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "blocks": args.blocks,
        },
        "results": results,
    }
    write_json(args.output, json.loads(json.dumps(record)))
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    exit_on_error(main)
