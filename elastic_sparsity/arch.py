"""Which architectures are supported, as a table: where the decoder blocks live and which linears get sparsified.

Embeddings, norms, biases and the head stay dense. Fused projections (Phi-3's qkv, GPT-NeoX's query_key_value) are one
linear: sparsity is per output row, so fusing changes nothing. GPT-2 keeps its weights transposed (`Conv1D`).
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import ConfigError, NumericsError, UnsupportedModelError, brief


@dataclass(frozen=True, slots=True)
class Architecture:
    """Attributes:
    blocks: path of the decoder blocks' `ModuleList` from the causal LM.
    linears: paths inside a block, in the order in which data flows.
    begins_with_bos: whether the model is lost on text without a begin-of-text token in front; others do without.
    """

    blocks: str
    linears: tuple[str, ...]
    begins_with_bos: bool = False


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GLU = Architecture("model.layers", (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _GLU,
    "mistral": _GLU,
    "qwen2": _GLU,
    "qwen3": _GLU,
    "gemma2": replace(_GLU, begins_with_bos=True),
    "gemma3_text": replace(_GLU, begins_with_bos=True),
    "phi3": Architecture(
        "model.layers", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "opt": Architecture("model.decoder.layers", (*_ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2")),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": Architecture("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}


def architecture_of(model_type: Any) -> Architecture:
    """The table row.

    Raises: UnsupportedModelError: listing the supported model types.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model type {brief(model_type)} has no row in the architecture table; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


# Fields of config.json that make transformers fetch and run a kernel, or list as many labels as they say.
_IGNORED = ("attn_implementation", "_attn_implementation", "num_labels")


def config_object(raw: Mapping[str, Any]) -> Any:
    """A config.json of a known family as transformers' object. AutoConfig would offer to run code that it names."""
    from transformers import AutoConfig  # slow import, only here

    return AutoConfig.for_model(**{key: value for key, value in raw.items() if key not in _IGNORED})


def is_transposed(linear: nn.Module) -> bool:
    """True for GPT-2's `Conv1D`, whose weight is stored (inputs, outputs)."""
    return type(linear).__name__ == "Conv1D"


def weight_OI(linear: nn.Module) -> Tensor:
    """The weight as (outputs, inputs); a view, so writing to it changes the linear."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if is_transposed(linear) else weight


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, checked against the table row.

    Raises: UnsupportedModelError: naming the module that is missing or is no linear.
    """
    row = architecture_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    blocks = model.get_submodule(row.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModelError(f"{row.blocks}: expected a non-empty ModuleList, found {type(blocks).__name__}.")
    for index, block in enumerate(blocks):
        present = dict(block.named_modules())
        for path in row.linears:
            found = present.get(path)
            if not (isinstance(found, nn.Linear) or (found is not None and is_transposed(found))):
                raise UnsupportedModelError(
                    f"{row.blocks}.{index}.{path}: expected a linear layer, found {type(found).__name__}; "
                    f"this is not the {model.config.model_type} the table knows."  # type: ignore[union-attr]
                )
    return blocks


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """All linears that get sparsified, by name, in the order in which data flows.

    Raises: as `decoder_blocks` does.
    """
    row = architecture_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return {
        f"{row.blocks}.{index}.{path}": block.get_submodule(path)
        for index, block in enumerate(decoder_blocks(model))
        for path in row.linears
    }


def function_config(config: Any) -> dict[str, Any]:
    """All of a model's config that what it computes may depend on, as plain data: not its name, dtype or version."""
    plain = json.loads(config.to_json_string(use_diff=False))
    without = {"dtype", "torch_dtype", "transformers_version", "architectures"}
    return {key: value for key, value in plain.items() if key not in without and not key.startswith("_")}


def first_token(config: Any, tokenizer: Any) -> int | None:
    """The token that all samples and windows of a model begin with; None = as the text goes on.

    Only where the architecture is lost without (Gemma): others are measured without any, as the field's figures are.

    Raises: ConfigError: if the tokenizer has no such token.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None or not row.begins_with_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError(f"tokenizer: has no bos_token, which text for {config.model_type} begins with; set it there.")
    return int(tokenizer.bos_token_id)


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


def check_finite_weights(model: nn.Module) -> None:
    """Raises: NumericsError: listing every parameter that holds NaN or infinity."""
    bad = not_finite(model)
    if bad:
        raise NumericsError(
            f"base model: {len(bad)} parameters hold NaN or infinity: {', '.join(bad[:5])}"
            f"{', ...' if len(bad) > 5 else ''}; download or convert the model again."
        )


def head_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Final hidden states (..., D) to logits (..., V), exactly as the causal LM computes them (Gemma's soft cap too).

    Under autocast the frozen head is cast once, here, instead of at every call.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    device_type = next(head.parameters()).device.type
    if torch.is_autocast_enabled(device_type):
        head = copy.deepcopy(head).to(torch.get_autocast_dtype(device_type)).requires_grad_(False)
    cap = getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        raw: Tensor = head(hidden.to(next(head.parameters()).dtype))
        return raw if cap is None else torch.tanh(raw / cap) * cap

    return logits
