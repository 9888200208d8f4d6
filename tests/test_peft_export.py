"""Adapters in PEFT: its merge plus the masks is the level; it can be trained on; without the masks the zeros fill."""

import json

import pytest
import torch
from peft import PeftModel

from elastic_sparsity import ElasticModel, export_peft, reapply_masks_
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, LevelError

IDS = torch.arange(4, 36).reshape(2, 16)


def with_adapters(checkpoint, adapters, level, trainable=False):
    """The masked base of a level with its groups' adapters on it, as the README says."""
    model = ElasticModel.from_pretrained(checkpoint, level, merge_adapters=False)
    names = json.loads((adapters / "levels.json").read_text())["levels"][level]
    model = PeftModel.from_pretrained(model, adapters / names[0], adapter_name=names[0], is_trainable=trainable)
    for name in names[1:]:
        model.load_adapter(adapters / name, adapter_name=name, is_trainable=trainable)
    model.base_model.set_adapter(names)
    return model


@pytest.mark.parametrize("level", ["0.5", "0.7", "2:4"])
def test_peft_merge_and_masks_give_the_level(tiny_checkpoint, tmp_path, level):
    assert export_peft(tiny_checkpoint, tmp_path / "a") == ["group-0", "group-1", "group-2", "group-3"]
    merged = with_adapters(tiny_checkpoint, tmp_path / "a", level).merge_and_unload()
    expected = ElasticModel.from_pretrained(tiny_checkpoint, level)
    assert reapply_masks_(merged, tiny_checkpoint, level) > 0, "PEFT's own merge fills zeros"
    for name in ElasticCheckpoint(tiny_checkpoint).linears:
        found, wanted = weight_OI(merged.get_submodule(name)), weight_OI(expected.get_submodule(name))
        assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(found == 0, wanted == 0)
    assert reapply_masks_(merged, tiny_checkpoint, level) == 0


def test_training_goes_on_in_peft_and_keeps_the_zeros(tiny_checkpoint, tmp_path):
    export_peft(tiny_checkpoint, tmp_path / "a", level="60%")
    model = with_adapters(tiny_checkpoint, tmp_path / "a", "0.6", trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    reapply_masks_(merged, tiny_checkpoint, "60%")
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    for name, linear in checkpoint.level_linears(checkpoint.find("60%")):
        assert not weight_OI(merged.get_submodule(name))[~linear.mask_OI].any()


def test_gpt2_adapters_fit_its_transposed_linears(tmp_path):
    from conftest import tiny_recipe

    from elastic_sparsity import optimize

    optimize(tiny_recipe(model={"id": "random:gpt2"}), tmp_path / "c")
    export_peft(tmp_path / "c", tmp_path / "a")
    merged = with_adapters(tmp_path / "c", tmp_path / "a", "0.6").merge_and_unload()
    reapply_masks_(merged, tmp_path / "c", 0.6)
    expected = ElasticModel.from_pretrained(tmp_path / "c", 0.6)
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, expected(IDS).logits, atol=1e-5)


def test_masks_refuse_another_model(tiny_checkpoint, tmp_path):
    export_peft(tiny_checkpoint, tmp_path / "a", level=0.6)
    wrapped = with_adapters(tiny_checkpoint, tmp_path / "a", "0.6")
    with pytest.raises(CheckpointError, match="merge and unload PEFT first"):
        reapply_masks_(wrapped, tiny_checkpoint, 0.6)
    with pytest.raises(LevelError, match="it has"):
        reapply_masks_(ElasticModel.from_pretrained(tiny_checkpoint, 0.6), tiny_checkpoint, 0.9)
    with pytest.raises(LevelError, match="it has"):
        export_peft(tiny_checkpoint, tmp_path / "b", level=0.9)
    assert not (tmp_path / "b").exists()


def test_masks_are_put_back_on_all_linears_or_none(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.5)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(3, 3)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.raises(CheckpointError, match="down_proj: found a weight"):
        reapply_masks_(model, tiny_checkpoint, 0.7)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
