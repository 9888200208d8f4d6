"""The feature mixer: convex sums, and which stream a group gets in each mode."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.mixer import FeatureMixer, convex_mix


def streams(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 5, generator=generator) for _ in range(count)]


def test_convex_mix_by_hand():
    mixed = convex_mix([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])], torch.tensor([0.25, 0.75]))
    assert mixed.tolist() == [1.0, 6.0]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_convex_mix_equals_a_loop_in_float64(raw):
    weights = torch.tensor(raw, dtype=torch.float64)
    weights /= weights.sum()
    outputs = streams(len(raw))
    expected = sum(w * output.double() for w, output in zip(weights.tolist(), outputs, strict=True))
    torch.testing.assert_close(convex_mix(outputs, weights.float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hot", [0, 1, 2])
def test_one_hot_weights_return_that_output(hot):
    outputs = streams()
    weights = torch.nn.functional.one_hot(torch.tensor(hot), 3).float()
    assert torch.equal(convex_mix(outputs, weights), outputs[hot])
    mixer = FeatureMixer("fixed", weights.tolist())
    assert torch.equal(mixer(outputs, torch.zeros(2, 4, 5), 1), outputs[hot])


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.sampled_from(["fixed", "learned"]))
@settings(max_examples=40, deadline=None)
def test_weights_are_convex_and_start_where_they_are_told(raw, mode):
    weights = FeatureMixer(mode, raw).weights
    assert (weights >= 0).all()
    assert float(weights.sum().detach()) == pytest.approx(1.0, abs=1e-5)
    for weight, wanted in zip(weights.tolist(), raw, strict=True):
        assert weight == pytest.approx(wanted / sum(raw), abs=1e-4)


def test_fixed_gives_every_group_the_same_mix():
    outputs, dense = streams(), torch.zeros(2, 4, 5)
    mixer = FeatureMixer("fixed", (1.0, 1.0, 2.0))
    assert mixer.weights.tolist() == [0.25, 0.25, 0.5]
    expected = 0.25 * outputs[0] + 0.25 * outputs[1] + 0.5 * outputs[2]
    for group in range(3):
        torch.testing.assert_close(mixer(outputs, dense, group), expected)
    assert not any(parameter.requires_grad for parameter in mixer.parameters())


def test_own_gives_every_group_its_stream():
    outputs = streams()
    mixer = FeatureMixer("own", (1.0, 1.0, 1.0))
    for group in range(3):
        assert mixer(outputs, torch.zeros(2, 4, 5), group) is outputs[group]


def test_dense_gives_everyone_the_dense_stream():
    dense = torch.ones(2, 4, 5)
    mixer = FeatureMixer("dense", (1.0, 1.0, 1.0))
    assert all(mixer(streams(), dense, group) is dense for group in range(3))


def test_learned_weights_get_the_gradient_of_a_softmax():
    outputs = streams(2)
    mixer = FeatureMixer("learned", (3.0, 1.0))
    torch.testing.assert_close(mixer.weights, torch.tensor([0.75, 0.25]))
    mixer(outputs, outputs[0], 1).sum().backward()
    # d sum / d logit_0 = w_0 w_1 (sum of output 0 - sum of output 1), and the opposite for logit_1.
    slope = 0.75 * 0.25 * float(outputs[0].sum() - outputs[1].sum())
    assert mixer.logits.grad.tolist() == pytest.approx([slope, -slope], rel=1e-4)


def test_a_zero_start_can_still_be_learned():
    outputs = streams(2)
    mixer = FeatureMixer("learned", (1.0, 0.0))
    torch.testing.assert_close(mixer(outputs, outputs[0], 0), outputs[0], rtol=1e-4, atol=1e-4)
    mixer(outputs, outputs[0], 0).square().sum().backward()
    assert mixer.logits.grad[1] != 0


@pytest.mark.parametrize("mode", ["fixed", "learned"])
def test_a_mix_keeps_the_streams_dtype(mode):
    outputs = [output.bfloat16() for output in streams(2)]
    assert FeatureMixer(mode, (1.0, 1.0))(outputs, outputs[0], 0).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        ([1.0], "[1.0]"),
        ([0.5, 0.25, 0.25], "[0.5, 0.25, 0.25]"),
        ([1.5, -0.5], "[1.5, -0.5]"),
        ([0.5, 0.25], "[0.5, 0.25]"),
        ([float("nan"), float("nan")], "[nan, nan]"),
    ],
)
def test_weights_that_are_not_convex(weights, shown):
    message = f"mixer: 2 outputs need as many weights >= 0 that sum to 1, found {shown}."
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        convex_mix(streams(2), torch.tensor(weights))
