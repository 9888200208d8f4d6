"""A device's smaller download and its upgrade: the same bytes as a download of that level, or nothing changed."""

import shutil

import pytest
from test_checkpoint import flip

from elastic_sparsity import ElasticModel, add_structured, copy_level, optimize, upgrade
from elastic_sparsity.errors import CheckpointError, LevelError, OutputError
from elastic_sparsity.report import parse_bytes


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_holds_only_its_level(tiny_checkpoint, tmp_path):
    copied = copy_level(tiny_checkpoint, "70%", tmp_path / "device")
    names = {name for name in contents(tmp_path / "device") if name.endswith(".safetensors")}
    assert names == {entry.file for entry in copied.files_of(copied.find(0.7))}
    assert sum(map(len, contents(tmp_path / "device").values())) == copied.download_bytes(copied.find(0.7))
    ElasticModel.from_pretrained(tmp_path / "device")  # "auto" finds it
    with pytest.raises(CheckpointError, match="upgrade"):
        ElasticModel.from_pretrained(tmp_path / "device", 0.5)


@pytest.mark.parametrize("level", ["0.6", "0.5", "2:4"])
def test_upgraded_equals_downloaded_bit_for_bit(tiny_checkpoint, tmp_path, level):
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    written = upgrade(tmp_path / "device", tiny_checkpoint, level)
    copy_level(tiny_checkpoint, level, tmp_path / "direct")
    upgraded, direct = contents(tmp_path / "device"), contents(tmp_path / "direct")
    assert {name: upgraded[name] for name in direct} == direct
    assert all(name.startswith(("shell-level", "shell-pattern", "adapters-3")) for name in written)
    assert upgrade(tmp_path / "device", tiny_checkpoint, level) == []


def test_an_upgrade_repairs_what_is_damaged(tiny_checkpoint, tmp_path):
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    (tmp_path / "device" / "shell-core.safetensors").write_bytes(b"x")
    assert upgrade(tmp_path / "device", tiny_checkpoint, 0.7) == ["shell-core.safetensors"]
    ElasticModel.from_pretrained(tmp_path / "device", 0.7)


def test_another_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    from conftest import tiny_recipe

    optimize(tiny_recipe(block={"steps": 0}, end_to_end={"trainable": "off"}), tmp_path / "other")
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    before = contents(tmp_path / "device")
    with pytest.raises(CheckpointError, match="cannot be upgraded from"):
        upgrade(tmp_path / "device", tmp_path / "other", 0.6)
    assert contents(tmp_path / "device") == before


def test_a_damaged_source_changes_nothing_that_was_whole(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "source")
    flip(tmp_path / "source" / "shell-level-0.6.safetensors")
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    before = contents(tmp_path / "device")
    with pytest.raises(CheckpointError, match="the source is damaged"):
        upgrade(tmp_path / "device", tmp_path / "source", 0.6)
    assert contents(tmp_path / "device") == before
    with pytest.raises(CheckpointError, match="the source is damaged"):
        copy_level(tmp_path / "source", 0.6, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_level_made_apart_is_told_from_a_damaged_one(tiny_checkpoint, settings, tmp_path):
    """Both list structured-0.5 and are the same checkpoint: nothing is copied, and nobody's file is called damaged."""
    for name, seed in (("mine", 0), ("source", 3)):
        shutil.copytree(tiny_checkpoint, tmp_path / name)
        add_structured(tmp_path / name, [0.5], **{**settings, "seed": seed})
    copy_level(tmp_path / "mine", "structured-0.5", tmp_path / "device")
    assert upgrade(tmp_path / "device", tmp_path / "source", "structured-0.5") == [], "it is whole"
    (tmp_path / "device" / "structured-0.5.safetensors").unlink()
    before = contents(tmp_path / "device")
    for source in ("source", tiny_checkpoint):  # the second has no such level
        with pytest.raises(CheckpointError, match=r"its structured-0.5\S* is not that of .* added to them apart"):
            upgrade(tmp_path / "device", tmp_path / source, "structured-0.5")
        assert contents(tmp_path / "device") == before
    assert upgrade(tmp_path / "device", tmp_path / "mine", "structured-0.5") == ["structured-0.5.safetensors"]


def test_taken_output_and_unknown_level(tiny_checkpoint, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="already holds"):
        copy_level(tiny_checkpoint, 0.7, tmp_path)
    with pytest.raises(LevelError, match="it has"):
        copy_level(tiny_checkpoint, 0.8, tmp_path / "new")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("60MB", 60_000_000),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("77", 77),
        ("3kB", 3000),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "12 apples", "-5MB", "5iB", "1e9"])
def test_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
