"""The streaming writer: the library's bytes, in whatever order tensors come; no wrong, missing or second tensor."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from elastic_sparsity.errors import OutputError, ShapeError
from elastic_sparsity.files import atomic_folder
from elastic_sparsity.tensor_file_writer import DTYPE_NAMES, TensorFileWriter, write_tensors

COMMON = [torch.bfloat16, torch.uint8, torch.float16, torch.float32, torch.int64, torch.bool]
SPECS = {"a": (torch.float32, (2, 3)), "b": (torch.uint8, (5,))}
A, B = torch.arange(6.0).view(2, 3), torch.arange(5, dtype=torch.uint8)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


def random_tensor(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel())
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


@st.composite
def contents(draw):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = st.tuples(st.sampled_from([*COMMON, *DTYPE_NAMES]), shapes, st.integers(0, 99))
    tensors = {name: random_tensor(*kind) for name, kind in draw(st.dictionaries(NAMES, kinds, max_size=7)).items()}
    return tensors, draw(st.permutations(list(tensors))), draw(st.dictionaries(NAMES, st.text(max_size=9), max_size=1))


@settings(max_examples=200, deadline=None)
@given(contents())
def test_bytes_are_those_of_the_library(found):
    tensors, order, metadata = found
    assume(tensors or metadata)  # of nothing at all, the library 0.8.0 makes `{},"__metadata__":{}}`, which is no JSON
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with TensorFileWriter(path, specs, metadata) as file:
            for name in order:
                file.write(name, tensors[name])
        assert path.read_bytes() == save(tensors, metadata=metadata)


def test_any_strides_and_parameters(tmp_path):
    turned = torch.nn.Parameter(A.T)
    write_tensors(tmp_path / "x", {"a": turned, "b": B[::2]}, {})
    assert (tmp_path / "x").read_bytes() == save({"a": A.T.contiguous(), "b": B[::2].contiguous()}, metadata={})


def test_metadata_may_be_replaced_by_such_of_the_same_length(tmp_path):
    with TensorFileWriter(tmp_path / "x", SPECS, {"id": "0" * 32}) as file:
        file.write("a", A)
        file.replace_metadata({"id": "f" * 32})
        with pytest.raises(ShapeError, match="keep its length"):
            file.replace_metadata({"id": "f" * 64})
        file.write("b", B)
    assert (tmp_path / "x").read_bytes() == save({"a": A, "b": B}, metadata={"id": "f" * 32})


def test_wrong_tensors_are_refused_and_named(tmp_path):
    with TensorFileWriter(tmp_path / "x", SPECS, {}) as file:
        with pytest.raises(ShapeError, match="x: c: is not one of its 2 tensors"):
            file.write("c", A)
        with pytest.raises(ShapeError, match=r"x: a: found torch.float32 \(3, 2\), expected torch.float32 \(2, 3\)"):
            file.write("a", A.T)
        with pytest.raises(ShapeError, match=r"x: a: found torch.float16"):
            file.write("a", A.half())
        file.write("a", A)
        with pytest.raises(ShapeError, match="x: a: is written a second time"):
            file.write("a", A)
        file.write("b", B)


def test_a_missing_tensor_is_named_at_the_end(tmp_path):
    with pytest.raises(ShapeError, match=r"1 tensors were never written \(b\)"), TensorFileWriter(
        tmp_path / "x", SPECS, {}
    ) as file:  # fmt: skip
        file.write("a", A)


@pytest.mark.parametrize(
    ("name", "dtype"), [("__metadata__", torch.uint8), ("\ud800", torch.uint8), ("a", torch.complex128)]
)
def test_what_the_format_cannot_hold_is_refused_before_a_file_is_made(name, dtype, tmp_path):
    with pytest.raises(ShapeError, match="no tensor can have this name|cannot be stored"):
        TensorFileWriter(tmp_path / "x", {name: (dtype, (1,))}, {})
    assert not (tmp_path / "x").exists()


def test_an_error_in_the_block_stays_the_error(tmp_path):
    with pytest.raises(KeyError), TensorFileWriter(tmp_path / "x", SPECS, {}):
        raise KeyError("of the block")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_an_os_error(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        TensorFileWriter(tmp_path / "full", SPECS, {})
    with pytest.raises(OutputError, match="cannot be written.*nothing was left behind"), atomic_folder(
        tmp_path / "out"
    ) as scratch:  # fmt: skip
        (scratch / "x").symlink_to("/dev/full")
        write_tensors(scratch / "x", {"a": A}, {})
    assert not (tmp_path / "out").exists()


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "x", {"a": A}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
