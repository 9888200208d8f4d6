"""Load times and memory of the checkpoint format, SmolLM2-135M (its bytes: size.py).

    python benchmarks/format.py
    python benchmarks/format.py --checkpoint DIR   # a checkpoint of yours instead of an untrained one

Every figure is a process of its own (median of --repeats, the ways taking turns), files in the page cache, imports of
torch and transformers not counted, their lazy model classes counted for both. "usable" adds one forward pass of 8
tokens, since transformers maps the dense file and leaves reading it to the first use. Peak: the process's largest
resident size until then (Linux).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cells import add_place, exit_on_error, stamp
from rich.console import Console
from rich.table import Table
from size import SMOLLM2, make_checkpoint

from elastic_sparsity.files import write_json
from elastic_sparsity.models import load_base

LEVELS = ("0.5", "0.6", "0.7", "2:4")

PROBE = """
import json, os, re, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
from elastic_sparsity import ElasticModel, set_level
torch.set_num_threads(os.cpu_count())
way, path, start, end = sys.argv[1:5]
ids = torch.arange(8)[None]
def load():
    if way == "dense":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return ElasticModel.from_pretrained(path, start, runtime="packed" if way == "packed" else "dense")
begin = time.perf_counter()
model = load()
seconds = {"load": time.perf_counter() - begin}
with torch.no_grad():
    model(ids)
seconds["usable"] = time.perf_counter() - begin
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())  # getrusage's would count the parent's too
if end:
    begin = time.perf_counter()
    set_level(model, end)
    seconds["set_level"] = time.perf_counter() - begin
del model
begin = time.perf_counter()
model = load()
with torch.no_grad():
    model(ids)
seconds["again"] = time.perf_counter() - begin  # usable once more, now that the model's class is imported
print(json.dumps({**seconds, "peak_bytes": 1024 * int(peak[1])}))
"""


def probe(way: str, path: Path, start: str = "", end: str = "") -> dict:
    command = [sys.executable, "-c", PROBE, way, str(path), start, end]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return json.loads(done.stdout)


def time_rows(folder: Path, dense: Path, repeats: int) -> list[dict]:
    ways = [("dense, transformers", "dense", dense, "", "")]
    ways += [(f"load {level}", "elastic", folder, level, "") for level in LEVELS]
    ways += [(f"load {level}, packed", "packed", folder, level, "") for level in LEVELS]
    ways += [(f"{a} -> {b}", "elastic", folder, a, b) for a in LEVELS for b in LEVELS if a != b]
    found: dict[str, list[dict]] = {name: [] for name, *_ in ways}
    for _ in range(repeats):
        for name, *arguments in ways:
            found[name].append(probe(*arguments))
    rows = []
    for name, results in found.items():
        keys = results[0].keys()
        rows.append({"way": name, **{key: statistics.median(result[key] for result in results) for key in keys}})
    return rows


def show_times(rows: list[dict]) -> Table:
    dense = rows[0]
    table = Table(title="seconds, and ratio to dense")
    for column in ("", "load", "usable", "again", "set_level", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cells = [f"{row[key]:.3f} ({row[key] / dense[key]:.2f}x)" for key in ("load", "usable", "again")]
        switch = f"{row['set_level']:.3f} ({row['set_level'] / dense['load']:.2f}x)" if "set_level" in row else ""
        table.add_row(row["way"], *cells, switch, f"{row['peak_bytes'] / 1e6:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of SmolLM2-135M; default: an untrained one made here")
    parser.add_argument("--repeats", type=int, default=5)
    add_place(parser, "format")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folder = args.checkpoint or make_checkpoint(work / "smollm2", SMOLLM2).folder
        base = load_base(SMOLLM2)
        base.model.to(torch.bfloat16).save_pretrained(work / "dense")
        del base
        times = time_rows(folder, work / "dense", args.repeats)
    Console(width=140).print(show_times(times))
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / f"{args.name}.json", {**stamp(0), "times": times})


if __name__ == "__main__":
    exit_on_error(main)
