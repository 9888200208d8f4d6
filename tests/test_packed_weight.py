"""Packed weights and the compiled kernels: every instruction path of this CPU against plain torch in float64.

The torch functions of packed_weight.py are the oracle of the compiled ones, and are checked on a worked example.
"""

import copy
import pickle
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity import native
from elastic_sparsity.errors import ConfigError, ShapeError
from elastic_sparsity.packed_weight import (
    SLACK,
    mask_of_words,
    pack_weight,
    product,
    unpack_rows,
    words_of,
)

USABLE = [path.name for path in native.instruction_paths() if path.problem is None and path.name != native.TORCH]
DTYPES = (torch.float32, torch.bfloat16)
needs_library = pytest.mark.skipif(not USABLE, reason="the package was installed without a C++ compiler")


def random_sparse(rows, width, sparsity, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random).to(dtype)
    return weight, torch.rand(rows, width, generator=random) >= sparsity


def test_a_worked_example():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    packed = pack_weight(weight, torch.tensor([[True, False, True], [False, False, False]]), torch.float32)
    assert packed.mask_OW.tolist() == [[0b101], [0]]
    assert packed.values[:-SLACK].tolist() == [1.0, 3.0] and packed.values[-SLACK:].tolist() == [0.0] * SLACK
    assert packed.starts.tolist() == [0, 2, 2]
    assert unpack_rows(packed, 0, 2).tolist() == [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    assert product(packed, torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([0.5, 7.0])).tolist() == [[301.5, 7.0]]
    assert packed.num_bytes == 2 * 8 + (2 + SLACK) * 4 + 3 * 8


@given(st.lists(st.booleans(), max_size=300))
def test_words_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert words_of(mask).numel() == -(-len(bits) // 64)
    assert mask_of_words(words_of(mask), len(bits)).tolist() == bits


def test_the_portable_path_is_always_there():
    paths = {path.name: path.problem for path in native.instruction_paths()}
    assert set(paths) == {*native.KNOWN_PATHS, native.TORCH} and paths[native.TORCH] is None
    if USABLE:
        assert USABLE[-1] == "portable" and native.active_path() == USABLE[0]


def test_a_library_is_built_where_there_is_a_compiler():
    if shutil.which("g++") or shutil.which("clang++"):
        assert USABLE, native.instruction_paths()


@needs_library
@pytest.mark.parametrize("path", USABLE)
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 576, 1024])),
    tokens=st.integers(1, 19),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.97, 1.0]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_equal_dense_ones(path, rows, width, tokens, sparsity, dtype, has_bias, seed):
    """Up to the rounding of float32 sums, and of one bfloat16 result."""
    weight, mask = random_sparse(rows, width, sparsity, dtype, seed)
    if rows > 2:
        mask[1] = False  # an empty row
    packed = pack_weight(weight, mask, dtype)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    found = native.kernels_of(path).product(packed, x, bias)
    exact = x.double() @ (weight * mask).double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ (weight * mask).double().abs().T + 1
    assert found.dtype == dtype and found.shape == (tokens, rows)
    tolerance = size * 1e-6 + (exact.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
    assert ((found.double() - exact).abs() <= tolerance).all()


@needs_library
@pytest.mark.parametrize("path", USABLE)
@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 300), sparsity=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES), data=st.data(),
)  # fmt: skip
def test_unpacked_rows_are_the_dense_ones_bit_for_bit(path, rows, width, sparsity, dtype, data):
    weight, mask = random_sparse(rows, width, sparsity, dtype)
    packed = pack_weight(weight, mask, dtype)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    out = torch.full((end - begin, width), torch.nan, dtype=dtype)
    native.kernels_of(path).unpack_rows_(packed, begin, out)
    assert torch.equal(out, torch.where(mask, weight, 0)[begin:end])
    assert torch.equal(unpack_rows(packed, begin, end), out)


