"""Counts that meet a budget of parameters: whole numbers, against brute force."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity.errors import ConfigError, ElasticSparsityError
from elastic_sparsity.structured_sizes import choose_sizes

SMOLLM2 = {"total": 3_538_944, "group_cost": 294_912, "num_groups": 3, "channel_cost": 1_728, "num_channels": 1_536}


def choose(sparsity, multiple=32, allowed=None, **shape):
    shape = {**SMOLLM2, **shape}
    return choose_sizes(
        sparsity, num_blocks=2, **shape, multiple=multiple, allowed_groups=allowed or range(1, shape["num_groups"] + 1)
    )


def test_smollm2_by_hand():
    """3 key/value heads cannot be halved: 2 stay, and the MLP loses 1,474,560 / 1,728 = 853.3 channels."""
    found = choose(0.5, multiple=1)
    assert (found.groups, found.channels) == ((2, 2), (1536 - 853,) * 2)
    found = choose(0.5)
    assert (found.groups, found.channels, found.removed) == ((2, 2), (672, 672), 2 * (294_912 + 864 * 1_728))
    assert found.sparsity == pytest.approx(0.5052, abs=1e-4)
    found = choose(0.25)
    assert (found.groups, found.channels) == ((3, 3), (1024, 1024)), "2.25 heads are 3; the MLP loses 512 channels"


def test_heads_that_must_stay():
    found = choose(0.5, allowed=[3])
    assert (found.groups, found.channels) == ((3, 3), (1536 - 1024,) * 2)
    with pytest.raises(ConfigError, match="0.8 of the blocks' linears cannot be removed; .* at most 0.734 can"):
        choose(0.8, allowed=[3])


@pytest.mark.parametrize("heads", [1, 3, 5, 7, 24, 28, 40])
@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.375, 0.5, 0.625, 0.75])
def test_any_number_of_heads_meets_the_budget_to_half_a_multiple(heads, sparsity):
    shape = {"num_groups": heads, "group_cost": 4 * 64 * 512, "num_channels": 2048, "channel_cost": 3 * 512}
    total = heads * shape["group_cost"] + 2048 * shape["channel_cost"]
    found = choose(sparsity, multiple=16, total=total, **shape)
    groups, channels = found.groups[0], found.channels[0]
    assert (found.groups, found.channels) == ((groups, groups), (channels, channels))
    assert 1 <= groups <= heads
    assert 0 <= groups - (1 - sparsity) * heads < 1
    assert channels % 16 == 0
    assert abs(found.removed / 2 - sparsity * total) <= 8 * shape["channel_cost"]


@given(
    st.floats(0.001, 0.999), st.integers(1, 9), st.integers(1, 200), st.integers(1, 30), st.integers(1, 9), st.data()
)
def test_the_choice_is_the_best_one_there_is(sparsity, groups, group_cost, steps, channel_cost, data):
    multiple = data.draw(st.integers(1, 8))
    allowed = data.draw(st.sets(st.integers(1, groups), min_size=1))
    shape = {"num_groups": groups, "group_cost": group_cost, "num_channels": steps * multiple}
    shape |= {"channel_cost": channel_cost, "total": groups * group_cost + steps * multiple * channel_cost + 7}
    target = Fraction(sparsity) * shape["total"]

    def error(kept):
        gone = [(groups - kept) * group_cost + (steps - n) * multiple * channel_cost for n in range(1, steps + 1)]
        return min(abs(x - target) for x in gone)

    try:
        found = choose(sparsity, multiple=multiple, allowed=sorted(allowed), **shape)
    except ConfigError as refused:
        if "cannot be removed" in str(refused):
            assert all(error(kept) >= Fraction(multiple * channel_cost, 2) for kept in allowed)
        return
    kept_groups, channels = found.groups[0], found.channels[0]
    assert kept_groups in allowed and 0 < found.removed < found.total == 2 * shape["total"]
    assert channels % multiple == 0 and 0 < channels <= found.num_channels
    assert abs(Fraction(found.removed, 2) - target) == error(kept_groups) <= Fraction(multiple * channel_cost, 2)
    wanted = (1 - Fraction(sparsity)) * groups
    if kept_groups >= wanted:
        better = [kept for kept in allowed if wanted <= kept < kept_groups]
    else:
        better = [kept for kept in allowed if kept >= wanted or kept > kept_groups]
    half = Fraction(multiple * channel_cost, 2)
    assert all(error(kept) >= half for kept in better), "a count of heads nearer above the share would have met it too"


def test_what_is_refused():
    for wrong in (0, 1, -0.5, 1.5, float("nan"), float("inf")):
        with pytest.raises(ElasticSparsityError, match="is not between 0 and 1"):
            choose(wrong)
    for wrong in (0, -1, 7, 1537):
        with pytest.raises(ConfigError, match=f"multiple: {wrong} does not divide the 1536 channels of the MLP"):
            choose(0.5, multiple=wrong)
    with pytest.raises(ConfigError, match="cannot be removed"):
        choose(0.99)
    with pytest.raises(ConfigError, match="less than half of what can go at once"):
        choose(0.001)
