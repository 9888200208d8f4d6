"""Importance scores against loops that spell out their formulas, and the running statistics they need."""

import math
import re

import pytest
import torch

from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.importance import (
    InputStatistics,
    importance_scores,
    inverse_hessian,
    magnitude_scores,
    obs_scores,
    ria_scores,
    wanda_scores,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(*batches: torch.Tensor, gram: bool = True) -> InputStatistics:
    statistics = InputStatistics(batches[0].shape[-1], gram=gram)
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -2.0], [-3.0, 0.5]])
    statistics = statistics_of(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    assert statistics.square_sum_I.tolist() == [25.0, 1.0]
    assert statistics.gram_II.tolist() == [[25.0, 3.0], [3.0, 1.0]]
    assert statistics.num_tokens == 2
    assert wanda_scores(weight, statistics.square_sum_I).tolist() == [[5.0, 2.0], [15.0, 0.5]]
    assert magnitude_scores(weight).tolist() == [[1.0, 2.0], [3.0, 0.5]]


def test_obs_by_hand():
    """Gram [[2, 1], [1, 2]] with mean diagonal 2; damping 0.5 makes [[3, 1], [1, 3]], inverse diagonal 3/8."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    scores = obs_scores(torch.tensor([[3.0, -1.0]]), gram, damping=0.5)
    torch.testing.assert_close(scores, torch.tensor([[24.0, 8 / 3]]))
    assert gram.tolist() == [[2.0, 1.0], [1.0, 2.0]]


@pytest.mark.parametrize("gram", [False, True])
def test_means_over_batches_and_workers(gram):
    mine, other = (InputStatistics(4, gram=gram, means=True) for _ in range(2))
    batches = [random(5, 4, seed=seed) + 3 for seed in range(4)]
    for number, batch in enumerate(batches):
        (other if number == 3 else mine).update(batch)
    torch.testing.assert_close(mine.mean_I, torch.cat(batches[:3]).double().mean(dim=0), rtol=1e-6, atol=0)
    theirs = []
    other.reduce(theirs.extend)  # what another worker would send
    mine.reduce(lambda tensors: [x.add_(theirs.pop(0)) for x in tensors] and None)
    torch.testing.assert_close(mine.mean_I, torch.cat(batches).double().mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gram", [False, True])
def test_wanda_equals_a_triple_loop(gram):
    weight, x = random(3, 4), random(5, 4, seed=1)
    found = wanda_scores(weight, statistics_of(x, gram=gram).square_sum_I)
    for o in range(3):
        for i in range(4):
            total = 0.0
            for t in range(5):
                total += float(x[t, i]) ** 2
            assert float(found[o, i]) == pytest.approx(abs(float(weight[o, i])) * math.sqrt(total), rel=1e-6)


def test_ria_by_hand():
    """Column sums 4 and 2, row sums 4 and 2; norms 16 and 1, whose roots are 4 and 1."""
    found = ria_scores(torch.tensor([[3.0, -1.0], [-1.0, 1.0]]), torch.tensor([256.0, 1.0]))
    assert found.tolist() == [[4 * (3 / 4 + 3 / 4), 1 / 2 + 1 / 4], [4 * (1 / 4 + 1 / 2), 1 / 2 + 1 / 2]]


def test_ria_equals_a_loop_and_does_not_see_scales_of_the_weight():
    weight, square_sum = random(5, 7), random(7, seed=3).square()
    found = ria_scores(weight, square_sum, power=0.3)
    for o in range(5):
        for i in range(7):
            size = abs(float(weight[o, i]))
            relative = size / float(weight[:, i].abs().sum()) + size / float(weight[o].abs().sum())
            assert float(found[o, i]) == pytest.approx(relative * float(square_sum[i]) ** 0.15, rel=1e-5)
    torch.testing.assert_close(ria_scores(100 * weight, square_sum, power=0.3), found)


def test_ria_of_zero_rows_and_columns_is_zero():
    weight = random(3, 4)
    weight[1], weight[:, 2] = 0.0, 0.0
    found = ria_scores(weight, torch.ones(4))
    assert torch.isfinite(found).all()
    assert torch.equal(found == 0, weight == 0)


def test_mean_and_variance_equal_torchs_over_all_batches():
    batches = [random(4, 6) + 3, random(2, 5, 6, seed=1) - 1]
    statistics = InputStatistics(6, gram=False, means=True)
    for batch in batches:
        statistics.update(batch)
    x = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    torch.testing.assert_close(statistics.mean_I, x.mean(0))
    torch.testing.assert_close(statistics.variance_I, x.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_obs_equals_the_cheapest_repair_of_a_row():
    """Removing weight i and re-solving the others by least squares costs exactly the score."""
    weight, x = random(3, 4).double(), random(40, 4, seed=1).double()
    damping = 0.01
    hessian = x.T @ x
    hessian += damping * hessian.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    found = obs_scores(weight.float(), (x.T @ x).float(), damping)
    for o in range(3):
        for i in range(4):
            others = [j for j in range(4) if j != i]
            # The change d has d[i] = -w[i]; the others minimise d H d.
            change = torch.zeros(4, dtype=torch.float64)
            change[i] = -weight[o, i]
            change[others] = torch.linalg.solve(hessian[others][:, others], hessian[others, i] * weight[o, i])
            assert float(found[o, i]) == pytest.approx(float(change @ hessian @ change), rel=1e-4)


def test_inverse_hessian_equals_a_float64_inverse():
    x = random(30, 6)
    x[:, 2] = 0.0  # never active: unit diagonal, so its row stays its own
    gram = x.T @ x
    expected = gram.double()
    expected[2, 2] = 1.0
    expected += 0.1 * expected.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(inverse_hessian(gram, 0.1).double(), torch.linalg.inv(expected), rtol=1e-4, atol=1e-6)


def test_weights_of_a_channel_that_was_never_active_score_0():
    """A unit diagonal would place them above live channels of small energy; SparseGPT zeroes them."""
    x = random(30, 4) * 1e-2
    x[:, 1] = 0.0
    weight = random(3, 4, seed=1)
    scores = obs_scores(weight, x.T @ x, 0.01)
    assert not scores[:, 1].any() and bool((scores[:, [0, 2, 3]] > 0).all())


def test_obs_of_uncorrelated_inputs_ranks_as_wanda():
    weight, square_sum = random(4, 8), random(8, seed=2).square() + 0.1
    by_obs = obs_scores(weight, square_sum.diag(), damping=1e-9)
    torch.testing.assert_close(by_obs, wanda_scores(weight, square_sum).square(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gram", [False, True])
def test_streaming_equals_one_batch_in_any_order(gram):
    x = random(2, 12, 6)
    whole = statistics_of(x, gram=gram)
    parts = [x[:1, :5], x[:1, 5:], x[1:]]
    for batches in (parts, parts[::-1]):
        streamed = statistics_of(*batches, gram=gram)
        assert streamed.num_tokens == whole.num_tokens == 24
        torch.testing.assert_close(streamed.square_sum_I, whole.square_sum_I, rtol=1e-6, atol=1e-6)
        if gram:
            torch.testing.assert_close(streamed.gram_II, whole.gram_II, rtol=1e-5, atol=1e-5)
        else:
            assert streamed.gram_II is None


@pytest.mark.parametrize("gram", [False, True])
def test_statistics_are_float32_even_of_half_inputs_under_autocast(gram):
    x = torch.full((3, 4), 300.0, dtype=torch.float16)  # its square overflows float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = statistics_of(x, gram=gram)
    assert statistics.square_sum_I.dtype == torch.float32
    assert statistics.square_sum_I.tolist() == [270000.0] * 4
    if gram:
        assert statistics.gram_II.unique().tolist() == [270000.0]


def test_scores_by_name():
    weight, statistics = random(3, 4), statistics_of(random(20, 4, seed=1))
    for method, expected in (
        ("magnitude", weight.abs()),
        ("wanda", wanda_scores(weight, statistics.square_sum_I)),
        ("ria", ria_scores(weight, statistics.square_sum_I)),
        ("obs", obs_scores(weight, statistics.gram_II, 0.02)),
    ):
        assert torch.equal(importance_scores(method, weight, statistics, 0.02, "w"), expected)


def test_scores_of_bfloat16_weights_are_float32():
    weight, statistics = random(3, 4).bfloat16(), statistics_of(random(20, 4, seed=1))
    for method in ("magnitude", "wanda", "ria", "obs"):
        found = importance_scores(method, weight, statistics, 0.01, "w")
        assert found.dtype == torch.float32
        assert torch.equal(found, importance_scores(method, weight.float(), statistics, 0.01, "w"))


def test_wrong_widths():
    with pytest.raises(ShapeError, match=r"input statistics: expected 4 features, found shape \(2, 3\)"):
        InputStatistics(4, gram=False).update(torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"wanda: weight \(2, 4\) against statistics \(3,\)"):
        wanda_scores(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ShapeError, match=r"ria: weight \(2, 4\) against statistics \(3,\)"):
        ria_scores(torch.ones(2, 4), torch.ones(3))


def test_checked_names_where_statistics_are_missing_or_not_finite():
    empty = InputStatistics(4, gram=False)
    with pytest.raises(NumericsError, match=r"^model.layers.0.fc1: saw no calibration token\.$"):
        empty.checked("model.layers.0.fc1")
    bad = statistics_of(torch.tensor([[1.0, float("nan"), float("inf"), 2.0]]), gram=False)
    with pytest.raises(NumericsError, match="fc1: calibration statistics of 2 of 4 input channels are NaN or infinite"):
        bad.checked("fc1")
    good = statistics_of(torch.ones(1, 4), gram=False)
    assert good.checked("fc1") is good


def test_a_gram_that_does_not_factor():
    gram = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    message = (
        "fc1: the input covariance does not factor with damping 0.5; "
        "raise `scores.damping` or use more calibration tokens."
    )
    with pytest.raises(NumericsError, match=f"^{re.escape(message)}$"):
        inverse_hessian(gram, 0.5, "fc1")
    with pytest.raises(NumericsError, match="^gram: the input covariance does not factor"):
        obs_scores(torch.ones(1, 2), gram, 0.5)
