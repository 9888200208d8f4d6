"""Elias-Fano positions: golden bytes, exact size, round trip, every other byte string refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.packing import pack_bits, pack_positions, packed_positions_size, positions_of, unpack_positions


def test_golden_bytes():
    # 3 of 16 positions: l = floor(log2(16 / 3)) = 2. Low bits of 1, 6, 15: 1, 2, 3; high bits: 0, 1, 3.
    packed = pack_positions(torch.tensor([1, 6, 15]), 16)
    assert packed.tolist() == [0b101, 0b110, 0b100101]  # plane 0, plane 1, bits high + i = 0, 2, 5


@st.composite
def some_positions(draw):
    universe = draw(st.integers(1, 3000))
    count = draw(st.integers(0, min(universe, 200)))
    chosen = torch.randperm(universe, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))[:count]
    return universe, chosen.sort().values


@settings(max_examples=200, deadline=None)
@given(some_positions())
def test_round_trip_and_size(case):
    universe, positions = case
    packed = pack_positions(positions, universe)
    assert packed.numel() == packed_positions_size(len(positions), universe)
    assert torch.equal(unpack_positions(packed, len(positions), universe), positions)
    if len(positions):
        ideal = math.log2(universe / len(positions))
        assert 8 * packed.numel() <= len(positions) * (ideal + 3) + 8 * (ideal + 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_other_bytes_are_refused_or_another_valid_list(data):
    universe, positions = data.draw(some_positions().filter(lambda case: len(case[1]) > 0))
    packed = pack_positions(positions, universe)
    index, bit = data.draw(st.integers(0, len(packed) - 1)), data.draw(st.integers(0, 7))
    packed[index] ^= 1 << bit
    try:
        found = unpack_positions(packed, len(positions), universe)
    except ShapeError:
        return
    assert not torch.equal(found, positions), "two codes for one list"
    assert torch.equal(pack_positions(found, universe), packed), "a code that the writer would not write"


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_wrong_length_is_named(length):
    with pytest.raises(ShapeError, match="expected 4 uint8 for 2 of 20"):
        unpack_positions(torch.zeros(length, dtype=torch.uint8), 2, 20)


def test_positions_of_a_mask():
    mask = torch.tensor([[True, False], [False, True]])
    assert positions_of(mask.flatten()).tolist() == [0, 3]
    assert pack_bits(mask).tolist() == [0b1001]
