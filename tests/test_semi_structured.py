"""2:4 packing against torch's own, bit for bit; and honest errors where no GPU can multiply with it.

The products themselves are tested only where there is a CUDA GPU of capability 8.0; no such machine has run them yet.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse._semi_structured_conversions import (  # private: the reference of the layout, imported only here
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from elastic_sparsity import semi_structured
from elastic_sparsity.errors import ConfigError, ShapeError, UnsupportedModelError
from elastic_sparsity.precision import as_integers
from elastic_sparsity.semi_structured import (
    median_seconds,
    pack_2of4,
    semi_structured_problem,
    time_2of4,
    to_semi_structured_,
    unpack_2of4,
)
from elastic_sparsity.tiny import tiny_model

needs_gpu = pytest.mark.skipif(semi_structured_problem() is not None, reason=str(semi_structured_problem()))
HALF, WHOLE = (torch.float16, torch.bfloat16), torch.int8


def random_2of4(rows, columns, dtype, seed, kept=2):
    """A weight with at most `kept` of 4 values, some groups with fewer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-100, 100, (rows, columns), generator=generator)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight[(order >= kept).view(rows, columns)] = 0
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return weight.to(dtype)


def bits(tensor):
    return tensor if tensor.dtype == torch.int8 else as_integers(tensor)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4))


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 9999), st.sampled_from([*HALF, WHOLE]))
def test_packing_is_torchs_and_every_bit_comes_back(size, seed, dtype):
    tile = (16, 64) if dtype == WHOLE else (32, 32)
    weight = random_2of4(size[0] * tile[0], size[1] * tile[1], dtype, seed)
    packed, meta = pack_2of4(weight)
    expected = sparse_semi_structured_from_dense_cutlass(weight)
    assert meta.dtype == expected[1].dtype and torch.equal(meta, expected[1])
    assert torch.equal(bits(packed), bits(expected[0]))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)
    assert torch.equal(bits(unpack_2of4(packed, meta)), bits(weight))


def test_a_kept_minus_zero_survives():
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[3, 5], weight[3, 6] = -0.0, 1.0
    assert torch.equal(as_integers(unpack_2of4(*pack_2of4(weight))), as_integers(weight))


def test_a_group_by_hand():
    weight = torch.zeros(32, 32, dtype=torch.float16)
    weight[0, 1], weight[0, 3] = 5.0, 7.0  # indices 1 and 3: bits 0b1101; the seven empty groups: 2 and 3, 0b1110
    packed, meta = pack_2of4(weight)
    assert packed[0, :2].tolist() == [5.0, 7.0] and packed.count_nonzero() == 2
    words = meta.view(-1).long() & 0xFFFF
    assert words[0] == 0xEEED and (words[1:] == 0xEEEE).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ShapeError, match=r"dtype torch.float32: the 2:4 layout holds float16, bfloat16, int8"):
        pack_2of4(torch.zeros(32, 32))
    with pytest.raises(
        ShapeError, match=r"shape \(32, 48\): the 2:4 layout of torch.float16 takes multiples of \(32, 32\)"
    ):
        pack_2of4(torch.zeros(32, 48, dtype=torch.float16))
    weight = torch.zeros(32, 32, dtype=torch.float16)
    weight[5, 8:11] = 1
    with pytest.raises(ShapeError, match="not 2:4: row 5, columns 8 to 11 hold 3 values; expected at most 2 of 4"):
        pack_2of4(weight)
    packed, meta = pack_2of4(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"meta: found \(32, 4\) torch.int32, expected \(32, 4\) torch.int16"):
        unpack_2of4(packed, meta.to(torch.int32))
    with pytest.raises(ShapeError, match="second index is not above its first"):
        unpack_2of4(packed, torch.zeros_like(meta))
    with pytest.raises(ShapeError, match=r"packed: found \(2048,\)"):
        unpack_2of4(packed.view(-1).repeat(2), meta)


