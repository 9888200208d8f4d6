"""How the parts of a decoder block are connected, as a table, and which channel of a linear belongs to which head.

What `absorption` and `rotation` fold is decided here: an architecture is a row, and whatever a config can change
(grouped-query heads, partial rotary, biases, OPT-350M's post-LN) is read from the config or the block itself.
Letters: K key/value heads, R queries that share one of them, C channels of a head.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, is_transposed, weight_OI
from elastic_sparsity.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """One row. Paths are inside a block, those of `embeddings` and `final_norm` from the causal LM.

    Attributes:
    attention_norm, mlp_norm: the norm whose output only the attention (or MLP) reads. "" = there is none (post-LN).
    post_norms: norms on a branch's output, before it is added to the residual stream; or of it (post-LN).
    query, key, value: the same path three times if fused; see `fused`.
    fused: "" = apart, "blocks" = all of Q, then K, then V, "heads" = q, k, v of one head after the other.
    gate: of a GLU; "" if `up` is a plain MLP's first linear. Equal to `up` if fused, the gate first.
    activation: the config's field that names the MLP's activation.
    rotary: which channels of a head RoPE turns: "all", "partial" (the config's share, the first ones) or "none".
    head_norms: norms on the queries and keys of every head.
    gain_offset: what a norm adds to its stored gain (Gemma: 1).
    embeddings: token embeddings first, then learned positions.
    width_field: the config's field for the MLP's intermediate channels.
    free_heads: whether the config can say that there are fewer heads of the same size.
    attention_bias, mlp_bias: the config's field that gives every linear of the branch a bias; "" = there is none.
    """

    attention_norm: str
    mlp_norm: str
    post_norms: tuple[str, ...] = ()
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    fused: str = ""
    out: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "hidden_act"
    rotary: str = "all"
    head_norms: tuple[str, ...] = ()
    gain_offset: float = 0.0
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    width_field: str = "intermediate_size"
    free_heads: bool = True
    attention_bias: str = ""
    mlp_bias: str = ""

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """The linears that read the attention's norm, each once."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The linears that read the MLP's norm, each once."""
        return tuple(dict.fromkeys(path for path in (self.gate, self.up) if path))


_LLAMA = Wiring(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_GEMMA2 = replace(
    _LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    activation="hidden_activation",
    gain_offset=1.0,
    attention_bias="attention_bias",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

WIRINGS: dict[str, Wiring] = {
    "llama": replace(_LLAMA, attention_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, head_norms=_HEAD_NORMS, attention_bias="attention_bias"),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norms=_HEAD_NORMS),
    "phi3": replace(
        _LLAMA,
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        fused="blocks",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        rotary="partial",
    ),
    "opt": Wiring(
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        out="self_attn.out_proj",
        gate="",
        up="fc1",
        down="fc2",
        activation="activation_function",
        rotary="none",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        width_field="ffn_dim",
        free_heads=False,
    ),
    "gpt_neox": Wiring(
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        fused="heads",
        out="attention.dense",
        gate="",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        rotary="partial",
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        free_heads=False,
    ),
    "gpt2": Wiring(
        attention_norm="ln_1",
        mlp_norm="ln_2",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        fused="blocks",
        out="attn.c_proj",
        gate="",
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="activation_function",
        rotary="none",
        embeddings=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        width_field="n_inner",
        free_heads=False,
    ),
}


SIZES_FIELD = "elastic_sizes"  # of a config, see sized.py


def check_equal_blocks(config: Any, what: str) -> None:
    """Raises: UnsupportedModelError: a model whose blocks differ in size, of which `what` cannot be done."""
    if getattr(config, SIZES_FIELD, None) is not None:
        raise UnsupportedModelError(
            f"{what}: this model's blocks differ in heads and channels ({SIZES_FIELD} in its config.json); take the "
            "model it was made of."
        )


def wiring_of(config: Any) -> Wiring:
    """The row of a model's config.

    Raises: UnsupportedModelError: listing the supported model types.
    """
    architecture_of(config.model_type)
    row = WIRINGS[config.model_type]
    if getattr(config, "do_layer_norm_before", True):
        return row
    # OPT-350M: the norms sit on the residual stream itself, so that nothing but the next sum reads them alone.
    return replace(row, attention_norm="", mlp_norm="", post_norms=(row.attention_norm, row.mlp_norm), final_norm="")


def num_groups(config: Any) -> int:
    """Key/value heads that a config gives every block, each with all its query heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    """A linear of the block whose function its weight and bias alone decide. May be a `Conv1D`, which has both too.

    Raises: UnsupportedModelError: if the path leads to none, or adapters or parametrisations sit on it, or its weights
        are not loaded or no floats.
    """
    found = dict(block.named_modules()).get(path)
    plain = isinstance(found, nn.Linear) or (found is not None and is_transposed(found))
    parameters = dict(found.named_parameters()) if found is not None else {}
    if not plain or not {"weight"} <= set(parameters) <= {"weight", "bias"}:
        raise UnsupportedModelError(
            f"{path}: found {type(found).__name__} with parameters {sorted(parameters)}; expected a plain linear layer "
            "with a weight and perhaps a bias. Fold before adapters, masks or quantisation are attached."
        )
    weight = parameters["weight"]
    if weight.is_meta or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{path}: found {weight.dtype} weights on {weight.device}; expected floats in memory. Load the model first."
        )
    return cast(nn.Linear, found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heads:
    """Where a block's heads lie in its attention linears, as int64 channel numbers.

    Attributes:
    query_KRC: outputs of `wiring.query`; query head k * R + r reads key/value head k (transformers' repeat_kv).
    key_KC, value_KC: outputs of `wiring.key`, `wiring.value`.
    out_KRC: inputs of `wiring.out`.
    pairs: how many pairs of channels RoPE turns; pair p is channels p and p + pairs of a head. 0 = none.
    """

    query_KRC: Tensor
    key_KC: Tensor
    value_KC: Tensor
    out_KRC: Tensor
    pairs: int


def heads_of(block: nn.Module, config: Any) -> Heads:
    """The heads of a block.

    Raises: UnsupportedModelError: if the linears' shapes are not those of the config's heads, or blocks differ.
    """
    check_equal_blocks(config, "heads")  # their shapes would pass as those of smaller heads
    row = wiring_of(config)
    num_heads, num_kv = int(config.num_attention_heads), num_groups(config)
    width = weight_OI(linear_at(block, row.out)).shape[1]
    size, rest = divmod(width, num_heads)
    paths = row.attention_inputs
    found = [weight_OI(linear_at(block, path)).shape[0] for path in paths]
    expected = [width, num_kv * size, num_kv * size] if not row.fused else [width + 2 * num_kv * size]
    if rest or num_heads % num_kv or found != expected or (row.fused == "heads" and num_kv != num_heads):
        raise UnsupportedModelError(
            f"{', '.join(paths)}: found {found} outputs and {width} inputs of {row.out}; expected {expected} for "
            f"{num_heads} query and {num_kv} key/value heads; the config does not belong to this model."
        )
    out_KRC = torch.arange(width).view(num_kv, num_heads // num_kv, size)
    key_KC = torch.arange(num_kv * size).view(num_kv, size)
    query_KRC, value_KC = out_KRC, key_KC
    if row.fused == "blocks":
        key_KC, value_KC = key_KC + width, value_KC + width + num_kv * size
    elif row.fused == "heads":
        query_KC, key_KC, value_KC = torch.arange(3 * width).view(num_heads, 3, size).unbind(1)
        query_KRC = query_KC[:, None]
    return Heads(
        query_KRC=query_KRC, key_KC=key_KC, value_KC=value_KC, out_KRC=out_KRC, pairs=_pairs(row, config, size)
    )


def _pairs(row: Wiring, config: Any, size: int) -> int:
    if row.rotary == "none":
        return 0
    share = config.rope_parameters.get("partial_rotary_factor", 1.0) if row.rotary == "partial" else 1.0
    return (int(size * share) + 1) // 2  # transformers makes one frequency for every second channel, rounded up


def mlp_rows(block: nn.Module, config: Any) -> list[tuple[str, Tensor]]:
    """The linears that make the MLP's intermediate channels, the one that is multiplied last, and which outputs do.

    Returns: (path, (F,) int64 outputs), the gate's first if there is one.
    Raises: UnsupportedModelError: if the shapes do not fit the linear that reads them.
    """
    row = wiring_of(config)
    width = weight_OI(linear_at(block, row.down)).shape[1]
    channels = torch.arange(width)
    fused = row.gate == row.up
    rows = [(row.up, channels + width if fused else channels)]
    if row.gate:
        rows.insert(0, (row.gate, channels))
    for path, _ in rows:
        found, expected = weight_OI(linear_at(block, path)).shape[0], width * (2 if fused else 1)
        if found != expected:
            raise UnsupportedModelError(f"{path}: found {found} outputs; {row.down} needs {expected}.")
    return rows
