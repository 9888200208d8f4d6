"""A model's shapes from its config.json alone: what a plan needs to know. No weight is read or made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.errors import ConfigError, ElasticSparsityError
from elastic_sparsity.files import is_file, is_folder
from elastic_sparsity.models import PACKAGED_MODELS, checked_config, config_of, packaged_model_folder
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.tiny import tiny_model
from elastic_sparsity.wiring import check_equal_blocks

_SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """A linear of a block: its path in there, and its sizes."""

    path: str
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShapes:
    """Numbers of a causal LM; all but the last count numbers, not bytes.

    Attributes:
        depth: decoder blocks; the largest one's sizes stand for all.
        width: of the hidden states.
        linears: those that become sparse, in the order in which data flows.
        block_other: weights of a block in no such linear (norms, biases).
        rest: weights in no block (embeddings, last norm, head).
        largest: the largest single tensor anywhere.
        norms: of a block, over its whole width; head_norms: whether queries and keys have some of their own.
        heads: attention heads; kv_heads: heads of keys and values; head_dim: width of one.
        has_weights: whether the weights are there to be read, on this machine.
        dtype: as the model loads it.
    """

    name: str
    depth: int
    width: int
    vocabulary: int
    linears: tuple[LinearShape, ...]
    block_other: int
    rest: int
    largest: int
    norms: int
    head_norms: bool
    heads: int
    kv_heads: int
    head_dim: int
    has_weights: bool
    dtype: torch.dtype

    @property
    def stored(self) -> int:
        """Bytes a number as the model loads it."""
        return self.dtype.itemsize

    @property
    def block_linears(self) -> int:
        """Weights of a block's linears."""
        return sum(linear.size for linear in self.linears)

    @property
    def block_sides(self) -> int:
        """Sum of outputs and inputs of a block's linears: numbers of an adapter of rank 1."""
        return sum(linear.outputs + linear.inputs for linear in self.linears)

    @property
    def largest_linear(self) -> int:
        return max(linear.size for linear in self.linears)

    @property
    def total(self) -> int:
        """All weights of the model."""
        return self.depth * (self.block_linears + self.block_other) + self.rest

    def input_widths(self) -> list[int]:
        """Widths of a block's different inputs; linears that read the same tensor count once."""
        widths: dict[str, int] = {}
        for linear in self.linears:
            name = linear.path.rpartition(".")[2]
            group = next((i for i, names in enumerate(_SAME_INPUT) if name in names), None)
            widths[name if group is None else f"group {group}"] = linear.inputs
        return list(widths.values())


def read_shapes(model_id: str, dtype: str = "auto", config_file: Path | None = None) -> ModelShapes:
    """Shapes of a model that a recipe may name, from its config.json.

    Args:
        model_id: as in a recipe; of a hub id only config.json is fetched.
        dtype: as in a recipe.
        config_file: a config.json to use instead of the model's.
    Raises: ConfigError: if there is no config, or it makes no causal LM. UnsupportedModelError: no table row.
    """
    if model_id.startswith("random:") and config_file is None:
        model = tiny_model(model_id.removeprefix("random:"))
        return _shapes_of(model, model_id, has_weights=True)
    source = f"model.id: {model_id!r}" if config_file is None else f"--config: {str(config_file)!r}"
    try:
        config = model_config(model_id, config_file)
        architecture_of(config.model_type)
        check_equal_blocks(config, source)
        stored = DTYPES[dtype] if dtype != "auto" else config.dtype or torch.float32
        if not isinstance(stored, torch.dtype):
            stored = DTYPES[str(stored)]
        model = _empty(config, stored)
        has_weights = config_file is None and any(_folder(model_id).glob("*.safetensors"))
        return _shapes_of(model, model_id, has_weights or is_file(model_id))
    except ElasticSparsityError:
        raise
    except Exception as error:  # transformers and the hub raise many types for one cause
        raise ConfigError(
            f"{source}: no config.json of a causal LM: {type(error).__name__}: {str(error).partition(chr(10))[0]} "
            "Name a folder or hub id with one, or give --config."
        ) from error


def _folder(model_id: str) -> Path:
    return packaged_model_folder(model_id) if model_id in PACKAGED_MODELS else Path(model_id)


def model_config(model_id: str, config_file: Path | None = None) -> Any:
    """transformers' config of a model, or of a config.json; may raise anything that transformers does.

    Raises: ConfigError: no such folder, or a file that names no model type.
    """
    from transformers import AutoConfig  # slow import, only here

    if config_file is not None:
        file = config_file / "config.json" if is_folder(config_file) else config_file
        if not is_file(file):  # a pipe would be waited for
            raise ConfigError(f"--config: {str(file)!r} is no file, and so no config.json of a causal LM.")
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise ConfigError(f"--config: {str(file)!r} names no model_type; give a Hugging Face config.json.")
        return config_of(raw, f"--config: {str(file)!r}")
    if model_id.startswith("random:"):
        return tiny_model(model_id.removeprefix("random:")).config
    if model_id.endswith(".gguf"):
        if not is_file(model_id):
            raise ConfigError(f"model.id: {model_id!r} is no file.")
        return AutoConfig.from_pretrained(Path(model_id).parent, gguf_file=Path(model_id).name)
    folder = _folder(model_id)
    if not is_folder(folder) and model_id.startswith((".", "/", "pypi:")):
        raise ConfigError(f"model.id: {model_id!r} is no folder.")
    return checked_config(folder if is_folder(folder) else model_id)


def shapes_model(model_id: str, config_file: Path | None = None) -> Any:
    """A causal LM for code that asks a model for shapes: every weight is one zero, expanded, which takes no memory.

    Call `read_shapes` first: it names what is wrong with a model or a config; here that raises what transformers does.
    """
    model = _empty(model_config(model_id, config_file), torch.float32)
    for module in model.modules():  # off the meta device, whose linears `wiring` refuses as not loaded
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def _empty(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM  # slow import, only here

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _shapes_of(model: Any, name: str, has_weights: bool) -> ModelShapes:
    blocks = decoder_blocks(model)
    row = architecture_of(model.config.model_type)
    block: nn.Module = max(blocks, key=_numbers)
    linears = [(path, *weight_OI(block.get_submodule(path)).shape) for path in row.linears]
    in_linears = sum(outputs * inputs for _, outputs, inputs in linears)
    config = model.config
    norms = [name.rpartition(".")[2] for name, module in block.named_modules() if not list(module.children())]
    head_norms = sum(name in ("q_norm", "k_norm") for name in norms)
    heads = config.num_attention_heads
    return ModelShapes(
        name=name,
        depth=len(blocks),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        linears=tuple(LinearShape(path=path, outputs=o, inputs=i) for path, o, i in linears),
        block_other=_numbers(block) - in_linears,
        rest=_numbers(model) - sum(_numbers(each) for each in blocks),
        largest=max(p.numel() for p in model.parameters()),
        norms=sum("norm" in name or name.startswith("ln_") for name in norms) - head_norms,
        head_norms=head_norms > 0,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        has_weights=has_weights,
        dtype=model.dtype,
    )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once
