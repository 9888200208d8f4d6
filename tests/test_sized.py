"""Models whose blocks differ in size: of every family, cut = masked; on disk and back; damaged fields are refused."""

import copy
import json

import pytest
import torch
from conftest import tiny_recipe
from exact import VARIANTS, model_of
from transformers import AutoModelForCausalLM

from elastic_sparsity.allocating import Allocating, allocate
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.errors import ConfigError, ElasticSparsityError, UnsupportedModelError
from elastic_sparsity.inducing import induce
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.pruning import load_pruned
from elastic_sparsity.sized import causal_lm, heads_may_differ, opened_by, sizes_field, with_sizes
from elastic_sparsity.structured import prune_structured_
from elastic_sparsity.structured_parts import sizes_for, sliced_model
from elastic_sparsity.structured_sizes import Sizes
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.weight_stream import WeightStream, empty_model
from elastic_sparsity.wiring import SIZES_FIELD, heads_of, wiring_of

IDS = torch.randint(4, 260, (6, 32), generator=torch.Generator().manual_seed(0))
AUTOCAST = autocast_factory("float32", "cpu")


@torch.no_grad()
def logits(model):
    return model(IDS[:2], use_cache=False).logits


def unequal(model):
    """(masked model of full size, the cut one); the first block keeps all of its attention, the last all of its MLP."""
    even = sizes_for(model, 0.4, 8)
    groups = (even.num_groups, 1) if heads_may_differ(wiring_of(model.config)) else even.groups
    sizes = Sizes(
        groups=groups, num_groups=even.num_groups, channels=(16, even.num_channels), num_channels=even.num_channels,
        removed=0, total=1,
    )  # fmt: skip
    masked = copy.deepcopy(model)
    kept = prune_structured_(masked, IDS, sizes, at_once=8, autocast=AUTOCAST)
    return masked, sliced_model(masked, kept), sizes


@pytest.fixture
def folder(tmp_path):
    _, cut, _ = unequal(tiny_model("llama"))
    cut.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_equals_masked_and_comes_back_from_disk(variant, tmp_path):
    dense = model_of(variant, torch.float32)
    masked, cut, sizes = unequal(dense)
    assert not torch.allclose(logits(masked), logits(dense), atol=5e-5), "nothing was pruned"
    assert torch.allclose(logits(cut), logits(masked), atol=2e-5)
    row, first, last = wiring_of(dense.config), *decoder_blocks(cut)
    assert [weight_OI(block.get_submodule(row.down)).shape[1] for block in (first, last)] == list(sizes.channels)
    assert sizes_field(cut.config) == (list(sizes.groups), list(sizes.channels))
    for linear in linears_of(cut).values():  # what other tools read must be true, too
        if hasattr(linear, "out_features"):
            assert weight_OI(linear).shape == (linear.out_features, linear.in_features)

    cut.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(dense).__name__]
    back, tokenizer = load_pruned(tmp_path)
    assert torch.equal(logits(back), logits(cut)) and len(tokenizer) > 0
    assert back.num_parameters() == cut.num_parameters()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    assert torch.equal(back.generate(IDS[:2], **options), masked.generate(IDS[:2], **options))
    again = copy.deepcopy(back)
    assert torch.equal(logits(again), logits(cut))
    half = load_pruned(tmp_path, "bfloat16")[0]
    assert half.dtype == torch.bfloat16 and torch.isfinite(logits(half)).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streamed_from_disk_equals_resident(family, tmp_path):
    _, cut, _ = unequal(tiny_model(family))
    cut.save_pretrained(tmp_path)
    model = empty_model(cut.config, tmp_path, torch.float32)
    stream = WeightStream(model, tmp_path, torch.float32, torch.device("cpu"))
    assert not stream.unused
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in cut.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_config_keeps_its_dtype(dtype):
    for channels in ([64, 64], [64, 32]):
        config = with_sizes(tiny_model("llama").config, [2, 2], channels)
        config.dtype = dtype
        assert causal_lm(config).dtype == config.dtype == dtype
        assert causal_lm(config, torch.float16).dtype == torch.float16


def test_equal_blocks_need_no_field(tmp_path):
    model = tiny_model("llama")
    kept = prune_structured_(model, IDS, sizes_for(model, 0.4, 8), at_once=8, autocast=AUTOCAST)
    cut = sliced_model(model, kept)
    assert not hasattr(cut.config, SIZES_FIELD) and sizes_field(cut.config) is None
    cut.save_pretrained(tmp_path)
    assert "AutoModelForCausalLM" in opened_by(tmp_path)


def test_transformers_alone_refuses_it(folder):
    """No silent random weights: the shapes differ."""
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "load_pruned" in opened_by(folder)


def test_it_is_no_base_for_a_run_or_for_more_pruning(folder):
    with pytest.raises(UnsupportedModelError, match="blocks differ in heads and channels"):
        read_shapes(str(folder))
    with pytest.raises(UnsupportedModelError, match="search: this model's blocks differ"):
        allocate(tiny_recipe(model={"id": str(folder)}), Allocating(held_out=2), folder / "plan.json")
    with pytest.raises(UnsupportedModelError, match="induce: this model's blocks differ"):
        induce(tiny_recipe(model={"id": str(folder)}, induction={"steps": 2, "held_out": 2}), folder / "induced")
    model = load_base(str(folder)).model
    with pytest.raises(UnsupportedModelError, match="heads: this model's blocks differ"):
        heads_of(decoder_blocks(model)[1], model.config)
    with pytest.raises(UnsupportedModelError, match="structured pruning: this model's blocks differ"):
        sizes_for(load_base(str(folder)).model, 0.5)


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ([1, 2], "expected lists key_value_heads and channels"),
        ({"channels": [16, 64]}, "expected lists"),
        ({"key_value_heads": [2, 1], "channels": [16, 64], "x": 1}, "expected lists"),
        ({"key_value_heads": [2, 1], "channels": 64}, "channels: found 64; expected 2 numbers from 1 to 64"),
        ({"key_value_heads": [2, 1], "channels": [16]}, "expected 2 numbers"),
        ({"key_value_heads": [2, 1], "channels": [0, 64]}, "numbers from 1 to 64"),
        ({"key_value_heads": [2, 1], "channels": [16, 65]}, "numbers from 1 to 64"),
        ({"key_value_heads": [], "channels": []}, "expected 2 numbers"),
        ({"key_value_heads": [2, True], "channels": [16, 64]}, "key_value_heads: found"),
        ({"key_value_heads": [2.0, 1], "channels": [16, 64]}, "key_value_heads: found"),
        ({"key_value_heads": ["2", 1], "channels": [16, 64]}, "key_value_heads: found"),
    ],
)
def test_a_damaged_field_is_named(folder, field, match):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, SIZES_FIELD: field}))
    with pytest.raises(ConfigError, match=match):
        load_pruned(folder)


def test_fields_that_do_not_fit_the_weights(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw[SIZES_FIELD]["channels"] = [24, 64]
    path.write_text(json.dumps(raw))
    with pytest.raises(ElasticSparsityError, match="size|shape"):
        load_pruned(folder)


def test_heads_of_a_fused_linear_may_not_differ():
    config = tiny_model("phi3").config
    setattr(config, SIZES_FIELD, {"key_value_heads": [config.num_key_value_heads, 1], "channels": [64, 64]})
    with pytest.raises(ConfigError, match="phi3 needs 2 in every block"):
        causal_lm(config)
