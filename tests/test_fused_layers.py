"""Norms and rotary embedding of a model while it trains: used where they are the usual ones, and gone afterwards."""

import sys

import pytest
import torch
from torch import nn

from elastic_sparsity import native
from elastic_sparsity.fused_layers import _ROTARY, _is_usual_norm, _is_usual_rotary, fused_layers
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

USABLE = [path.name for path in native.instruction_paths() if path.problem is None and path.name != native.TORCH]


def norms(model):
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_gives_its_logits_and_is_as_before_outside(family):
    model = tiny_model(family).eval().requires_grad_(False)
    ids = torch.randint(0, model.config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(0))
    home = sys.modules[type(model).__module__]
    rotary = getattr(home, _ROTARY, None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(ids).logits
        with fused_layers(model):
            inside = model(ids).logits
        after = model(ids).logits
    torch.testing.assert_close(inside.float(), before.float(), rtol=0.05, atol=0.05)
    assert torch.equal(before, after)
    assert getattr(home, _ROTARY, None) is rotary
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(not USABLE, reason="the package was installed without a C++ compiler")
def test_a_llamas_layers_are_used_with_their_gradients(monkeypatch):
    model = tiny_model("llama").eval().requires_grad_(False)
    embeddings = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    calls = []

    def gradient():
        x = embeddings.clone().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    theirs = gradient()
    found = native.kernels()
    run = type(found).run
    monkeypatch.setattr(type(found), "run", lambda self, name, *rest: (calls.append(name), run(self, name, *rest))[1])
    with fused_layers(model):
        torch.testing.assert_close(gradient(), theirs, rtol=1e-3, atol=1e-5)
    assert calls.count("es_rms_norm") == calls.count("es_rms_norm_backward") == len(norms(model))
    assert "es_rotary" not in calls  # in float32 the angles' dtype is the result's
    with fused_layers(model), torch.autocast("cpu", dtype=torch.bfloat16):
        gradient()
    assert calls.count("es_rotary") == 4 * len(model.model.layers)


def test_an_exception_and_a_second_use_inside_leave_layers_as_they_were():
    model = tiny_model("llama").requires_grad_(False)
    home, norm = sys.modules[type(model).__module__], model.model.norm
    rotary = getattr(home, _ROTARY)
    kind = type(norm)
    own = kind.forward
    wrapped = norm.forward = lambda x: kind.forward(norm, x)  # as accelerate's hooks do
    with pytest.raises(KeyError, match="inside"), fused_layers(model):
        outer = kind.forward
        assert outer is not own
        with fused_layers(model):
            assert kind.forward is not outer
        assert kind.forward is outer and getattr(home, _ROTARY) is not rotary
        raise KeyError("inside")
    assert kind.forward is own and getattr(home, _ROTARY) is rotary
    assert norm.forward is wrapped
    assert [module for module in model.modules() if "forward" in vars(module)] == [norm]


def test_layers_whose_interface_changed_are_left_alone(monkeypatch):
    model = tiny_model("llama").eval().requires_grad_(False)
    home, ids = sys.modules[type(model).__module__], torch.arange(6)[None]
    before = model(ids).logits
    rotary = getattr(home, _ROTARY)
    for other in (lambda q, k, cos: None, lambda q, k, cos, sin: q, lambda q, k, cos, sin: (q, k[:1]), 3):
        assert not _is_usual_rotary(other)
    monkeypatch.delattr(home, _ROTARY)
    with fused_layers(model):
        assert not hasattr(home, _ROTARY)
    monkeypatch.undo()
    assert getattr(home, _ROTARY) is rotary

    class GatedRMSNorm(type(model.model.norm)):
        def forward(self, x, gate):
            return super().forward(x) * gate

    class OuterEpsilonRMSNorm(type(model.model.norm)):
        def forward(self, x):
            return x * self.weight / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)

    assert not _is_usual_norm(GatedRMSNorm(8)) and not _is_usual_norm(OuterEpsilonRMSNorm(8, 1e-6))
    with fused_layers(model):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        norm, x = model.model.norm, torch.randn(2, model.config.hidden_size)
        torch.testing.assert_close(norm(hidden_states=x), norm(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, cos, sin = torch.randn(1, 2, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
            patched, ours = getattr(home, _ROTARY), rotary(q, q, cos, sin)
            torch.testing.assert_close(patched(q=q, k=q, cos=cos, sin=sin), ours)
            torch.testing.assert_close(patched(q, q, cos, sin), ours)
            torch.testing.assert_close(patched(q, q, cos, sin, unsqueeze_dim=1), ours)
            q, cos, sin = q[..., :7], cos[..., :7], sin[..., :7]
            torch.testing.assert_close(patched(q, q, cos, sin), rotary(q, q, cos, sin))


def test_layers_with_another_formula_are_left_alone():
    class OneBasedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x * (1 + self.weight) / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def interleaved(q, k, cos, sin):
        return tuple(
            x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None] for x in (q, k)
        )

    assert not _is_usual_norm(OneBasedRMSNorm())
    assert not _is_usual_norm(nn.LayerNorm(8))
    assert not _is_usual_rotary(interleaved)
    assert not _is_usual_rotary(lambda x: x)
    assert not _is_usual_rotary(None)
