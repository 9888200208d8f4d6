"""One level of an elastic checkpoint in the formats of other tools, and what each of them gains from the zeros."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import ConfigError, LevelError, brief
from elastic_sparsity.export_gguf import check_gguf, write_gguf
from elastic_sparsity.export_onnx import check_onnx, check_openvino, write_onnx, write_openvino
from elastic_sparsity.files import atomic_folder, check_output_folder
from elastic_sparsity.hub import checkpoint_folder
from elastic_sparsity.ladder import AnyLevel
from elastic_sparsity.packed_files import write_bitmask, write_packed_2of4
from elastic_sparsity.placement import resolve_dtype
from elastic_sparsity.precision import dtype_name
from elastic_sparsity.slicing import ElasticModel, load_tokenizer

_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Attributes:
    dtypes: that can be written; the first is the default unless `keeps_dtype`.
    keeps_dtype: by default, write the checkpoint's own dtype.
    check: raises ConfigError if a library is missing.
    has_config: config.json and tokenizer lie beside the weights.
    consumer: what a user does with it, and whether its zeros make anything faster.
    """

    dtypes: tuple[str, ...]
    keeps_dtype: bool
    check: Callable[[], None]
    has_config: bool
    consumer: str


FORMATS: dict[str, Format] = {
    "bitmask": Format(
        dtypes=("bfloat16", "float16", "float32"),
        keeps_dtype=True,
        check=lambda: None,
        has_config=True,
        consumer="load_packed restores the dense model bit for bit and computes dense; no faster by itself.",
    ),
    "packed-2of4": Format(
        dtypes=_HALVES,
        keeps_dtype=True,
        check=lambda: None,
        has_config=True,
        consumer="packed and meta are what CUTLASS multiplies with on NVIDIA GPUs from Ampere on, faster only at large "
        "batches (measure: semi_structured.time_2of4); elsewhere load_packed restores the dense model.",
    ),
    "onnx": Format(
        dtypes=("float32", "float16"),
        keeps_dtype=False,
        check=check_onnx,
        has_config=True,
        consumer="ONNX Runtime multiplies with the zeros too: no smaller and no faster.",
    ),
    "openvino": Format(
        dtypes=("float32", "float16"),
        keeps_dtype=False,
        check=check_openvino,
        has_config=True,
        consumer="OpenVINO multiplies with the zeros too: no smaller and no faster.",
    ),
    "gguf": Format(
        dtypes=("bfloat16", "float16", "float32"),
        keeps_dtype=True,
        check=check_gguf,
        has_config=False,
        consumer="llama.cpp multiplies with the zeros too: no smaller and no faster.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written.

    Attributes:
        bytes: of the files that hold weights.
        dense_bytes: the model's parameters, each once, in the dtype written.
        stays_dense: linears a packed format could not pack.
        gain: one sentence: bytes against dense, and whether the consumer is faster for the zeros.
    """

    format: str
    level: str
    dtype: str
    folder: Path
    bytes: int
    dense_bytes: int
    stays_dense: tuple[str, ...]
    gain: str


def export_level(
    path: str | Path,
    level: str | float,
    output: str | Path,
    format: str = "onnx",
    *,
    dtype: torch.dtype | str | None = None,
    **hub: Any,
) -> Export:
    """Writes one level for another tool: bitmask, packed-2of4, onnx, openvino or gguf. (`save_sliced`: transformers.)

    Args:
        path: folder or hub id of an elastic checkpoint.
        level: 0.6, "60%", "2:4", "structured-0.5" or "auto"; packed-2of4 takes 2:4 only, bitmask no structured one.
        output: folder to make.
        dtype: of the weights; None = float32 for onnx and openvino, else the checkpoint's.
    Raises: ConfigError: unknown format, a dtype it does not have, or a library that is missing, naming what to install.
        LevelError: outside the ladder, or not 2:4. UnsupportedModelError: the format cannot hold this architecture or
        tokenizer. ShapeError: no linear fits packed-2of4. CheckpointError. OutputError: `output` is taken.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ConfigError(
            f"format {brief(format)}: not one of {', '.join(FORMATS)}; a plain Hugging Face folder is made by `slice`."
        )
    row = FORMATS[format]
    row.check()
    check_output_folder(Path(output))
    folder = checkpoint_folder(path, level, **hub)
    checkpoint = ElasticCheckpoint(folder)
    chosen = checkpoint.find(level)
    if format in ("bitmask", "packed-2of4"):
        chosen = checkpoint.find_masked(level, f"format {format}")
    if format == "packed-2of4" and getattr(chosen, "pattern", None) != (2, 4):
        has = ", ".join(x.name for x in checkpoint.ladder.levels if x.pattern == (2, 4)) or "none"
        raise LevelError(f"level {chosen.name}: packed-2of4 holds 2:4 levels only; this ladder has: {has}.")
    wanted = _dtype(format, dtype, checkpoint.dtype)
    checkpoint.check_extras()
    tokenizer = load_tokenizer(folder)
    model = ElasticModel.from_pretrained(folder, chosen.name, dtype=torch.float32 if format == "openvino" else wanted)
    with atomic_folder(Path(output)) as scratch:
        stays_dense = write_format(model, tokenizer, list(checkpoint.linears), format, wanted, scratch)
    return _describe(format, chosen, wanted, Path(output), model, stays_dense)


def _dtype(format: str, asked: torch.dtype | str | None, stored: torch.dtype) -> torch.dtype:
    row = FORMATS[format]
    default = stored if row.keeps_dtype else getattr(torch, row.dtypes[0])
    found = resolve_dtype(asked, default)
    name = dtype_name(found)
    if name not in row.dtypes:
        whose = "the checkpoint's" if asked in (None, "auto") else "asked for"
        raise ConfigError(f"format {format}: dtype {name} ({whose}) is not one of {', '.join(row.dtypes)}; name one.")
    return found


def write_format(
    model: Any, tokenizer: Any, names: list[str], format: str, dtype: torch.dtype, folder: Path
) -> list[str]:
    """Writes a transformers model, pruned or not, into a folder that exists; see `export_level`.

    Args:
        names: the linears that packed formats pack.
    Returns: those of them that stay dense.
    """
    stays_dense: list[str] = []
    if format == "bitmask":
        write_bitmask(model, names, folder)
    elif format == "packed-2of4":
        stays_dense = write_packed_2of4(model, names, folder)
    elif format == "onnx":
        write_onnx(model, folder)
    elif format == "openvino":
        write_openvino(model, folder, half=dtype == torch.float16)
    else:
        write_gguf(model, tokenizer, folder)
    if FORMATS[format].has_config:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return stays_dense


WEIGHT_FILES = ("*.safetensors", "*.onnx", "*.onnx.data", "*.xml", "*.bin", "*.gguf")


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(path.stat().st_size for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def _describe(
    format: str, level: AnyLevel, dtype: torch.dtype, folder: Path, model: Any, stays_dense: list[str]
) -> Export:
    size = weight_bytes(folder)
    dense = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    name = dtype_name(dtype)
    share = f"{size:,} bytes, {100 * size / dense:.0f} % of the dense {name} model's {dense:,}"
    note = f" {len(stays_dense)} linears stay dense: the kernels do not take their shape." if stays_dense else ""
    return Export(
        format=format,
        level=level.name,
        dtype=name,
        folder=folder,
        bytes=size,
        dense_bytes=dense,
        stays_dense=tuple(stays_dense),
        gain=f"{share}; {FORMATS[format].consumer}{note}",
    )
