"""Hidden states on disk or in host memory behave like the tensor they hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity.activations import DISK, ActivationStore, DiskActivations, HostActivations
from elastic_sparsity.errors import OutputError

CPU = torch.device("cpu")


@given(
    rows=st.lists(st.integers(0, 8), min_size=1, unique=True),
    tokens=st.integers(1, 4),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_indexed_like_a_tensor(rows, tokens, width, dtype, seed, tmp_path_factory):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), tokens, width)
    expected = torch.randn(shape, generator=generator).to(dtype)
    path = tmp_path_factory.mktemp("a") / "x.activations"
    for held in (DiskActivations(path, rows, 9, shape[1:], dtype, CPU), HostActivations(shape, dtype, CPU)):
        half = len(rows) // 2
        held[half : len(rows)] = expected[half:].float()  # cast as it is stored
        held[0:half] = expected[:half]
        chosen = torch.randint(len(rows), (3,), generator=generator)
        assert (tuple(held.shape), held.dtype) == (shape, dtype)
        assert torch.equal(held[chosen], expected[chosen])
        assert torch.equal(held[:], expected)


def test_workers_share_a_file(tmp_path):
    whole = torch.arange(24.0).view(6, 2, 2)
    parts = [DiskActivations(tmp_path / "x", rows, 6, (2, 2), torch.float32, CPU) for rows in ([0, 2, 4], [1, 3, 5])]
    for part, start in zip(parts, (0, 1), strict=True):
        assert not part.is_whole()
        part[0:3] = whole[start::2]
    assert all(part.is_whole() for part in parts)
    assert torch.equal(DiskActivations(tmp_path / "x", range(6), 6, (2, 2), torch.float32, CPU)[:], whole)


def test_a_file_that_became_shorter_is_named(tmp_path):
    held = DiskActivations(tmp_path / "x", range(3), 3, (2, 2), torch.float32, CPU)
    held[0:3] = torch.ones(3, 2, 2)
    (tmp_path / "x").write_bytes(b"1" * 20)
    assert not held.is_whole()
    with pytest.raises(OutputError, match="x: became shorter"):
        held[torch.tensor([2])]
    (tmp_path / "x").unlink()
    with pytest.raises(OutputError, match="cannot be read"):
        held[:]
    with pytest.raises(OutputError, match="cannot be written"):
        DiskActivations(tmp_path / "none" / "x", range(1), 1, (1, 1), torch.float32, CPU)[0:1] = torch.ones(1, 1, 1)


def test_a_disk_that_refuses_the_bytes_only_as_it_syncs(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elastic_sparsity.activations.sync_path", full)
    store = ActivationStore(tmp_path, "device", [0], 1, CPU)
    with pytest.raises(OutputError, match="x.activations: cannot be written: .*No space left"):
        store.save("x", torch.ones(1, 2, 2))


@pytest.mark.parametrize("where", ["device", "host", DISK])
def test_what_is_saved_is_loaded_and_the_rest_removed(where, tmp_path):
    store = ActivationStore(tmp_path, where, range(3), 3, CPU)
    for name in ("a", "b"):
        made = store.new(name, (2, 2), torch.float32)
        made[0:3] = torch.full((3, 2, 2), 7.0)
        store.save(name, made)
    store.keep_only(["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["b.activations"]
    assert store.load("a", (2, 2), torch.float32) is None
    assert torch.equal(store.load("b", (2, 2), torch.float32)[:], torch.full((3, 2, 2), 7.0))
