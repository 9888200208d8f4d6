"""Shells of one linear: golden bits, counts, bitwise round trip by every prefix, damage named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import CheckpointError, ShapeError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.shells import LinearRecord, decode_shells, encode_shells, num_shells, shell_names, spec_of

LADDER = Ladder(sparsities=(0.25, 0.5), patterns=("2:4",))


def record_of(weight, scores, ladder, within=False):
    counts = [keep_count(weight.shape[1], s) for s in ladder.sparsities]
    drop = drop_levels(scores, counts) if counts else None
    inside = mask_at(drop, 0) if within else None
    patterns = [pattern_mask(scores, *level.pattern, inside) for level in ladder.levels if level.pattern]
    pairs = [(torch.ones(1, weight.shape[1]), torch.zeros(weight.shape[0], 1))] * ladder.num_groups
    return LinearRecord(weight_OI=weight, drop_level_OI=drop, pattern_masks=patterns, pairs=pairs, transposed=False)


def test_golden_bits_and_values():
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 4, 3]])
    record = record_of(weight, scores, LADDER)
    shells = encode_shells(record, LADDER, torch.float32)
    assert shell_names(LADDER) == ["core", "level-0.25", "pattern-2of4"]
    spec = spec_of(record, LADDER)
    assert (spec.kept, spec.pattern_values) == ((3, 2), (0,))
    # core: 2 of 4 kept: row 0 columns 0 1, row 1 columns 2 3 -> bits 0 1 6 7
    assert shells[0]["mask"].tolist() == [0b11000011]
    assert shells[0]["values"].tolist() == [1, 2, 7, 8]
    # +25 %: the next best of each row: positions 2 and 5; a list of them would not be shorter than a bitmap
    assert shells[1]["mask"].tolist() == [0b00100100]
    assert shells[1]["values"].tolist() == [3, 6]
    # 2:4 keeps what the core keeps: all positions as bits, no new value
    assert shells[2]["mask"].tolist() == [0b11000011]
    assert shells[2]["values"].tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 9))
def test_every_level_decodes_bitwise_from_its_prefix(seed, within, dtype, rows):
    ladder = Ladder(sparsities=(0.3, 0.5, 0.6, 0.7), patterns=("2:4", "1:4"))
    generator = torch.Generator().manual_seed(seed)
    weight, scores = torch.randn(rows, 40, generator=generator), torch.rand(rows, 40, generator=generator)
    record = record_of(weight, scores, ladder, within)
    shells, spec = encode_shells(record, ladder, dtype), spec_of(record, ladder)
    for number, shell in enumerate(shells):
        assert {part: tuple(tensor.shape) for part, tensor in shell.items()} == spec.shell_shapes(number)
    for level in ladder.levels:
        base, mask = decode_shells(shells[: num_shells(ladder, level)], spec, level, "w")
        expected = (
            record.pattern_masks[level.index - 4] if level.pattern else mask_at(record.drop_level_OI, level.index)
        )
        assert torch.equal(mask, expected)
        assert torch.equal(torch.where(mask, base, 0), torch.where(expected, weight.to(dtype), 0))


def test_many_levels_cost_a_list_of_positions_not_a_bitmap_each():
    ladder = Ladder(sparsities=tuple(i / 20 for i in range(1, 15)))
    weight = torch.randn(64, 400)
    shells = encode_shells(record_of(weight, weight.abs(), ladder), ladder, torch.bfloat16)
    masks = sum(t.numel() for shell in shells for part, t in shell.items() if part != "values")
    assert 8 * masks / weight.numel() < 1 + 13 * 0.35, "bits a weight; one bitmap a level would be 14"


def swapped(shells, number, **parts):
    changed = [dict(shell) for shell in shells]
    changed[number].update(parts)
    return changed


def test_damage_inside_a_shell_is_named():
    ladder = Ladder(sparsities=(0.5, 0.75), patterns=("2:4",))
    weight = torch.randn(8, 64)
    record = record_of(weight, weight.abs(), ladder)
    shells, spec = encode_shells(record, ladder, torch.float32), spec_of(record, ladder)
    dense, pattern = ladder.levels[0], ladder.levels[2]
    core = shells[0]["mask"].clone()
    core[0] ^= 1  # one kept weight more or less
    full = torch.full_like(shells[2]["mask"], 255)
    for changed, level, message in (
        (swapped(shells, 0, mask=core), dense, "places"),
        (swapped(shells, 0, mask=full), dense, "places 512 weights"),
        (swapped(shells, 1, mask=shells[0]["mask"], values=shells[0]["values"]), dense, "another number|places"),
        (swapped(shells, 2, mask=full), pattern, "places"),
    ):
        with pytest.raises(CheckpointError, match=message):
            decode_shells(changed[: num_shells(ladder, level)], spec, level, "w")


def test_rows_that_keep_different_numbers_are_refused():
    weight = torch.randn(2, 8)
    record = record_of(weight, weight.abs(), LADDER)
    record.drop_level_OI[0, 0] = 0 if record.drop_level_OI[0, 0] else 1
    with pytest.raises(ShapeError, match="rows keep"):
        spec_of(record, LADDER)
