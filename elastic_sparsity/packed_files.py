"""A level without its zeros: the folders `bitmask` and `packed-2of4`, and reading them back bit for bit.

The tensors lie in a file that is not called model.safetensors, and config.json says nothing of sparsity: transformers
would else fill the linears at random, and vLLM refuses a config it does not know. Both read a plain folder instead.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_sparsity.arch import architecture_of, config_object, is_transposed, weight_OI
from elastic_sparsity.bitmask import PARTS, compress, restore
from elastic_sparsity.errors import CheckpointError, ShapeError, UnsupportedModelError
from elastic_sparsity.files import is_file
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.semi_structured import fits_kernel, pack_2of4, unpack_2of4
from elastic_sparsity.sized import causal_lm, generation_config

BITMASK_FILE = "bitmask.safetensors"
PACKED_FILE = "packed-2of4.safetensors"


def write_bitmask(model: Any, names: Iterable[str], folder: Path) -> None:
    """`bitmask.safetensors`: four tensors for each named linear (see `bitmask`), every other parameter as it is."""
    tensors = _parameters(model)
    for name in names:
        parts = compress(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / BITMASK_FILE, metadata={"format": "pt"})


def write_packed_2of4(model: Any, names: Iterable[str], folder: Path) -> list[str]:
    """`packed-2of4.safetensors`: `NAME.packed` and `NAME.meta` for each linear (as (O, I)), all else as it is.

    Returns: linears that stay dense, because the GPU's kernels do not take their shape.
    Raises: ShapeError: if none fits, or one is not 2:4.
    """
    tensors, dense, names = _parameters(model), [], list(names)
    for name in names:
        weight = weight_OI(model.get_submodule(name)).detach()
        if not fits_kernel(tuple(weight.shape), weight.dtype):
            dense.append(name)
            continue
        del tensors[f"{name}.weight"]
        try:
            tensors[f"{name}.packed"], tensors[f"{name}.meta"] = pack_2of4(weight)
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None
    if len(dense) == len(names):
        shape = tuple(weight_OI(model.get_submodule(names[0])).shape)
        raise ShapeError(
            f"packed-2of4: none of the {len(names)} linears fits the GPU's kernels, first {names[0]} with {shape} "
            f"{weight.dtype}; they take float16 or bfloat16 in multiples of (32, 64)."
        )
    save_file(tensors, folder / PACKED_FILE, metadata={"format": "pt"})
    return dense


def _parameters(model: Any) -> dict[str, Tensor]:
    """Every parameter once, also tied ones."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


@torch.inference_mode(False)
def load_packed(folder: str | Path) -> Any:
    """The level in a folder of format `bitmask` or `packed-2of4`, as its ordinary transformers model in eval mode.

    Every weight has the bits it had before the export.

    Raises: CheckpointError: no such folder, or it is damaged.
    """
    from accelerate import init_empty_weights  # slow import, only here

    folder = Path(folder)
    path = next((folder / name for name in (BITMASK_FILE, PACKED_FILE) if is_file(folder / name)), None)
    if path is None:
        raise CheckpointError(f"{folder}: holds neither {BITMASK_FILE} nor {PACKED_FILE}; export a level first.")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; export the level again.") from error
    floats = [tensor.dtype for tensor in stored.values() if tensor.dtype in DTYPES.values()]
    dtype = statistics.mode(floats or [torch.float32])  # all parameters have one: another one's tensor is the wrong one
    try:
        config = _read_config(folder)
        generation = generation_config(folder)
        with init_empty_weights():
            model = causal_lm(config, dtype)
    except UnsupportedModelError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    except Exception as error:  # transformers raises many types for one cause
        raise CheckpointError(
            f"{folder}: config.json or generation_config.json does not make a model: {type(error).__name__}: {error}."
        ) from error
    model.tie_weights()
    transposed = {name for name, module in model.named_modules() if is_transposed(module)}
    state = _unpack(stored, path, transposed)
    expected = {name: _kind(parameter) for name, parameter in model.named_parameters()}
    found = {name: _kind(tensor) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit config.json, first {wrong[0]}: "
            f"found {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _unpack(stored: Mapping[str, Tensor], path: Path, transposed: set[str]) -> dict[str, Tensor]:
    """Dense parameters from a file's tensors. `packed` is (O, I) also for `transposed` modules, which have (I, O)."""
    is_packed = path.name == PACKED_FILE
    parts, dense = (("packed", "meta"), _unpack_parts) if is_packed else (PARTS, restore)
    first = parts[0]
    names = [key.removesuffix(f".{first}") for key in stored if key.endswith(f".{first}")]
    state = dict(stored)
    for name in names:
        held = {part: state.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in state}
        try:
            weight = dense(held)
        except ShapeError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
        state[f"{name}.weight"] = weight.T.contiguous() if is_packed and name in transposed else weight
    return state


def _unpack_parts(parts: Mapping[str, Tensor]) -> Tensor:
    if "meta" not in parts:
        raise ShapeError("no meta; a packed 2:4 weight has packed and meta.")
    return unpack_2of4(parts["packed"], parts["meta"])


def _read_config(folder: Path) -> Any:
    """config.json as transformers' object, without running or fetching any code it may name."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture_of(raw["model_type"])
    return config_object(raw)
