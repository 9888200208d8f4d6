"""Float64 logits of transformers' models, whose norms and softmax would compute in float32 whatever the weights are."""

import torch
from torch.overrides import TorchFunctionMode

from elastic_sparsity.structured_parts import sizes_for
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model
from elastic_sparsity.wiring import wiring_of

IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 260

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Shapes that no family's defaults have: biases on Llama, rotary on half of a head, GPT-NeoX one branch after the other.
VARIANTS = {
    **{family: (family, {}) for family in TINY_FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2-biases": ("gemma2", {"attention_bias": True}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 16}),
    "phi3-half-rotary": ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_neox-half-rotary": ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
}


class StayFloat64(TorchFunctionMode):
    """Inside it, casts of float64 tensors to float32 are left out, `dtype=` arguments too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


def model_of(variant, dtype=torch.float64):
    family, changes = VARIANTS[variant]
    return tiny_model(family, **changes).to(dtype)


@torch.no_grad()
def logits(model):
    """In the dtype of the weights, float64 throughout if they are."""
    with StayFloat64():
        found = model(IDS, use_cache=False).logits
    assert found.dtype == model.dtype
    return found


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_scales(pair, seed=0):
    """Between 1/4 and 4, of both signs where the pair allows it."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 ** (4 * torch.rand(pair.num_values, dtype=torch.float64, generator=generator) - 2)
    return size if pair.positive else size * (2 * torch.randint(0, 2, size.shape, generator=generator) - 1)


def random_orders(*shape, seed=0):
    """int64 permutations along the last dimension."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def cut_sizes(model, sparsity=0.4, multiple=8):
    """Counts of a structured level that take heads away too, where the family's config can say so."""
    one = 1 if wiring_of(model.config).free_heads else None
    return sizes_for(model, sparsity, multiple, groups=one)
