"""The residual stream permuted or rotated, for every family: equal logits, ties kept, and what must be refused."""

import pytest
import torch
from exact import VARIANTS, changed, logits, model_of, random, random_orders, weights
from transformers import AutoModelForCausalLM

from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.errors import AbsorptionError, NumericsError, ShapeError, UnsupportedModelError
from elastic_sparsity.folding import TOLERANCES, check_function_kept
from elastic_sparsity.residual import permute_residual_, rotate_residual_
from elastic_sparsity.tiny import tiny_model

PERMUTED = [variant for variant in VARIANTS if variant != "opt-350m"]
ROTATED = [v for v in VARIANTS if v.startswith(("llama", "mistral", "qwen", "phi3"))]
# Why the others are refused.
UNROTATED = {
    "gemma2": "different gains on a branch's output",
    "gemma3_text": "different gains on a branch's output",
    "gemma2-biases": "different gains on a branch's output",
    "opt": "found a LayerNorm",
    "gpt_neox": "found a LayerNorm",
    "gpt2": "found a LayerNorm",
    "opt-350m": "embeddings of width 16; expected the model's 32",
    "gpt_neox-half-rotary": "found a LayerNorm",
    "gpt_neox-sequential": "found a LayerNorm",
}


def rotation(seed=0, width=32):
    return torch.linalg.qr(random(width, width, seed=seed)).Q


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def reloaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()


def test_every_variant_is_in_a_list():
    assert {*ROTATED, *UNROTATED} == set(VARIANTS)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", PERMUTED)
def test_a_permutation_keeps_function_and_ties(variant, dtype, tmp_path):
    model = model_of(variant, dtype)
    before, old, tied = logits(model), weights(model), is_tied(model)
    permute_residual_(model, random_orders(32))
    assert is_tied(model) == tied == model.config.tie_word_embeddings
    inner = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias", "fc1.bias", "c_fc.bias")
    inner += ("q_norm.weight", "k_norm.weight", "c_attn.bias", "query_key_value.bias", "h_to_4h.bias")
    assert {name for name in old if not name.endswith(inner)} == changed(old, model)
    check_function_kept(before, logits(model), dtype)
    if dtype == torch.float32:
        stock = reloaded(model, tmp_path)
        assert is_tied(stock) == tied
        assert torch.equal(logits(stock), logits(model))


@pytest.mark.parametrize("variant", PERMUTED)
def test_a_permutation_and_its_inverse_are_nothing(variant):
    model = model_of(variant, torch.bfloat16)
    old, order = weights(model), random_orders(32)
    permute_residual_(model, order)
    permute_residual_(model, order.argsort())
    assert not changed(old, model)


def test_a_rotation_refuses_float16_before_it_changes_anything():
    model = model_of("llama", torch.float16)
    old = weights(model)
    with pytest.raises(AbsorptionError, match="found float16 weights"):
        rotate_residual_(model, rotation())
    assert (
        not changed(old, model) and model.config.tie_word_embeddings == tiny_model("llama").config.tie_word_embeddings
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ROTATED)
def test_a_rotation_keeps_the_function(variant, dtype, tmp_path):
    model = model_of(variant, dtype)
    before, tied = logits(model), is_tied(model)
    added = rotate_residual_(model, rotation())
    assert added == (260 * 32 if tied else 0)
    assert not is_tied(model) and model.config.tie_word_embeddings is False
    for block in decoder_blocks(model):
        assert torch.equal(block.input_layernorm.weight, torch.ones(32, dtype=dtype))
    check_function_kept(before, logits(model), dtype)
    model.tie_weights()
    assert not is_tied(model), "transformers would tie it again"
    if dtype == torch.float32:
        stock = reloaded(model, tmp_path)
        assert not is_tied(stock)
        assert torch.equal(logits(stock), logits(model))


def test_a_tied_head_stays_tied_where_the_final_gain_is_the_same_for_all_channels(tmp_path):
    model = model_of("llama-tied", torch.float32)
    model.model.norm.weight.data.fill_(1.5)
    before = logits(model)
    assert rotate_residual_(model, rotation()) == 0
    assert is_tied(model) and model.config.tie_word_embeddings
    check_function_kept(before, logits(model), torch.float32)
    assert is_tied(reloaded(model, tmp_path))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_rotates_if_the_gains_after_its_branches_are_equal(family):
    model = model_of(family)
    for block in decoder_blocks(model):
        block.post_attention_layernorm.weight.data.fill_(0.25)
        block.post_feedforward_layernorm.weight.data.fill_(-0.5)
    before = logits(model)
    assert rotate_residual_(model, rotation()) == 260 * 32
    assert torch.equal(decoder_blocks(model)[0].input_layernorm.weight, torch.zeros(32, dtype=torch.float64))
    check_function_kept(before, logits(model), torch.float64)


