"""Peak resident memory of whole runs against the plan's figure, random Llamas: width 1024 with 8 and 32 blocks, others.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run. `fitted`: whether its figures were known when the plan's constants were chosen."""

    width: int = 1024
    inner: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 8192
    blocks: int = 8
    weights: str = "stream"
    activations: str = "disk"
    precision: str = "float32"
    samples: int = 2
    batch: int = 2
    length: int = 256
    ranks: int = 8
    scores: str = "wanda"
    base_lr: float = 0.0
    trainable: str = "off"
    fitted: bool = False

    @property
    def model(self) -> str:
        shape = (self.width, self.inner, self.heads, self.kv_heads, self.vocabulary, self.blocks)
        return "llama-" + "-".join(map(str, shape))


SMOL = {"width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152, "blocks": 30}
CASES = (
    Case(fitted=True),
    Case(fitted=True, blocks=32),
    Case(fitted=True, precision="bfloat16"),
    Case(fitted=True, weights="resident", activations="host"),
    Case(fitted=True, weights="resident", activations="host", blocks=32),
    Case(width=1536, inner=4096, heads=12, kv_heads=4, vocabulary=32000, blocks=6, samples=4, batch=4, length=512),
    Case(width=768, inner=3072, heads=12, kv_heads=12, vocabulary=50000, blocks=12, precision="bfloat16",
         base_lr=1e-3, ranks=16),
    Case(kv_heads=4, blocks=12, batch=1, length=1024, scores="obs"),
    Case(width=2048, inner=5632, heads=16, kv_heads=8, blocks=4, precision="bfloat16", samples=4, batch=4),
    Case(width=2048, inner=5632, heads=16, kv_heads=8, blocks=4, precision="bfloat16", weights="resident",
         activations="host", trainable="adapters"),
    Case(**SMOL, weights="resident", activations="host", precision="bfloat16", trainable="base", samples=8, batch=8),
)  # fmt: skip
STAGES = {  # where the run spends it: module, class or none, function
    "load": ("pipeline", None, "prepare"),
    "statistics": ("block_phase", None, "block_statistics"),
    "scores": ("block_phase", None, "attach_elastic_"),
    "training": ("block_phase", None, "train_block_"),
    "commit": ("run_folder", "RunFolder", "save_block"),
    "saving": ("pipeline", None, "save_run"),
}


def recipe_of(folder: Path, case: Case) -> dict[str, Any]:
    return {
        "model": {"id": str(folder / case.model)},
        "calibration": {"source": str(folder / "words.txt"), "samples": case.samples, "length": case.length},
        "ladder": {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]},
        "adapters": {"ranks": case.ranks},
        "scores": {"method": case.scores},
        "block": {"steps": 1, "samples": case.samples, "batch_size": case.batch, "base_lr": case.base_lr},
        "end_to_end": {"trainable": case.trainable, "steps": 2, "batch_size": case.batch},
        "memory": {"weights": case.weights, "activations": case.activations},
        "precision": case.precision,
        "seed": SEED,
    }


def make_inputs(folder: Path, cases: Sequence[Case]) -> None:
    """Models in shards of 100 MB, and a text of made-up words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from elastic_sparsity.tiny import byte_tokenizer

    for case in {case.model: case for case in cases}.values():
        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=case.width, intermediate_size=case.inner, num_hidden_layers=case.blocks,
            num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, vocab_size=case.vocabulary,
            max_position_embeddings=2048, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / case.model, max_shard_size="100MB")
        byte_tokenizer().save_pretrained(folder / case.model)
    chance = random.Random(SEED)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(500)]
    (folder / "words.txt").write_text(" ".join(chance.choices(words, k=8000)))


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


def measure(folder: Path, case: Case) -> dict[str, Any]:
    """A case's measured and planned figures, in bytes."""
    from elastic_sparsity.config import make_recipe
    from elastic_sparsity.planning import plan

    data = recipe_of(folder, case)
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
    return {
        **asdict(case),
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
    for column in ("width", "blocks", "weights", "end to end", "fitted", "measured", "plan", "off by", *STAGES, "s"):
        table.add_column(column, justify="right")
    for row in rows:
        error = row["planned_bytes"] / row["measured_bytes"] - 1
        stages = [f"{x['measured'] / 1e6:.0f} / {x['planned'] / 1e6:.0f}" for x in row["stages"].values()]
        table.add_row(
            str(row["width"]), str(row["blocks"]), row["weights"], row["trainable"], "yes" if row["fitted"] else "no",
            f"{row['measured_bytes'] / 1e6:.0f}", f"{row['planned_bytes'] / 1e6:.0f}", f"{100 * error:+.1f} %",
            *stages, f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for offset, kind in ((-0.2, "measured"), (0.2, "planned")):
        axes.bar([i + offset for i in range(len(rows))], [row[f"{kind}_bytes"] / 1e6 for row in rows], 0.4, label=kind)
    labels = [
        f"{row['width']} x {row['blocks']}\n{row['weights']}\n{row['precision']}\n"
        f"{'fitted' if row['fitted'] else 'predicted'}"
        for row in rows
    ]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("peak resident memory, MB")
    axes.set_title("random Llamas (width x blocks): measured against `plan`")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, nargs="*", help="only these, by number; nothing is written")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory.json")
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    from elastic_sparsity.files import write_json
    from elastic_sparsity.preparing import versions

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = CASES if args.cases is None else [CASES[number] for number in args.cases]
        make_inputs(folder, cases)
        rows = []
        for case in cases:
            rows.append(measure(folder, case))
            show(rows[-1:])
    show(rows)
    if args.cases is not None:
        return
    streamed = {row["blocks"]: row["measured_bytes"] for row in rows if row["fitted"]
                and row["weights"] == "stream" and row["precision"] == "float32"}  # fmt: skip
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
            "growth_8_to_32_blocks": growth,
            "rows": rows,
        },
    )
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
