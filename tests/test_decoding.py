"""Compiled decoding against torch's, for every kind of shell; and what damaged shells get from both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shells import record_of

from elastic_sparsity import native
from elastic_sparsity.decoding import Decoder, check_finite
from elastic_sparsity.errors import CheckpointError
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.packed_weight import unpack_rows
from elastic_sparsity.shells import encode_shells, num_shells, spec_of

USABLE = [path.name for path in native.instruction_paths() if path.problem is None and path.name != native.TORCH]
ALL = [*USABLE, native.TORCH]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Bitmap and Elias-Fano increments, an empty one, patterns alone, groups across 64-bit words.
LADDERS = [
    Ladder(sparsities=(0.5, 0.6, 0.7), patterns=("2:4", "1:4")),
    Ladder(sparsities=(0.3, 0.88, 0.9), patterns=()),
    Ladder(sparsities=(0.95, 0.96), patterns=("7:20",)),
    Ladder(sparsities=(), patterns=("2:4", "2:8")),
]


def kernels_of(path):
    return None if path == native.TORCH else native.kernels_of(path)


def decoder_of(level, path):
    return Decoder(level, kernels_of(path))


def linear(ladder, seed, rows, width, dtype, rank):
    random = torch.Generator().manual_seed(seed)
    weight, scores = torch.randn(rows, width, generator=random), torch.rand(rows, width, generator=random)
    record = record_of(weight, scores, ladder)
    pairs = [(torch.randn(rank, width, generator=random), torch.randn(rows, rank, generator=random))] if rank else []
    return encode_shells(record, ladder, dtype), spec_of(record, ladder), pairs


@settings(max_examples=120, deadline=None)
@given(
    ladder=st.sampled_from(LADDERS), seed=st.integers(0, 999), rows=st.integers(1, 9),
    width=st.sampled_from([40, 80, 120, 160, 320]), stored=st.sampled_from(DTYPES), wanted=st.sampled_from(DTYPES),
    rank=st.sampled_from([0, 1, 5]),
)  # fmt: skip
def test_every_path_gives_the_same_bits(ladder, seed, rows, width, stored, wanted, rank):
    shells, spec, pairs = linear(ladder, seed, rows, width, stored, rank)
    for level in ladder.levels:
        prefix = shells[: num_shells(ladder, level)]
        expected = torch.empty(rows, width, dtype=wanted)
        decoder_of(level, native.TORCH).write_(prefix, spec, pairs, expected, "w")
        for path in USABLE:
            out = torch.full((rows, width), torch.nan, dtype=wanted)
            decoder_of(level, path).write_(prefix, spec, pairs, out, "w")
            assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), (level, path)
        if wanted == torch.float16:
            continue
        for path in ALL:
            packed = decoder_of(level, path).pack(prefix, spec, pairs, wanted, "w")
            assert torch.equal(unpack_rows(packed, 0, rows), expected), (level, path)


@pytest.mark.parametrize("path", ALL)
def test_a_transposed_weight_is_filled_as_it_is_stored(path):
    ladder = LADDERS[0]
    shells, spec, pairs = linear(ladder, 0, 12, 40, torch.float32, 3)
    from dataclasses import replace

    plain, turned = torch.empty(12, 40), torch.empty(40, 12)
    decoder_of(ladder.levels[0], path).write_(shells[:3], spec, pairs, plain, "w")
    decoder_of(ladder.levels[0], path).write_(shells[:3], replace(spec, transposed=True), pairs, turned, "w")
    assert torch.equal(turned.T, plain)


@pytest.mark.parametrize("path", ALL)
def test_one_decoder_serves_linears_of_all_sizes(path):
    """The memory between is used again: nothing of the larger one may show in the smaller."""
    ladder = LADDERS[0]
    decoder = decoder_of(ladder.levels[-1], path)
    for rows, width, seed in ((9, 320, 1), (2, 40, 2), (9, 320, 3), (3, 80, 4)):
        shells, spec, pairs = linear(ladder, seed, rows, width, torch.bfloat16, 2)
        found, expected = torch.empty(rows, width), torch.empty(rows, width)
        decoder.write_(shells, spec, pairs, found, "w")
        decoder_of(ladder.levels[-1], native.TORCH).write_(shells, spec, pairs, expected, "w")
        assert torch.equal(found, expected)


def damage(shells, number, part, change):
    tensor = shells[number][part].clone()
    change(tensor)
    return [{**shell, part: tensor} if i == number else shell for i, shell in enumerate(shells)]


def flip(position):
    def change(tensor):
        tensor[position // 8] ^= 1 << (position % 8)

    return change


@pytest.mark.parametrize("path", ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_keeps_every_promise(path, data):
    """Never a crash, never a row with another count, whatever bit of masks or positions changes."""
    ladder = data.draw(st.sampled_from(LADDERS[:3]))
    shells, spec, _ = linear(ladder, 7, 4, 160, torch.float32, 0)
    number = data.draw(st.integers(0, len(shells) - 1))
    part = next(part for part in shells[number] if part != "values")
    size = shells[number][part].numel()
    if not size:
        return
    changed = damage(shells, number, part, flip(data.draw(st.integers(0, 8 * size - 1))))
    for level in ladder.levels:
        out = torch.empty(4, 160)
        try:
            decoder_of(level, path).write_(changed[: num_shells(ladder, level)], spec, [], out, "w")
        except CheckpointError as error:
            assert "shell" in str(error) or "rows keep" in str(error)
            continue
        if level.pattern is None:
            assert ((out != 0).sum(1) <= spec.kept[level.index]).all()
        else:
            kept, group = level.pattern
            assert ((out != 0).reshape(4, -1, group).sum(-1) <= kept).all()


@pytest.mark.parametrize("path", ALL)
def test_shapes_are_checked_before_anything_is_read(path):
    ladder = LADDERS[0]
    shells, spec, _ = linear(ladder, 0, 4, 160, torch.float32, 0)
    short = [{**shells[0], "mask": shells[0]["mask"][:-1]}, *shells[1:]]
    with pytest.raises(CheckpointError, match=r"w: shell 0: "):
        decoder_of(ladder.levels[0], path).write_(short[:3], spec, [], torch.empty(4, 160), "w")


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("value", "dtype"), [(3.4e38, torch.bfloat16), (1e6, torch.float16), (float("nan"), torch.float32)]
)
def test_weights_that_are_not_finite_are_named(path, value, dtype):
    ladder = LADDERS[0]
    shells, spec, _ = linear(ladder, 0, 4, 40, torch.float32, 0)
    shells[0]["values"][3] = value
    with pytest.raises(CheckpointError, match=f"model.q: weights are NaN or infinite in {dtype}; try another dtype"):
        decoder_of(ladder.levels[2], path).write_(shells[:1], spec, [], torch.empty(4, 40, dtype=dtype), "model.q")
    if dtype != torch.float16:
        with pytest.raises(CheckpointError, match="model.q: weights are NaN or infinite"):
            decoder_of(ladder.levels[2], path).pack(shells[:1], spec, [], dtype, "model.q")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_finite(dtype, bad):
    weight = torch.ones(70_000, dtype=dtype)
    for path in ALL:
        check_finite(weight, "w", kernels_of(path))
        check_finite(weight.view(2, -1).T, "w", kernels_of(path))
        for position in (0, 69_999):
            changed = weight.clone()
            changed[position] = bad
            with pytest.raises(CheckpointError, match="w: weights are NaN"):
                check_finite(changed, "w", kernels_of(path))
