"""What other tools gain from a level's zeros: bytes, load and forward time of every export, against a dense model.

    python benchmarks/exports.py                                 # a random Llama made here, width 1024, 4 blocks
    python benchmarks/exports.py --checkpoint DIR --level 0.6    # one of yours

The dense model is the level's own with random values for its zeros, so sizes and costs are those of a dense model; it
is exported by the same code and measured in the same process, level and dense taking turns (median of --repeats).
Load opens a file that is in the page cache (llama.cpp's includes a first token); forward is 1 and 64 tokens, batch 1.
Two OpenVINO rows: as it is, and with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE below the level's share of zeros. llama.cpp
runs if xllamacpp is installed; its times are its own (a prompt of 64, and each token after it). Where the ratio is
about 1, zeros make nothing faster.
"""

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import exit_on_error
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from elastic_sparsity import ElasticCheckpoint, ElasticModel, load_packed, optimize
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.config import make_recipe
from elastic_sparsity.errors import ShapeError, UnsupportedModelError
from elastic_sparsity.exports import weight_bytes, write_format
from elastic_sparsity.files import write_json
from elastic_sparsity.preparing import versions
from elastic_sparsity.slicing import load_tokenizer
from elastic_sparsity.tiny import tiny_model

HERE = Path(__file__).parent
LIBRARIES = ("onnx", "onnxruntime", "openvino", "gguf", "xllamacpp")
WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip
TOKENS = (1, 64)
RATE = "0.4"  # below the zeros of every level measured here
Forward = Callable[[int], Any]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges learned from this file, which llama.cpp can read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def make_checkpoint(folder: Path) -> Path:
    """Untrained: bytes and times depend on shapes and the number of zeros only."""
    tiny_model("llama", **WIDE).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    recipe = {
        "model": {"id": str(folder / "base")},
        "calibration": {"source": "self", "samples": 1, "length": 16},
        "ladder": {"sparsities": [0.7], "patterns": ["2:4"]},
        "scores": {"method": "magnitude"},
        "block": {"steps": 0, "samples": 1, "batch_size": 1},
        "end_to_end": {"trainable": "off"},
        "checkpoint": {"dtype": "bfloat16"},
    }
    optimize(make_recipe(recipe), folder / "checkpoint")
    return folder / "checkpoint"


@torch.no_grad()
def filled(model: Any, names: list[str]) -> Any:
    """A dense model of the same cost: random values where the level has zeros."""
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        weight = weight_OI(dense.get_submodule(name))
        noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
        weight.copy_(torch.where(weight == 0, noise.to(weight.dtype), weight))
    return dense


def ids(tokens: int) -> np.ndarray:
    return np.arange(4, 4 + tokens, dtype=np.int64)[None] % 250 + 4


def open_torch(folder: Path) -> Forward:
    packed = any(folder.glob("*bitmask*")) or any(folder.glob("packed*"))
    model = load_packed(folder) if packed else AutoModelForCausalLM.from_pretrained(folder)
    return lambda tokens: model(torch.from_numpy(ids(tokens)), use_cache=False).logits.sum().item()


def open_onnx(folder: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(None, {"input_ids": ids(tokens), "attention_mask": np.ones_like(ids(tokens))})


def open_openvino(folder: Path, rate: str | None = None) -> Forward:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    if rate is not None:
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = rate
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)
    return lambda tokens: compiled({"input_ids": ids(tokens), "attention_mask": np.ones_like(ids(tokens))})


