"""Tiny random models of every supported family, and a byte tokenizer: for tests and the smoke recipe. No download."""

from typing import Any

import torch

from elastic_sparsity.arch import ARCHITECTURES, architecture_of

_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64},
}
# OPT-350M is the one post-LN OPT: norms after the residual, embeddings of another width, no final norm.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "ffn_dim": 64}),
}
TINY_FAMILIES: tuple[str, ...] = (*ARCHITECTURES, *_VARIANTS)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of two blocks and width 32 (see `TINY_FAMILIES`); `changes` go to its config.

    Raises: UnsupportedModelError: for a family without a table row.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # slow import, only here

    model_type, variant = _VARIANTS.get(family, (family, {}))
    architecture_of(model_type)
    fields = {**_SHARED, **_OVERRIDES.get(model_type, {}), **variant, **changes}
    if model_type in ("opt", "gpt2", "gpt_neox"):
        fields = {name: value for name, value in fields.items() if name not in ("num_key_value_heads", "head_dim")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
        for name, parameter in model.named_parameters():
            # Random norms and biases, so that a test that forgets one of them fails.
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes (ids 4 to 259), so that any text works without a vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # slow import, only here
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end|>", "<|u1|>", "<|u2|>", "<|u3|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )
