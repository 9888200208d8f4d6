"""Attention for training against torch's: values, gradients, what is left to torch, and the model's own switch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elastic_sparsity.attention import NAME, SLICE, _forward, causal_attention, training_attention
from elastic_sparsity.tiny import tiny_model


def leaves(samples: int, heads: int, groups: int, tokens: int, width: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(samples, h, tokens, width) for h in (heads, groups, groups)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 5, SLICE, SLICE + 1, 2 * SLICE + 60])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_torchs(tokens, heads, groups):
    ours, theirs = (leaves(2, heads, groups, tokens, 8) for _ in range(2))
    scale = 0.3
    upstream = torch.randn(2, heads, tokens, 8, generator=torch.Generator().manual_seed(1))
    output = causal_attention(*ours, scale)
    reference = F.scaled_dot_product_attention(*theirs, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
    output.backward(upstream)
    reference.backward(upstream)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_torchs_kernel():
    exact = leaves(2, 6, 2, 300, 64)
    ours, theirs = ([x.detach().bfloat16().requires_grad_() for x in exact] for _ in range(2))
    outputs = [F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in (exact, theirs)]
    outputs.append(causal_attention(*ours, 64**-0.5))
    for output in outputs:
        output.float().square().sum().backward()
    wanted = [outputs[0].detach(), *(x.grad for x in exact)]

    def errors(output, inputs):
        found = [output.detach(), *(x.grad for x in inputs)]
        return [float((f.float() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]

    for our, their in zip(errors(outputs[2], ours), errors(outputs[1], theirs), strict=True):
        assert our < 3 * their + 1e-3


def test_a_later_token_changes_nothing_before_it():
    query, key, value = (x.detach() for x in leaves(1, 2, 1, 2 * SLICE, 4))
    before = causal_attention(query, key, value, 0.5)
    key[:, :, SLICE + 3] += 10
    value[:, :, SLICE + 3] += 10
    changed = (causal_attention(query, key, value, 0.5) != before).any(dim=-1).any(dim=0).any(dim=0)
    assert changed.nonzero().min() == SLICE + 3


def call(dtype=torch.bfloat16, mask=None, tokens=4, **kwargs) -> bool:
    """Whether torch's kernel was asked."""
    asked = []
    query, key, value = (x.detach() for x in leaves(1, 2, 1, 4, 8, dtype))
    _forward(
        lambda *_args, **_kwargs: asked.append(True), nn.Module(), query[:, :, :tokens], key, value, mask, **kwargs
    )
    return bool(asked)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
        {"is_causal": False},
        {"tokens": 1},
        {"dropout": 0.1},
        {"softcap": 30.0},
    ],
)
def test_what_is_not_plain_causal_bfloat16_goes_to_torch(changes):
    assert not call()
    assert call(**changes)


def test_a_model_uses_it_inside_and_is_as_before_outside():
    model = tiny_model("llama").eval()
    ids = torch.randint(0, model.config.vocab_size, (2, SLICE + 9), generator=torch.Generator().manual_seed(0))
    before = model.config._attn_implementation
    with torch.no_grad():
        reference = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with training_attention(model):
                assert model.config._attn_implementation == NAME
                inside = model(ids).logits
            assert model.config._attn_implementation == before
            outside = model(ids).logits
        assert torch.equal(model(ids).logits, reference)
    assert not torch.equal(inside, outside)
    for logits in (inside, outside):
        assert (logits.float() - reference).norm() < 0.02 * reference.norm()
