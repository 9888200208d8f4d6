"""Elementwise parts of training: every compiled path against torch; what is refused, and left to torch."""

import re

import pytest
import torch
import torch.nn.functional as F

from elastic_sparsity import attention, end_to_end, fused, native
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.fused import (
    fused_causal_softmax_,
    fused_kl_,
    fused_rms_norm,
    fused_rotary,
)

USABLE = [path.name for path in native.instruction_paths() if path.problem is None and path.name != native.TORCH]
DTYPES = (torch.float32, torch.bfloat16)
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.skipif(not USABLE, reason="the package was installed without a C++ compiler")


@pytest.fixture(params=[*((path, 1) for path in USABLE), *((path, 2) for path in USABLE[:1])], ids=str)
def path(request, monkeypatch):
    name, threads = request.param
    monkeypatch.setenv(native.VARIABLE, name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield name
    torch.set_num_threads(before)


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def by_torch(function, *args):
    """The torch code of the caller, which is the oracle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.VARIABLE, native.TORCH)
        return function(*args)


def kl(student, teacher):
    grad = torch.full_like(student, 7.0)
    return end_to_end._logits_kl(student, teacher, grad), grad


@pytest.mark.parametrize("width", [1, 3, 17, 64, 4096, 70_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_and_its_gradient(path, width, dtype):
    student, teacher = (random(5, width, dtype=dtype, scale=4, seed=seed) for seed in (0, 1))
    total, grad = kl(student, teacher)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    wanted = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 0.01, "atol": 1e-6}
    torch.testing.assert_close(grad.double(), log_q.exp() - log_p.exp(), **tolerance)
    their_total, their_grad = by_torch(kl, student, teacher)
    assert float(total) == pytest.approx(float(their_total), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(grad, their_grad, rtol=tolerance["rtol"], atol=1e-5)


def test_kl_of_equal_rows_is_zero(path):
    logits = random(3, 1001, scale=5)
    total, grad = kl(logits, logits)
    assert float(total) == 0.0 and not grad.any()


def test_kl_of_logits_far_from_zero_is_as_accurate(path):
    student, teacher = random(4, 1000, seed=0) + 1e4, random(4, 1000, seed=1) + 1e4
    total, grad = kl(student, teacher)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    assert float(total) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=2e-6)
    torch.testing.assert_close(grad.double(), log_q.exp() - log_p.exp(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("at", [0, 20])
def test_kl_of_what_is_not_finite_is_torchs(path, bad, side, at):
    student, teacher = random(2, 21, seed=0), random(2, 21, seed=1)
    for logits in (student,) * (side != "teacher") + (teacher,) * (side != "student"):
        logits[1, at] = bad
    total, grad = kl(student, teacher)
    their_total, their_grad = by_torch(kl, student, teacher)
    torch.testing.assert_close(total, their_total, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grad, their_grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(64, 3001), (100_003, 3)])
def test_kl_does_not_depend_on_threads(shape):
    student, teacher = (random(*shape, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(kl(student, teacher))
    finally:
        torch.set_num_threads(before)
    for total, grad in found[1:]:
        assert torch.equal(total, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.parametrize("width", [0, 1, 90, 7000])
def test_exponentials_are_accurate_over_their_whole_range(path, width):
    """The first logit is the largest, so the softmax of the others is their exponential, up to the sum."""
    scores = torch.cat([torch.zeros(1), -torch.linspace(0, 86, width)]).view(1, -1)
    wanted = scores.double().softmax(-1)
    assert fused_causal_softmax_(scores)
    torch.testing.assert_close(scores.double(), wanted, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (7, 40), (128, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_softmax(path, queries, keys, dtype):
    scores = random(2, 3, queries, keys, dtype=dtype, scale=3)
    future = torch.full((queries, keys), -INF).triu_(keys - queries + 1)
    wanted = (scores.float() + future).softmax(-1)
    found = scores.clone()
    assert fused_causal_softmax_(found)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-6 if dtype == torch.float32 else 0.01, atol=1e-30)
    assert not found[future.expand_as(found) != 0].any()
    scores[0, 0, 0, 0] = NAN
    assert fused_causal_softmax_(scores)
    assert scores[0, 0, :, : keys - queries + 1].isnan().any() and not scores[1].isnan().any()


def test_bfloat16_is_rounded_as_torch_does(path):
    half = random(40, 301, dtype=torch.bfloat16, scale=3)
    half[0, 5], half[1, 7] = NAN, -NAN
    wide = half.float()
    assert fused_causal_softmax_(half) and fused_causal_softmax_(wide)
    torch.testing.assert_close(half, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_attention_with_and_without_the_library_agrees(path):
    inputs = [random(2, heads, 150, 16, dtype=torch.bfloat16, seed=heads) for heads in (6, 2, 2)]
    ours = attention.causal_attention(*inputs, 0.25)
    theirs = by_torch(attention.causal_attention, *inputs, 0.25)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("width", [1, 7, 16, 100])
def test_rms_norm_and_its_gradient(path, width):
    x, weight, upstream = random(2, 5, width), random(width, seed=1) + 2, random(2, 5, width, seed=2)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found = fused_rms_norm(ours, weight, 1e-5)
    wanted = theirs * weight / (theirs.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    x[0, 0, -1] = NAN
    assert fused_rms_norm(x, weight, 1e-5)[0, 0].isnan().all()


@pytest.mark.parametrize("width", [2, 64, 80])
@pytest.mark.parametrize("angle_samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_and_its_gradient(path, width, angle_samples, dtype):
    x = random(2, 7, 3, width, dtype=dtype).transpose(1, 2)  # as a linear leaves it
    cos, sin = (random(angle_samples, 7, width, seed=seed) for seed in (1, 2))
    upstream = random(2, 3, 7, width, dtype=dtype, seed=3)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found = fused_rotary(ours, cos, sin)
    first, second = theirs.chunk(2, dim=-1)
    wanted = theirs * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    found.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_kl_(random(2, 3), random(2, 3), random(2, 2)), "KL: shapes differ: (2, 3), (2, 3), (2, 2)."),
        (lambda: fused_causal_softmax_(random(3, 2)), "softmax: 3 queries, but only 2 keys."),
        (lambda: fused_rms_norm(random(2, 3), random(2), 1e-5), "RMSNorm: width 3 and a weight of (2,)."),
        (lambda: fused_rotary(random(1, 1, 2, 4), random(1, 1, 4), random(1, 1, 4)), "rotary: shapes do not fit"),
        (lambda: fused_rotary(random(1, 1, 2, 3), random(1, 2, 3), random(1, 2, 3)), "rotary: shapes do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        call()


def test_what_the_library_does_not_serve_is_left_to_torch(monkeypatch):
    half, double, strided = random(4, 4).half(), random(4, 4).double(), random(4, 4).T
    meta = torch.empty(4, 4, device="meta")
    for x in (half, double, strided, meta):
        assert fused_kl_(x, x, x) is None and not fused_causal_softmax_(x)
    assert fused_kl_(random(4, 4), random(4, 4).bfloat16(), random(4, 4)) is None
    weight = random(4).requires_grad_()
    assert fused_rms_norm(random(4, 4), weight, 1e-5) is None
    angles = random(1, 2, 4)
    assert fused_rotary(random(1, 1, 2, 4), angles, angles.clone().requires_grad_()) is None
    monkeypatch.setenv(native.VARIABLE, native.TORCH)
    assert fused_kl_(random(4, 4), random(4, 4), random(4, 4)) is None
    assert fused_rotary(random(1, 1, 2, 4), random(1, 2, 4), random(1, 2, 4)) is None


def test_second_derivatives_are_refused_rather_than_wrong():
    x = random(2, 4).requires_grad_()
    (grad,) = torch.autograd.grad(fused_rms_norm(x, random(4), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_library_of_another_version_is_told_of_once_and_training_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(native, "_VERSION", 99)
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    monkeypatch.setattr(fused, "library_problem", native.library_problem.__wrapped__)
    fused._warn.cache_clear()
    student, teacher = random(3, 5, seed=0), random(3, 5, seed=1)
    ours, theirs = kl(student, teacher), by_torch(kl, student, teacher)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not fused_causal_softmax_(random(2, 2)) and fused_rms_norm(random(2, 4), random(4), 1e-5) is None
    (message,) = caplog.messages
    assert re.search(r"expected version 99; reinstall the package .* Until then training uses torch", message)
    monkeypatch.setenv(native.VARIABLE, native.TORCH)
    fused._warn.cache_clear()
    assert not fused_causal_softmax_(random(2, 2)) and len(caplog.messages) == 1
