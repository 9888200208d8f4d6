"""One-shot pruning of a whole tiny model by every method: exact counts, what its calibration sees, who wins."""

import copy
from contextlib import nullcontext

import pytest
import torch

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.baselines import METHODS, prune_one_shot_
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.importance import importance_scores
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import WHOLE_MATRIX, drop_levels, mask_at, matrix_mask
from elastic_sparsity.tiny import tiny_model

LADDER = Ladder(sparsities=(0.5, 0.7), patterns=("2:4",))
IDS = torch.randint(0, 200, (6, 24), generator=torch.Generator().manual_seed(0))


def pruned(method, level, family="llama"):
    model = tiny_model(family)
    prune_one_shot_(model, IDS, level, method, autocast=nullcontext)
    return model


def linears_of(model):
    row = architecture_of(model.config.model_type)
    return [weight_OI(block.get_submodule(path)) for block in decoder_blocks(model) for path in row.linears]


@pytest.fixture(scope="module")
def dense():
    """Of every block of the dense model: its linears, and the statistics of their inputs on the dense stream."""
    model, found = tiny_model("llama"), []
    blocks = list(decoder_blocks(model))
    runner = BlockRunner(model.base_model, blocks, IDS, 4)
    hidden = runner.first_hidden()
    for index, block in enumerate(blocks):
        call = runner.call(index)
        linears = {path: block.get_submodule(path) for path in architecture_of("llama").linears}
        statistics = block_statistics(
            runner, call, linears, [hidden], gram=False, means=True, autocast=nullcontext, where=str(index)
        )
        found.append((linears, statistics))
        hidden = runner.map(call, hidden)
    return found


@pytest.fixture(scope="module")
def by_wanda():
    """The whole model at 70 %."""
    return pruned("wanda", LADDER.levels[1])


@pytest.mark.parametrize("level", LADDER.levels, ids=lambda level: level.name)
@pytest.mark.parametrize("method", METHODS)
def test_counts(method, level):
    before = tiny_model("llama").state_dict()
    model = pruned(method, level)
    for weight in linears_of(model):
        kept = weight != 0
        if level.pattern:
            assert (kept.view(weight.shape[0], -1, 4).sum(-1) == 2).all()
        elif method in (*WHOLE_MATRIX, "sparsegpt"):
            assert abs(float(kept.float().mean()) - (1 - level.sparsity)) < 0.02
        else:
            assert kept.sum(1).unique().numel() == 1
    others = {name: tensor for name, tensor in model.state_dict().items() if "_proj" not in name}
    assert others
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())


@pytest.mark.parametrize("method", ["magnitude", "ria"])
def test_the_first_block_by_hand(method, dense):
    """Compared within a matrix: rows may keep different numbers."""
    linears, found = dense[0]
    after = decoder_blocks(pruned(method, LADDER.levels[0]))[0]
    uneven = 0
    for path, linear in linears.items():
        weight = weight_OI(linear)
        mask = matrix_mask(importance_scores(method, weight, found[path], 0.01, path), 0.5)
        uneven += mask.sum(1).unique().numel() > 1
        assert torch.equal(weight_OI(after.get_submodule(path)), torch.where(mask, weight, 0.0))
    assert uneven


def test_moves_bring_the_mean_output_nearer_to_the_dense_one(dense, by_wanda):
    """Of every linear of the first block, whose inputs are the same for both."""
    linears, found = dense[0]

    def error(model):
        block = decoder_blocks(model)[0]
        lost = {path: weight_OI(x) - weight_OI(block.get_submodule(path)) for path, x in linears.items()}
        return sum(float((w.detach() @ found[path].mean_I.float()).norm()) for path, w in lost.items())

    assert error(pruned("dsnot", LADDER.levels[1])) < 0.9 * error(by_wanda)


def test_the_next_block_sees_the_pruned_ones(dense, by_wanda):
    """Statistics of the dense stream would give the last block other masks."""
    (linears, found), path = dense[-1], "mlp.down_proj"
    scores = importance_scores("wanda", weight_OI(linears[path]), found[path], 0.01, path)
    by_dense = mask_at(drop_levels(scores, [keep_count(scores.shape[1], 0.7)]), 0)
    kept = weight_OI(decoder_blocks(by_wanda)[-1].get_submodule(path)) != 0
    assert kept.sum() == by_dense.sum()
    assert not torch.equal(kept, by_dense)


def test_magnitude_runs_no_token():
    """Every linear's largest weights of the whole matrix; a model that cannot run is pruned all the same."""
    model, before = tiny_model("llama"), linears_of(tiny_model("llama"))
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    prune_one_shot_(model, IDS, LADDER.levels[1], "magnitude", autocast=nullcontext)
    for dense, weight in zip(before, linears_of(model), strict=True):
        assert torch.equal(weight, torch.where(matrix_mask(dense.abs(), 0.7), dense, 0.0))


def test_unknown_method():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="method 'wando' is unknown; expected one of magnitude, wanda, ria"):
        prune_one_shot_(model, IDS, LADDER.levels[0], "wando", autocast=nullcontext)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
