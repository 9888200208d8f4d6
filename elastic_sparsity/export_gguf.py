"""A model as one GGUF file for llama.cpp, with the names and orders that its own converter uses.

Names come from the gguf package's tables. What the converter changes on the way, and this module too: Llama and
Mistral have every head's rows of q and k in pairs (i, i + half) instead of halves; GPT-2's weights are turned to
(outputs, inputs); GPT-NeoX's heads of q, k, v become q, then k, then v; vectors are float32; Llama 3's scaled rotary
frequencies become a tensor of factors (which transformers' own GGUF reader ignores). Only what was run in llama.cpp is
here: other architectures, other scaled positions, short sliding windows and SentencePiece tokenizers are refused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import is_transposed
from elastic_sparsity.errors import ConfigError, UnsupportedModelError
from elastic_sparsity.gguf_vocab import add_vocabulary, byte_level_vocabulary
from elastic_sparsity.wiring import check_equal_blocks

GGUF_FILE = "model.gguf"
# Our model types: llama.cpp's name of the same computation, and the activation it computes whatever config.json says.
ARCHITECTURES = {
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "phi3": ("phi3", "silu"),
    "gpt2": ("gpt2", "gelu_new"),
    "gpt_neox": ("gptneox", "gelu"),
}
_OTHER_WAY = "write a plain folder with `slice` and try llama.cpp's convert_hf_to_gguf.py on it"


def check_gguf() -> None:
    """Raises: ConfigError: if gguf is missing."""
    try:
        import gguf  # noqa: F401  slow import, only here
    except ImportError:
        raise ConfigError("format gguf: needs the gguf package: pip install 'gguf>=0.17'.") from None


def write_gguf(model: Any, tokenizer: Any, folder: Path) -> None:
    """`model.gguf`, matrices in the model's dtype.

    Raises: UnsupportedModelError: an architecture, a setting of it, or a tokenizer that this writer does not know.
    """
    import gguf  # slow import, only here

    arch = check_supported(model.config)
    vocabulary = byte_level_vocabulary(tokenizer, model.config.vocab_size)  # before anything is written
    types = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    kind, file_type = types[model.dtype]
    writer = gguf.GGUFWriter(folder / GGUF_FILE, arch)
    writer.add_name(
        "elastic_sparsity level"
    )  # llama.cpp and transformers read meaning into names like "phi3", "mistral"
    writer.add_file_type(file_type)
    _add_sizes(writer, model.config)
    add_vocabulary(writer, vocabulary)
    keys = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[arch], model.config.num_hidden_layers)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, part = name.rpartition(".")
        found = names.get_name(owner)
        if found is None:
            raise UnsupportedModelError(f"format gguf: {name}: llama.cpp's {arch} has no such tensor; {_OTHER_WAY}.")
        tensor = parameter.detach().cpu()
        tensor = _reorder(
            tensor.T if part == "weight" and is_transposed(modules[owner]) else tensor, name, model.config
        )
        chosen = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(tensor.float().contiguous().numpy(), chosen)
        writer.add_tensor(f"{found}.{part}", array, raw_dtype=chosen)
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(model).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_supported(config: Any) -> str:
    """llama.cpp's name of the architecture.

    Raises: UnsupportedModelError: saying what is not supported and what is.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"format gguf: model type {kind!r} is not one of {', '.join(ARCHITECTURES)}; {_OTHER_WAY}."
        )
    check_equal_blocks(config, "format gguf")
    arch, activation = ARCHITECTURES[kind]
    expected: dict[str, tuple[Any, Any]] = {
        "hidden_act": (getattr(config, "hidden_act", None) or config.activation_function, activation),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
    }
    if kind not in ("qwen2", "gpt2", "gpt_neox"):
        expected["attention_bias"] = (getattr(config, "attention_bias", False), False)
    if kind == "gpt2":  # other scales of attention, for which GGUF has no key
        expected |= {
            "scale_attn_weights": (config.scale_attn_weights, True),
            "scale_attn_by_inverse_layer_idx": (config.scale_attn_by_inverse_layer_idx, False),
        }
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        longest = config.max_position_embeddings
        expected["sliding_window"] = (window, window if window >= longest else f"none, or at least {longest}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "llama3" or kind not in ("llama", "mistral"):
        expected["rope_type"] = (rope, "default")
    for field, (found, wanted) in expected.items():
        if found != wanted:
            raise UnsupportedModelError(
                f"format gguf: {field} {found!r} of this {kind} is not supported, expected {wanted}; {_OTHER_WAY}."
            )
    return arch


def _add_sizes(writer: Any, config: Any) -> None:
    hidden, heads = config.hidden_size, config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * hidden)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or hidden // heads
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(width * share))
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(0)


def _rope_factors(model: Any) -> Tensor:
    """By what llama.cpp divides each rotary frequency: the unscaled one over the model's own, (head width / 2,)."""
    scaled = model.get_submodule("model.rotary_emb").inv_freq.float().cpu()
    steps = torch.arange(scaled.numel(), dtype=torch.float32) / scaled.numel()
    return model.config.rope_parameters["rope_theta"] ** -steps / scaled


def _reorder(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Rows in llama.cpp's order."""
    kind = config.model_type
    if kind in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if kind == "gpt_neox" and ".query_key_value." in name:
        parts = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return parts.transpose(0, 1).reshape(tensor.shape)
    return tensor
