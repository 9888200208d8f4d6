"""Peak resident memory of whole runs against the plan's figure: a random Llama of width 1024, 8 and 32 blocks.

    python benchmarks/memory.py

Every run is a fresh process, which reports the highest resident size that the system saw in each stage (Linux resets
that mark on request). "plan" is what `elastic-sparsity plan` says of the same run before it starts. Weights are random
and calibration words too: memory depends on shapes only. Results and a plot go to benchmarks/results/memory.*.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED, WIDTH, INNER, HEADS, VOCABULARY = 0, 1024, 2816, 16, 8192
CASES = (  # blocks, weights, activations, precision
    (8, "stream", "disk", "float32"),
    (32, "stream", "disk", "float32"),
    (8, "stream", "disk", "bfloat16"),
    (8, "resident", "host", "float32"),
    (32, "resident", "host", "float32"),
)
STAGES = {  # where the run spends it: module, class or none, function
    "load": ("pipeline", None, "prepare"),
    "statistics": ("block_phase", None, "block_statistics"),
    "scores": ("block_phase", None, "attach_elastic_"),
    "training": ("block_phase", None, "train_block_"),
    "commit": ("run_folder", "RunFolder", "save_block"),
    "saving": ("pipeline", None, "save_run"),
}


def recipe_of(folder: Path, depth: int, weights: str, activations: str, precision: str) -> dict[str, Any]:
    return {
        "model": {"id": str(folder / f"llama-{depth}")},
        "calibration": {"source": str(folder / "words.txt"), "samples": 2, "length": 256},
        "ladder": {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]},
        "adapters": {"ranks": 8},
        "block": {"steps": 1, "samples": 2, "batch_size": 2},
        "end_to_end": {"trainable": "off"},
        "memory": {"weights": weights, "activations": activations},
        "precision": precision,
        "seed": SEED,
    }


def make_inputs(folder: Path, depths: set[int]) -> None:
    """Models in shards of 100 MB, and a text of made-up words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from elastic_sparsity.tiny import byte_tokenizer

    for depth in depths:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=depth, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / f"llama-{depth}", max_shard_size="100MB")
        byte_tokenizer().save_pretrained(folder / f"llama-{depth}")
    chance = random.Random(SEED)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(500)]
    (folder / "words.txt").write_text(" ".join(chance.choices(words, k=5000)))


def child(recipe_file: str, output: str) -> None:
    """One run in this process; prints the peaks of its stages, in bytes, as JSON."""
    import importlib

    import torch

    from elastic_sparsity.config import make_recipe

    torch.set_num_threads(1)
    marks: dict[str, int] = {}
    total = 0

    def observe(stage: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            total = max(total, high_water(reset=True))
            found = function(*args, **kwargs)
            mark = high_water(reset=True)
            marks[stage], total = max(marks.get(stage, 0), mark), max(total, mark)
            return found

        setattr(owner, name, timed)

    for stage, (module, owner, name) in STAGES.items():
        found = importlib.import_module(f"elastic_sparsity.{module}")
        observe(stage, getattr(found, owner) if owner else found, name)
    pipeline = importlib.import_module("elastic_sparsity.pipeline")
    start = time.monotonic()
    pipeline.optimize(make_recipe(json.loads(Path(recipe_file).read_text())), output)
    seconds = time.monotonic() - start
    print(json.dumps({"peak": max(total, high_water(reset=False)), "stages": marks, "seconds": round(seconds, 1)}))


def high_water(*, reset: bool) -> int:
    """The largest resident size since the last reset, in bytes. Linux only."""
    status = Path("/proc/self/status").read_text()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure(folder: Path, case: tuple[int, str, str, str]) -> dict[str, Any]:
    """A case's measured and planned figures, in bytes."""
    from elastic_sparsity.config import make_recipe
    from elastic_sparsity.planning import plan

    data = recipe_of(folder, *case)
    file, output = folder / "recipe.json", folder / "out"
    file.write_text(json.dumps(data))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", str(file), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    subprocess.run(["rm", "-rf", str(output)], check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    planned = plan(make_recipe(data), gpu=False, probe=False)
    host = next(peak for peak in planned.peaks if peak.place == "host")
    stages = {
        stage: sum(term.bytes for term in planned.terms if term.place == "host" and stage in term.stages)
        for stage in STAGES
    }
    names = ("blocks", "weights", "activations", "precision")
    return {
        **dict(zip(names, case, strict=True)),
        "measured_bytes": found["peak"],
        "planned_bytes": host.bytes,
        "seconds": found["seconds"],
        "stages": {stage: {"measured": found["stages"][stage], "planned": stages[stage]} for stage in STAGES},
        "planned_terms": {term.name: term.bytes for term in host.terms},
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak resident memory, MB (measured / plan)")
    for column in ("blocks", "weights", "hidden", "products", "measured", "plan", "plan off by", *STAGES, "s"):
        table.add_column(column, justify="right")
    for row in rows:
        error = row["planned_bytes"] / row["measured_bytes"] - 1
        stages = [f"{x['measured'] / 1e6:.0f} / {x['planned'] / 1e6:.0f}" for x in row["stages"].values()]
        table.add_row(
            str(row["blocks"]), row["weights"], row["activations"], row["precision"],
            f"{row['measured_bytes'] / 1e6:.0f}", f"{row['planned_bytes'] / 1e6:.0f}", f"{100 * error:+.1f} %",
            *stages, f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for offset, kind in ((-0.2, "measured"), (0.2, "planned")):
        axes.bar([i + offset for i in range(len(rows))], [row[f"{kind}_bytes"] / 1e6 for row in rows], 0.4, label=kind)
    labels = [f"{row['blocks']} blocks\n{row['weights']}\n{row['precision']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("peak resident memory, MB")
    axes.set_title("random Llama, width 1024: measured against `plan`")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory.json")
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    from elastic_sparsity.files import write_json
    from elastic_sparsity.pipeline import versions

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder, {case[0] for case in CASES})
        rows = []
        for case in CASES:
            rows.append(measure(folder, case))
            show(rows[-1:])
    show(rows)
    streamed = {row["blocks"]: row["measured_bytes"] for row in rows if row["weights"] == "stream"
                and row["precision"] == "float32"}  # fmt: skip
    growth = streamed[32] / streamed[8] - 1
    print(f"streamed, from 8 to 32 blocks: {100 * growth:+.1f} %")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    write_json(
        args.output,
        {
            "protocol": __doc__.splitlines()[0] + " Highest VmHWM of a fresh process, one thread.",
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip(),
            "versions": versions(),
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
            "seed": SEED,
            "model": {"width": WIDTH, "inner": INNER, "heads": HEADS, "vocabulary": VOCABULARY, "stored": "bfloat16"},
            "growth_8_to_32_blocks": growth,
            "rows": rows,
        },
    )
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