def test_a_zero_gain_folds_too():
    """A scale of a pair may not be zero; a gain that is has a place in the weights."""
    model = model_of("llama")
    decoder_blocks(model)[0].input_layernorm.weight.data[5] = 0
    before = logits(model)
    rotate_residual_(model, rotation())
    check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize("variant", UNROTATED)
def test_models_that_no_rotation_keeps_are_refused_and_stay(variant):
    model = model_of(variant)
    old = weights(model)
    with pytest.raises(AbsorptionError, match=UNROTATED[variant]):
        rotate_residual_(model, rotation())
    assert not changed(old, model) and model.config.tie_word_embeddings == is_tied(model)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "gemma2"])
def test_a_refused_rotation_would_change_the_function(family, monkeypatch):
    model = model_of(family)
    before = logits(model)
    monkeypatch.setattr("elastic_sparsity.residual._check_norms", lambda *_: None)
    rotate_residual_(model, rotation())
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


def test_a_permutation_of_embeddings_of_another_width_is_refused():
    model = model_of("opt-350m")
    old = weights(model)
    with pytest.raises(AbsorptionError, match="embed_tokens: found embeddings of width 16; .*OPT-350M"):
        permute_residual_(model, random_orders(32))
    assert not changed(old, model)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (rotation() * 1.001, AbsorptionError, r"R\^T R differs from 1 by up to 2.0e-03; expected at most 1e-10"),
        (rotation().float(), AbsorptionError, "differs from 1 by up to .*e-0[78].*float64"),
        (rotation(width=16), ShapeError, r"found shape \(16, 16\); expected \(32, 32\)"),
        (rotation() / 0, NumericsError, "are NaN or infinite"),
    ],
)
def test_matrices_that_are_no_rotation_are_refused(matrix, error, message):
    model = tiny_model("llama")
    old = weights(model)
    with pytest.raises(error, match=message):
        rotate_residual_(model, matrix)
    assert not changed(old, model)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (torch.zeros(32, dtype=torch.int64), AbsorptionError, r"\[0, 0, .* every index from 0 to 31 once"),
        (torch.arange(31), ShapeError, r"found shape \(31,\); expected \(32,\)"),
    ],
)
def test_orders_that_are_no_permutation_are_refused(order, error, message):
    model = tiny_model("llama")
    old = weights(model)
    with pytest.raises(error, match=message):
        permute_residual_(model, order)
    assert not changed(old, model)


@pytest.mark.parametrize(
    "change", [lambda m: permute_residual_(m, random_orders(32)), lambda m: rotate_residual_(m, rotation())]
)
def test_a_parameter_without_a_place_is_refused(change):
    model = tiny_model("llama")
    model.model.extra = torch.nn.Linear(32, 32)
    old = weights(model)
    with pytest.raises(UnsupportedModelError, match="model.extra.weight, model.extra.bias: found 2 parameters"):
        change(model)
    assert not changed(old, model)


def test_a_rotated_weight_is_rounded_once():
    model = model_of("gemma2", torch.bfloat16)
    block = decoder_blocks(model)[0]
    for other in decoder_blocks(model):
        other.post_attention_layernorm.weight.data.zero_()
        other.post_feedforward_layernorm.weight.data.zero_()
    old = weights(block)
    rotate_residual_(model, rotation())
    gain = 1 + old["pre_feedforward_layernorm.weight"].double()
    up = (old["mlp.up_proj.weight"].double() * gain) @ rotation()
    torch.testing.assert_close(block.mlp.up_proj.weight, up.to(torch.bfloat16), rtol=0, atol=1e-6)
    down = rotation().T @ old["mlp.down_proj.weight"].double()
    torch.testing.assert_close(block.mlp.down_proj.weight, down.to(torch.bfloat16), rtol=0, atol=1e-6)


def test_large_matrices_are_done_in_parts(monkeypatch):
    whole, parts = model_of("llama-tied"), model_of("llama-tied")
    rotate_residual_(whole, rotation())
    monkeypatch.setattr("elastic_sparsity.residual.NUMBERS_AT_ONCE", 32 * 7)
    rotate_residual_(parts, rotation())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("change", [permute_residual_, rotate_residual_])
def test_weights_that_are_not_there_are_refused(change):
    model = tiny_model("llama").to("meta")
    with pytest.raises(
        UnsupportedModelError, match="embed_tokens: found no values .meta device.; load the model first"
    ):
        change(model, None)
