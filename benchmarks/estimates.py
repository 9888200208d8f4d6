"""What the device profiles predict for packed levels against dense, at batch 1. Estimates: nothing is measured.

python benchmarks/estimates.py                    # LLaMA-7B's layer shapes at random, 2 blocks, made here
python benchmarks/estimates.py --checkpoint DIR   # one of yours
"""

import argparse
import tempfile
from pathlib import Path

from cells import exit_on_error
from format import LEVELS
from rich.console import Console
from rich.table import Table
from size import LLAMA_7B, make_checkpoint, random_llama

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.device_profile import predict, read_profile

PROFILES = ("laptop-avx2", "server-avx512", "server-amx", "phone", "gpu-datacenter")


def speedup(checkpoint: ElasticCheckpoint, profile_name: str, level_name: str) -> str:
    """The fastest way that uses the zeros against the fastest dense one."""
    profile, level = read_profile(profile_name), checkpoint.find(level_name)
    ways = [
        name for name, entry in profile.ways.items() if entry.runtime != "semi_structured" or level.pattern == (2, 4)
    ]
    ms = {name: predict(profile, checkpoint, level, name).ms_per_token for name in ways}
    dense = min(value for name, value in ms.items() if name.startswith("dense"))
    sparse = [value for name, value in ms.items() if not name.startswith("dense")]
    return f"{dense / min(sparse):.2f}x" if sparse else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    table = Table(title="estimated, not measured: packed or 2:4 against dense, batch 1")
    for column in ("profile", *LEVELS):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch) / "elastic"
        if args.checkpoint is None:
            make_checkpoint(folder, str(random_llama(Path(scratch) / "dense", LLAMA_7B)))
        checkpoint = ElasticCheckpoint(folder)
        for name in PROFILES:
            table.add_row(name, *(speedup(checkpoint, name, level) for level in LEVELS))
    Console().print(table)


if __name__ == "__main__":
    exit_on_error(main)
