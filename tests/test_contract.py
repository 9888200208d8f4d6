"""Every supported family keeps the same promises, on a tiny random model.

Block by block equals the whole model; one training step; save; slice; reload with stock transformers; equal logits.
"""

import pytest
import torch
from conftest import tiny_recipe
from transformers import AutoModelForCausalLM

from elastic_sparsity import ElasticModel, save_sliced
from elastic_sparsity.adapters import elastic_linears, set_level_
from elastic_sparsity.arch import architecture_of, decoder_blocks, head_function, weight_OI
from elastic_sparsity.block_phase import Job, run_block_phase_
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.ladder import keep_count
from elastic_sparsity.models import BaseModel
from elastic_sparsity.pipeline import save_run
from elastic_sparsity.run_folder import run_folder
from elastic_sparsity.tiny import TINY_FAMILIES, byte_tokenizer, tiny_model
from elastic_sparsity.workers import Workers

IDS = torch.arange(4, 4 + 4 * 24).reshape(4, 24) % 260


def train_and_save(family, folder):
    """A tiny model after one step of the block phase, with the checkpoint saved from it."""
    recipe = tiny_recipe(
        model={"id": f"random:{family}"},
        block={"steps": 1, "samples": 4, "base_lr": 1e-2, "adapter_lr": 1e-2},
        checkpoint={"dtype": "float32"},
    )
    model = tiny_model(family)
    model.requires_grad_(False)
    base = BaseModel(model, byte_tokenizer(), {"id": family, "sha256": ""})
    with run_folder(folder) as run:
        job = Job(
            recipe=recipe,
            base=base,
            token_ids_ST=IDS,
            trainable="base",
            precision="float32",
            activations="device",
            workers=Workers(),
            folder=run,
            generator=torch.Generator().manual_seed(0),
            progress=lambda *_: None,
        )
        _, mixed = run_block_phase_(job)
        save_run(job, folder, {}, torch.float32, mixed)
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_block_by_block_and_head_equal_the_whole_model(family):
    model = tiny_model(family)
    expected = model(IDS).logits
    runner = BlockRunner(model, list(decoder_blocks(model)), IDS, batch_size=3)
    hidden = runner.first_hidden()
    for index in range(len(runner.blocks)):
        hidden = runner.map(runner.call(index), hidden)
    handle = decoder_blocks(model)[-1].register_forward_hook(lambda *_: hidden)
    try:
        found = model(IDS).logits
    finally:
        handle.remove()
    assert torch.allclose(found, expected, atol=1e-5)
    body = model.base_model(IDS, use_cache=False).last_hidden_state
    assert torch.allclose(head_function(model)(body), expected, atol=1e-5)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_train_save_slice_reload(family, tmp_path):
    original = tiny_model(family)
    model = train_and_save(family, tmp_path / "checkpoint")
    checkpoint = ElasticCheckpoint(tmp_path / "checkpoint")
    row = architecture_of(model.config.model_type)
    names = [f"{row.blocks}.{index}.{path}" for index in range(2) for path in row.linears]
    assert sorted(name for name, _ in elastic_linears(model)) == sorted(names)
    kept = {}
    for level in checkpoint.ladder.levels:
        set_level_(model, level)
        with torch.no_grad():
            expected = model(IDS).logits
        loaded = ElasticModel.from_pretrained(tmp_path / "checkpoint", level.name)
        save_sliced(tmp_path / "checkpoint", level.name, tmp_path / level.name.replace(":", "of"))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / level.name.replace(":", "of"), dtype=torch.float32)
        for sliced in (loaded, stock):
            with torch.no_grad():
                assert torch.allclose(sliced(IDS).logits, expected, atol=1e-5), level
        for name in names:
            weight = weight_OI(stock.get_submodule(name))
            nonzero = weight != 0
            if level.pattern:
                assert (nonzero.reshape(weight.shape[0], -1, level.pattern[1]).sum(-1) == level.pattern[0]).all()
            else:
                assert (nonzero.sum(1) == keep_count(weight.shape[1], level.sparsity)).all()
                assert name not in kept or (nonzero & ~kept[name]).sum() == 0, "a sparser level keeps something new"
                kept[name] = nonzero
    assert not torch.allclose(loaded(IDS).logits, original(IDS).logits, atol=1e-3), "nothing was pruned"


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_dense_original_survives_training(family, tmp_path):
    model = train_and_save(family, tmp_path / "checkpoint")
    set_level_(model, None)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny_model(family)(IDS).logits, atol=1e-5)


def test_every_table_row_is_tested():
    for family in TINY_FAMILIES:
        assert architecture_of(tiny_model(family).config.model_type).linears
