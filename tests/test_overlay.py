"""Overlay: no weight of the base in it, the same files after restoring, a clear no where the base was trained."""

import json

import pytest
from conftest import tiny_recipe
from safetensors.torch import load_file
from test_checkpoint import flip
from test_transfer import contents

from elastic_sparsity import copy_level, optimize, restore_overlay, upgrade, verify, write_overlay
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError
from elastic_sparsity.manifest import OVERLAY_NAME
from elastic_sparsity.models import load_base
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

UNTRAINED_BASE = {"block": {"steps": 1, "base_lr": 0.0}, "end_to_end": {"trainable": "adapters", "steps": 2}}


@pytest.fixture(params=["llama", "gpt2"])
def untrained(request, tmp_path):
    optimize(tiny_recipe(model={"id": f"random:{request.param}"}, **UNTRAINED_BASE), tmp_path / "whole")
    return tmp_path / "whole"


def test_restored_is_the_same_bit_for_bit(untrained, tmp_path):
    write_overlay(untrained, tmp_path / "overlay")
    floats = [
        name
        for path in (tmp_path / "overlay").glob("s*.safetensors")
        for name, tensor in load_file(path).items()
        if tensor.is_floating_point()
    ]
    assert floats == [], "no value of the base"
    restore_overlay(tmp_path / "overlay", tmp_path / "again")
    whole, again = contents(untrained), contents(tmp_path / "again")
    del whole["run.json"]  # no part of the checkpoint
    assert whole.keys() == again.keys() and all(whole[n] == again[n] for n in whole if n != "elastic_config.json")
    assert ElasticCheckpoint(tmp_path / "again").config == ElasticCheckpoint(untrained).config


def test_a_trained_base_has_no_overlay(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"differs from random:llama: no overlay"):
        write_overlay(tiny_checkpoint, tmp_path / "overlay")
    assert not (tmp_path / "overlay").exists()


def test_another_base_is_refused(untrained, tmp_path):
    write_overlay(untrained, tmp_path / "overlay")
    with pytest.raises(CheckpointError, match=r"holds other weights .* than the base"):
        restore_overlay(tmp_path / "overlay", tmp_path / "again", base="random:qwen3")
    assert not (tmp_path / "again").exists()


def test_an_overlay_is_named_when_opened_as_a_checkpoint(untrained, tmp_path):
    write_overlay(untrained, tmp_path / "overlay")
    with pytest.raises(CheckpointError, match="overlay: `elastic-sparsity restore`"):
        ElasticCheckpoint(tmp_path / "overlay")
    with pytest.raises(CheckpointError, match="no overlay here"):
        restore_overlay(untrained, tmp_path / "again")


def test_damage_is_named(untrained, tmp_path):
    write_overlay(untrained, tmp_path / "overlay")
    adapters = tmp_path / "overlay" / "adapters-0.safetensors"
    flip(adapters)
    with pytest.raises(CheckpointError, match="adapters-0.safetensors"):
        restore_overlay(tmp_path / "overlay", tmp_path / "again")
    adapters.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        restore_overlay(tmp_path / "overlay", tmp_path / "again")
    (tmp_path / "overlay" / "shell-core.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shell-core.safetensors: cannot be read"):
        restore_overlay(tmp_path / "overlay", tmp_path / "again")
    (tmp_path / "overlay" / "elastic_overlay.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="elastic_overlay.json: cannot be read"):
        restore_overlay(tmp_path / "overlay", tmp_path / "again")


def test_an_upgraded_copy_has_an_overlay_too(untrained, tmp_path):
    copy_level(untrained, 0.7, tmp_path / "device")
    for level in ("0.6", "0.5", "2:4"):
        upgrade(tmp_path / "device", untrained, level)
    write_overlay(tmp_path / "device", tmp_path / "overlay")
    restore_overlay(tmp_path / "overlay", tmp_path / "again")
    assert all(check.passed for check in verify(tmp_path / "again"))


def test_a_base_loaded_in_another_dtype_than_stored(tmp_path):
    tiny_model("llama").half().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe = tiny_recipe(
        model={"id": str(tmp_path / "base"), "dtype": "bfloat16"}, checkpoint={"dtype": "bfloat16"}, **UNTRAINED_BASE
    )
    optimize(recipe, tmp_path / "whole")
    (tmp_path / "base").rename(tmp_path / "moved")
    write_overlay(tmp_path / "whole", tmp_path / "overlay", base=str(tmp_path / "moved"))
    assert str(tmp_path / "moved") not in (tmp_path / "overlay" / OVERLAY_NAME).read_text(), "a private path"
    restore_overlay(tmp_path / "overlay", tmp_path / "again", base=str(tmp_path / "moved"))
    assert all(check.passed for check in verify(tmp_path / "again"))


@pytest.mark.parametrize("config", ["missing", None, "text"])
def test_an_overlay_without_a_config_is_damaged(config, tmp_path, untrained):
    write_overlay(untrained, tmp_path / "overlay")
    path = tmp_path / "overlay" / OVERLAY_NAME
    data = json.loads(path.read_text())
    del data["config"]
    path.write_text(json.dumps(data if config == "missing" else {**data, "config": config}))
    with pytest.raises(CheckpointError, match=OVERLAY_NAME):
        restore_overlay(tmp_path / "overlay", tmp_path / "again")


def test_the_public_id_of_the_base_is_kept(untrained, tmp_path):
    recorded = ElasticCheckpoint(untrained).config["base_model"]["id"]
    load_base(recorded).model.save_pretrained(tmp_path / "here")
    byte_tokenizer().save_pretrained(tmp_path / "here")
    write_overlay(untrained, tmp_path / "overlay", base=str(tmp_path / "here"))
    restore_overlay(tmp_path / "overlay", tmp_path / "again")