def test_devices_that_cannot_are_named(monkeypatch):
    assert "cpu is no NVIDIA GPU" in semi_structured_problem("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in semi_structured_problem()
    with pytest.raises(ConfigError, match="cannot be timed: torch finds no CUDA GPU"):
        time_2of4([(64, 64)], [1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    assert semi_structured_problem() == "Tesla T4 has compute capability 7.5; 2:4 products need 8.0 (Ampere)."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert semi_structured_problem("cuda:0") is None
    with pytest.raises(ConfigError, match=r"2:4 shapes \[\(64, 48\)\]: the kernels of torch.float16 take"):
        time_2of4([(64, 64), (64, 48)], [1])
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in semi_structured_problem()
    monkeypatch.delattr(torch.sparse, "to_sparse_semi_structured")
    assert "install torch >= 2.8" in semi_structured_problem("cpu")


def test_calls_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(semi_structured.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        log.append(name)
        now[0] += seconds * (100 if len(log) <= 6 else 1)

    found = median_seconds([lambda: call("a", 2.0), lambda: call("b", 1.0)], repeats=3)
    assert found == [2.0, 1.0] and log == ["a", "b"] * 6


def test_swapping_weights_says_what_is_wrong_and_changes_nothing(monkeypatch):
    model = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    before = {key: id(value) for key, value in model.named_parameters()}
    with pytest.raises(ConfigError, match="to_semi_structured_: cpu is no NVIDIA GPU"):
        to_semi_structured_(model, [name])
    with pytest.raises(UnsupportedModelError, match=r"lm_tail: no such linear"):
        to_semi_structured_(model, ["lm_tail"])
    with pytest.raises(UnsupportedModelError, match="found LlamaRMSNorm, expected nn.Linear"):
        to_semi_structured_(model, ["model.norm"])
    with pytest.raises(UnsupportedModelError, match="found Conv1D, expected nn.Linear; GPT-2's transposed"):
        to_semi_structured_(tiny_model("gpt2"), ["transformer.h.0.attn.c_attn"])
    monkeypatch.setattr(semi_structured, "semi_structured_problem", lambda device: None)
    with pytest.raises(ShapeError, match=r"1 linears do not fit 2:4 products: .*down_proj is \(32, 64\) torch.float32"):
        to_semi_structured_(model, [name])
    model.half()
    with pytest.raises(ShapeError, match="down_proj keeps more than 2 of 4"):
        to_semi_structured_(model, [name])
    assert {key: id(value) for key, value in model.named_parameters()} == before


def test_swapping_calls_torch_with_the_weight(monkeypatch):
    """On the CPU torch's own packing stands in for the GPU's check; the product is not run."""
    linear = nn.Linear(64, 32, bias=False, dtype=torch.float16)
    linear.weight = nn.Parameter(random_2of4(32, 64, torch.float16, 0))
    seen = []
    monkeypatch.setattr(semi_structured, "semi_structured_problem", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: seen.append(weight) or weight.clone())
    model, weight = nn.Sequential(linear), linear.weight
    to_semi_structured_(model, ["0"])
    assert torch.equal(seen[0], weight) and linear.weight is not weight and not linear.weight.requires_grad


@needs_gpu
def test_the_gpu_multiplies_with_the_packed_weights():
    linear = nn.Linear(256, 128, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        linear.weight.copy_(random_2of4(128, 256, torch.float16, 0) / 100)
    inputs = torch.randn(64, 256, dtype=torch.float16, device="cuda")
    expected = linear(inputs)
    to_semi_structured_(nn.Sequential(linear), ["0"])
    assert torch.allclose(linear(inputs), expected, atol=1e-2, rtol=1e-2)


@needs_gpu
def test_the_gpu_is_timed():
    rows = time_2of4([(256, 256)], [1, 64], repeats=3)
    assert [row.batch for row in rows] == [1, 64] and all(row.ratio > 0 for row in rows)
