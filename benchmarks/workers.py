"""One process against two (one thread each): are the results equal, how much faster, how many bytes are exchanged?

    python benchmarks/workers.py

Random Llama of hidden 512, 4 blocks; block phase and end-to-end phase of base values, on CPU through gloo. From the two
timings and the bytes handed to reductions it models more workers: time(N) = work / N + fixed, by Amdahl; a ring
all-reduce moves 2 (N - 1) / N of the bytes through each worker.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SECTIONS = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}  # fmt: skip
RECIPE = {
    "calibration": {"samples": 16, "length": 256},
    "ladder": {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]},
    "block": {"steps": 8, "samples": 16, "batch_size": 4},
    "end_to_end": {"trainable": "base", "steps": 16, "batch_size": 4},
    "precision": "float32",
}
RUN = """
import json, sys, torch
torch.set_num_threads(1)
from elastic_sparsity import optimize
from elastic_sparsity.config import make_recipe
from elastic_sparsity.workers import Workers
optimize(make_recipe(json.loads(sys.argv[1])), sys.argv[2])
Workers().close()
"""


def run(folder: Path, recipe: dict[str, Any], processes: int, name: str) -> dict[str, Any]:
    script, output = folder / "run.py", folder / name
    script.write_text(RUN)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(recipe), str(output)],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    config = json.loads((output / "elastic_config.json").read_text())
    return {"processes": processes, **json.loads((output / "run.json").read_text()), "training": config["training"]}


def masks_that_differ(one: Path, two: Path) -> tuple[int, int]:
    """(bytes of masks and positions that differ, bytes compared)."""
    from elastic_sparsity.tensor_file import TensorFile

    differing = compared = 0
    for path in one.glob("shell-*.safetensors"):
        first, second = TensorFile(path), TensorFile(two / path.name)
        for tensor in (name for name, (dtype, _) in first.specs.items() if dtype == "U8"):
            differing += int((first.read(tensor) != second.read(tensor)).sum())
            compared += first.read(tensor).numel()
    return differing, compared


def worst_ratio(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Largest relative difference of any training loss."""
    pairs = [(a[k], b[k]) for a, b in zip(one["block_losses"], two["block_losses"], strict=True) for k in a]
    pairs += [(value, two["end_to_end_kl"][k]) for k, value in one["end_to_end_kl"].items()]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def main(
    rounds: Annotated[int, typer.Option(help="Runs of each; the median is reported.", min=1)] = 3,
    output: Annotated[Path, typer.Option()] = HERE / "results" / "workers.json",
) -> None:
    """Print the table, write the JSON."""
    from elastic_sparsity.tiny import byte_tokenizer, tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model("llama", **SECTIONS).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        words = torch.randint(0, 5000, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
        (folder / "text.txt").write_text(" ".join(f"word{number}" for number in words))
        recipe = {**RECIPE, "model": {"id": str(folder / "model")}}
        recipe["calibration"] = {**RECIPE["calibration"], "source": str(folder / "text.txt")}
        found = {n: [run(folder, recipe, n, f"{n}-{i}") for i in range(rounds)] for n in (1, 2)}
        differing, compared = masks_that_differ(folder / "1-0", folder / "2-0")
    runs = {n: sorted(rows, key=lambda row: row["seconds"])[rounds // 2] for n, rows in found.items()}
    loss = worst_ratio(runs[1]["training"], runs[2]["training"])
    report(runs, differing, compared, loss, output, rounds)


def report(runs: dict[int, Any], differing: int, compared: int, loss: float, output: Path, rounds: int) -> None:
    """Table and JSON."""
    one, two = runs[1]["seconds"], runs[2]["seconds"]
    table = Table(title="one process against two, one thread each")
    for column in ("processes", "seconds", "speed-up", "MB exchanged a process", "peak MB a process"):
        table.add_column(column, justify="right")
    for n, row in runs.items():
        table.add_row(
            str(n), f"{row['seconds']:.1f}", f"{one / row['seconds']:.2f}", f"{row['traffic_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    # Amdahl on the two timings: what does not shrink is imports, scoring, saving and the exchange itself.
    fixed = max(0.0, 2 * two - one)
    model = {n: round(one / (fixed + (one - fixed) / n), 2) for n in (2, 4, 8)}
    console = Console()
    console.print(table)
    console.print(
        f"mask bytes that differ: {differing} of {compared}; largest relative difference of a loss: {loss:.1e}"
    )
    console.print(f"modelled speed-up (fixed part {fixed:.1f} s of {one:.1f} s): {model}")
    protocol = {
        "date": str(date.today()), "torch": torch.__version__, "elastic-sparsity": version("elastic-sparsity"),
        "device": platform.processor() or platform.machine(), "cores": os.cpu_count(), "seed": 0, "rounds": rounds,
        "model": SECTIONS,
        "recipe": RECIPE,
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE,
                                 check=False).stdout.strip(),
    }  # fmt: skip
    rows = [{k: v for k, v in row.items() if k != "training"} for row in runs.values()]
    result = {"protocol": protocol, "rows": rows, "mask_bytes": [differing, compared], "loss": loss, "model": model}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**result, "fixed_seconds": fixed}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