@needs_library
@pytest.mark.parametrize("path", USABLE)
@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 200), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_packing_and_rounding_equal_torch(path, rows, width, dtype, seed):
    weight, mask = random_sparse(rows, width, 0.6, torch.float32, seed)
    weight[0, 0], mask[0, 0] = 1e-40, True  # subnormal
    kernels, bits = native.kernels_of(path), words_of(mask)
    expected = pack_weight(weight, mask, dtype)
    found = kernels.pack(weight, bits, dtype)
    for part in ("mask_OW", "values", "starts"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    out = torch.full((rows, width), torch.nan, dtype=dtype)
    assert kernels.finish_(weight.view(-1), bits, out)
    assert torch.equal(out, torch.where(mask, weight, 0).to(dtype))
    assert not (torch.signbit(out) & ~mask).any(), "dropped weights must be +0"


@needs_library
@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("position", [0, 77, 128])
def test_what_is_not_finite_is_seen_only_where_kept(path, dtype, bad, position):
    """3.4e38 is finite in float32 and rounds to infinity in bfloat16."""
    kernels = native.kernels_of(path)
    weight, mask = torch.ones(1, 129), torch.ones(1, 129, dtype=torch.bool)
    weight[0, position] = bad
    is_bad = dtype == torch.bfloat16 or bad != 3.4e38
    out = torch.empty(1, 129, dtype=dtype)
    assert kernels.finish_(weight.view(-1), words_of(mask), out) is not is_bad
    assert (kernels.pack(weight, words_of(mask), dtype) is None) is is_bad
    mask[0, position] = False
    assert kernels.finish_(weight.view(-1), words_of(mask), out) and out[0, position] == 0
    assert kernels.pack(weight, words_of(mask), dtype) is not None


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    weight, mask = random_sparse(700, 512, 0.5, torch.bfloat16)
    packed, x = pack_weight(weight, mask, torch.bfloat16), torch.ones(3, 512, dtype=torch.bfloat16)
    kernels, before = native.kernels(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = kernels.product(packed, x, None)
        torch.set_num_threads(threads)
        assert torch.equal(kernels.product(packed, x, None), expected)
        out = torch.empty(700, 512, dtype=torch.bfloat16)
        kernels.unpack_rows_(packed, 0, out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, torch.where(mask, weight, 0))


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' torch may bring another OpenMP")
def test_torchs_threads_are_found():
    assert native.has_threads()


@needs_library
def test_a_library_of_another_build_is_refused(monkeypatch, tmp_path):
    damaged = tmp_path / "_kernels.so"
    damaged.write_bytes(b"no library")
    loading = native._library.__wrapped__
    monkeypatch.setattr(native, "library_file", lambda: damaged)
    with pytest.raises(ConfigError, match="another build or machine .*reinstall the package .*KERNELS=torch"):
        loading()
    monkeypatch.undo()
    monkeypatch.setattr(native, "_VERSION", 99)
    with pytest.raises(ConfigError, match=r"another build or machine \(2\), expected version 99"):
        loading()


@needs_library
def test_a_path_can_be_named(monkeypatch):
    for path in USABLE:
        monkeypatch.setenv(native.VARIABLE, path)
        assert native.active_path() == path
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert native.kernels() is None
    monkeypatch.setenv(native.VARIABLE, "mmx")
    with pytest.raises(
        ConfigError, match=r"ELASTIC_SPARSITY_KERNELS: 'mmx' cannot run here; it may be auto, .*torch\."
    ):
        native.kernels()


@needs_library
def test_kernels_can_be_copied_and_pickled():
    kernels = native.kernels()
    assert copy.deepcopy(kernels) is kernels and pickle.loads(pickle.dumps(kernels)) is kernels


def test_without_the_library_torch_serves(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: None)
    assert native.kernels() is None and native.active_path() == "torch"
    problems = {path.name: path.problem for path in native.instruction_paths()}
    assert problems.pop("torch") is None
    assert all("without a supported C++ compiler" in problem for problem in problems.values())


@needs_library
def test_damaged_shells_are_refused():
    kernels = native.kernels()
    covered, out = torch.zeros(2, dtype=torch.int64), torch.zeros(100)
    mask = torch.zeros(13, dtype=torch.uint8)
    mask[12] = 0b10000  # bit 100 of 100
    with pytest.raises(ShapeError, match="padding bits"):
        kernels.place_core_(mask, torch.zeros(4), covered, out)
    mask[12] = 0
    mask[0] = 0b11111
    with pytest.raises(ShapeError, match="more positions than its 4 values"):
        kernels.place_core_(mask, torch.zeros(4), covered, out)
    with pytest.raises(ShapeError, match="more positions than its 4 values"):
        kernels.place_bitmap_(mask, torch.zeros(4), covered, None, out)
