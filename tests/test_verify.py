"""`verify` passes on what the writer wrote and names the promise that a changed file breaks."""

import json
import shutil

import pytest
from conftest import tiny_recipe
from safetensors.torch import load_file, save_file
from test_checkpoint import flip

from elastic_sparsity import copy_level, optimize, verify
from elastic_sparsity.checkpoint_writer import file_entry
from elastic_sparsity.inspection import layer_types
from elastic_sparsity.manifest import CONFIG_NAME, digest
from elastic_sparsity.tiny import TINY_FAMILIES


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_verifies(family, dtype, tmp_path):
    recipe = tiny_recipe(
        model={"id": f"random:{family}"}, checkpoint={"dtype": dtype}, block={"steps": 1}, end_to_end={"steps": 1}
    )
    optimize(recipe, tmp_path / "c")
    checks = verify(tmp_path / "c")
    assert len(checks) == 7 and all(check.passed for check in checks), checks


def test_a_part_of_a_checkpoint_verifies(tiny_checkpoint, tmp_path):
    copy_level(tiny_checkpoint, 0.6, tmp_path / "device")
    checks = verify(tmp_path / "device")
    assert [check.passed for check in checks] == [True] * 4 and "1 of 4 levels" in checks[1].detail


def changed(source, folder, file, change):
    """A copy of a checkpoint with one file's tensors changed and its hash made right again."""
    copy_level(source, "2:4", folder)
    tensors = load_file(folder / file)
    change(tensors)
    config = json.loads((folder / CONFIG_NAME).read_text())
    save_file(tensors, folder / file, metadata={"elastic_checkpoint": config["checkpoint_id"]})
    for entries in config["files"].values():
        for number, entry in enumerate(entries):
            if entry["file"] == file:
                entries[number] = file_entry(folder, folder / file)
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "digest": digest(config)}))
    return {check.name.split(":")[0]: check for check in verify(folder)}


NAME = "model.layers.1.mlp.up_proj"


def test_a_broken_pattern_is_named(tiny_checkpoint, tmp_path):
    def four_of_four(tensors):
        tensors[f"{NAME}.mask"][0] = 0xFF

    checks = changed(tiny_checkpoint, tmp_path / "c", "shell-pattern-2of4.safetensors", four_of_four)
    found = checks["exact counts a row, N"]
    assert not found.passed and found.detail.startswith(NAME)


def test_a_flipped_bit_is_named(tiny_checkpoint, tmp_path):
    copy_level(tiny_checkpoint, 0.7, tmp_path / "c")
    flip(tmp_path / "c" / "shell-core.safetensors")
    (only,) = verify(tmp_path / "c")
    assert not only.passed and "shell-core.safetensors: sha256 differs" in only.detail


def test_layer_types_count_all_linears(tiny_checkpoint):
    types = {kind.name: kind for kind in layer_types(tiny_checkpoint)}
    assert set(types) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert types["down_proj"].count == 2 and types["down_proj"].weights == 2 * 32 * 64
    assert types["down_proj"].sparsity[0] == 0.5 and types["down_proj"].sparsity[3] == 0.5


def test_a_file_that_no_level_reads_is_checked_too(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    flip(tmp_path / "c" / "mixer.safetensors")
    (only,) = verify(tmp_path / "c")
    assert not only.passed and "mixer.safetensors: sha256 differs" in only.detail


def test_large_ranks_verify(tmp_path):
    optimize(tiny_recipe(adapters={"ranks": 300}, block={"steps": 1}, end_to_end={"steps": 1}), tmp_path / "c")
    assert all(check.passed for check in verify(tmp_path / "c"))