def open_llama_cpp(folder: Path) -> Forward:
    """llama.cpp reports its own times; a call returns milliseconds a prompt, or a generated token."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 256, 1, -1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)
    server.handle_completions({"prompt": [5], "max_tokens": 1})  # one dropped before its loop runs would never end

    def forward(tokens: int) -> float:
        request = {"prompt": ids(64)[0].tolist(), "max_tokens": 16, "ignore_eos": True, "cache_prompt": False}
        timings = server.handle_completions(request)["timings"]
        return (timings["predicted_per_token_ms"] if tokens == 1 else timings["prompt_ms"]) / 1000

    return forward


def seconds_of(call: Callable[[], Any], own_time: bool = False) -> float:
    begin = time.perf_counter()
    result = call()
    return result if own_time else time.perf_counter() - begin


@torch.no_grad()
def measure(folders: dict[str, Path], opener: Callable[[Path], Forward], repeats: int, own_time: bool) -> dict:
    """Medians of load and forward for "level" and "dense", which take turns."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in folders}
    for folder in folders.values():
        opener(folder)  # reads the file, compiles what is compiled once
    for _ in range(max(3, repeats // 3)):
        for name, folder in folders.items():
            found[name].setdefault("load", []).append(seconds_of(lambda f=folder: opener(f)))
    opened = {name: opener(folder) for name, folder in folders.items()}
    for tokens in TOKENS:
        for round_number in range(repeats + 2):
            for name, forward in opened.items():
                taken = seconds_of(lambda f=forward, t=tokens: f(t), own_time)
                if round_number >= 2:
                    found[name].setdefault(f"forward_{tokens}", []).append(taken)
    return {name: {key: statistics.median(times) for key, times in row.items()} for name, row in found.items()}


def show(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    columns = ("bytes", "load", *(f"{tokens} tokens" for tokens in TOKENS))
    for column in ("export", "consumer", *columns):
        table.add_column(column, justify="left" if column in ("export", "consumer") else "right")
    for row in rows:
        level, dense = row["level"], row["dense"]
        size = f"{level['bytes'] / 1e6:.1f} MB ({level['bytes'] / dense['bytes']:.2f}x)"
        times = [
            f"{1000 * level[key]:.1f} ms ({level[key] / dense[key]:.2f}x)"
            for key in ("load", *(f"forward_{tokens}" for tokens in TOKENS))
        ]
        table.add_row(row["export"], row["consumer"], size, *times)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an elastic checkpoint; default: a random one made here")
    parser.add_argument("--level", default="0.7")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "exports.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ways: list[tuple[str, str, str, torch.dtype, Callable[[Path], Forward], bool]] = [
        ("transformers", "transformers", "transformers", torch.bfloat16, open_torch, False),
        ("bitmask", "bitmask", "load_packed", torch.bfloat16, open_torch, False),
        ("onnx", "onnx", "ONNX Runtime", torch.float32, open_onnx, False),
        ("openvino", "openvino", "OpenVINO", torch.float32, open_openvino, False),
        ("openvino", "openvino", f"OpenVINO, rate {RATE}", torch.float32, lambda f: open_openvino(f, RATE), False),
    ]
    if importlib.util.find_spec("xllamacpp"):
        ways.append(("gguf", "gguf", "llama.cpp", torch.bfloat16, open_llama_cpp, True))
    rows, rows_left_out = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        source = args.checkpoint or make_checkpoint(work)
        checkpoint, tokenizer = ElasticCheckpoint(source), load_tokenizer(source)
        names = list(checkpoint.linears)
        if "2:4" in checkpoint.ladder.patterns:
            ways.insert(2, ("packed-2of4", "packed-2of4", "load_packed", torch.bfloat16, open_torch, False))
        for export, format, consumer, dtype, opener, own_time in ways:
            level = "2:4" if format == "packed-2of4" else args.level
            folders = {name: work / f"{format}-{name}" for name in ("level", "dense")}
            if not folders["level"].exists():
                pruned = ElasticModel.from_pretrained(source, level, dtype=dtype)
                try:
                    for name, model in (("level", pruned), ("dense", filled(pruned, names))):
                        folders[name].mkdir()
                        # No dense model fits a packed format: there, dense is the plain folder.
                        plain = format == "transformers" or (name == "dense" and format in ("bitmask", "packed-2of4"))
                        if plain:
                            model.save_pretrained(folders[name])
                        else:
                            write_format(model, tokenizer, names, format, dtype, folders[name])
                except (UnsupportedModelError, ShapeError) as error:
                    rows_left_out[export] = str(error)
                    continue
                finally:
                    del pruned
            found = measure(folders, opener, args.repeats, own_time)
            for name, folder in folders.items():
                found[name]["bytes"] = weight_bytes(folder)
            rows.append({"export": export, "consumer": consumer, "level_name": level, "dtype": str(dtype), **found})
            print(json.dumps(rows[-1]), flush=True)
        what = str(args.checkpoint) if args.checkpoint else "random Llama, width 1024, 4 blocks"
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "seed": 0,
        "model": what,
        "level": args.level,
        "repeats": args.repeats,
        "versions": {**versions(), **{name: _version(name) for name in LIBRARIES}},
        "rows": rows,
        "left_out": rows_left_out,
    }
    title = f"{what}, level {args.level} (packed-2of4: 2:4), {args.threads} thread; ratios to the dense model"
    Console(width=140).print(show(rows, title))
    for export, reason in rows_left_out.items():
        print(f"{export}: left out: {reason}")
    write_json(args.output, result)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    exit_on_error(main)
