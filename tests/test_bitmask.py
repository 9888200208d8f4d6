"""A weight as values and bits: the layout by hand, every bit back, and damage named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.bitmask import compress, restore
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.precision import as_integers


def test_the_layout_by_hand():
    weight = torch.zeros(2, 10)
    weight[0, 0], weight[0, 9], weight[1, 3] = 1.0, 2.0, 3.0
    parts = compress(weight)
    assert parts["compressed"].tolist() == [1.0, 2.0, 3.0]
    assert (
        parts["bitmask"].tolist() == [[0b00000001, 0b00000010], [0b00001000, 0]]
        and parts["bitmask"].dtype == torch.uint8
    )
    assert parts["shape"].tolist() == [2, 10] and parts["row_offsets"].tolist() == [0, 2]
    assert parts["shape"].dtype == parts["row_offsets"].dtype == torch.int64


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(0, 9999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_every_bit_comes_back(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < 0.6] = 0
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    found = restore(compress(weight))
    assert found.dtype == dtype and torch.equal(as_integers(found), as_integers(weight))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("bitmask", lambda x: x[:, :1], r"bitmask: found \(4, 1\) torch.uint8, expected \(4, 2\) uint8"),
        ("bitmask", lambda x: x | 0x80, "padding bits after a row's last weight are set"),
        ("compressed", lambda x: x[1:], r"compressed: \(19,\) values for 20 bits"),
        ("row_offsets", lambda x: x + 1, "row_offsets that do not fit them; the file is damaged"),
        ("shape", lambda x: x[:1], r"shape: found \[4\], expected two positive sizes"),
        ("shape", lambda x: x[0], "shape: found 4, expected two positive sizes"),
        ("shape", lambda x: x.double(), r"shape: found \[4.0, 10.0\], expected two positive sizes"),
        ("compressed", lambda x: x.to(torch.uint8), "compressed: found torch.uint8, expected float32, bfloat16"),
    ],
)
def test_damage_is_named(part, change, message):
    weight = torch.ones(4, 10)
    weight[:, ::2] = 0
    parts = compress(weight)
    with pytest.raises(ShapeError, match=message):
        restore({**parts, part: change(parts[part])})
    with pytest.raises(ShapeError, match=f"no {part}; a bitmask weight has"):
        restore({name: tensor for name, tensor in parts.items() if name != part})
