"""Matrices, turns and permutations inside a block, for every family: equal logits, and what must be refused."""

import pytest
import torch
from exact import VARIANTS, changed, logits, model_of, random, random_orders, weights

from elastic_sparsity.absorption import pair_named, scale_pair_
from elastic_sparsity.arch import decoder_blocks, weight_OI
from elastic_sparsity.errors import AbsorptionError, NumericsError, ShapeError, UnsupportedModelError
from elastic_sparsity.folding import TOLERANCES, check_function_kept
from elastic_sparsity.rotation import mix_values_, permute_mlp_, permute_values_, turn_query_key_
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model
from elastic_sparsity.wiring import Heads, heads_of, mlp_rows

# RoPE pairs of a head; families that have none to turn are those that the test below expects to be refused.
TURNED = {
    "llama": 4,
    "mistral": 4,
    "qwen2": 4,
    "gemma2": 4,
    "phi3": 4,
    "gpt_neox": 1,
    "llama-biases": 4,
    "llama-one-kv-head": 4,
    "llama-tied": 4,
    "gemma2-biases": 4,
    "phi3-half-rotary": 2,
    "gpt_neox-half-rotary": 2,
    "gpt_neox-sequential": 1,
}


def random_factors(block, config, seed=0):
    heads = heads_of(block, config)
    angle, size = random(2, len(heads.key_KC), heads.pairs, seed=seed)
    return torch.polar(2**size, 3 * angle)


def random_matrices(block, config, seed=0):
    """Neither diagonal nor orthogonal, of condition 16 at most, so that float32 can tell a fold from an error."""
    num_kv, size = heads_of(block, config).value_KC.shape
    turned = torch.linalg.qr(random(num_kv, size, size, seed=seed)).Q
    return turned * 2 ** random(num_kv, 1, size, seed=seed).clamp(-2, 2)


def mix(block, config, seed):
    mix_values_(block, config, random_matrices(block, config, seed))


def turn(block, config, seed):
    turn_query_key_(block, config, random_factors(block, config, seed))


def reorder_values(block, config, seed):
    permute_values_(block, config, random_orders(*heads_of(block, config).value_KC.shape, seed=seed))


def reorder_mlp(block, config, seed):
    permute_mlp_(block, config, random_orders(len(mlp_rows(block, config)[0][1]), seed=seed))


EVERYWHERE = (mix, reorder_values, reorder_mlp)
EVERY_CHANGE = [*((v, change) for v in VARIANTS for change in EVERYWHERE), *((v, turn) for v in TURNED)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("variant", "change"), EVERY_CHANGE)
def test_the_function_is_kept(variant, change, dtype):
    model = model_of(variant, dtype)
    before, old = logits(model), weights(model)
    for index, block in enumerate(decoder_blocks(model)):
        change(block, model.config, seed=index)
    fused = change is turn and ("phi3" in variant or "gpt_neox" in variant)
    assert len([name for name in changed(old, model) if name.endswith("weight")]) >= (2 if fused else 4)
    check_function_kept(before, logits(model), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_pairs_are_those_of_the_table(variant):
    model = model_of(variant)
    block = decoder_blocks(model)[0]
    old = weights(model)
    if variant in TURNED:
        assert heads_of(block, model.config).pairs == TURNED[variant]
        return
    with pytest.raises(AbsorptionError, match="has (no RoPE|norms on queries and keys); expected RoPE alone"):
        turn_query_key_(block, model.config, torch.ones(2, 4, dtype=torch.complex128))
    assert not changed(old, model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_a_diagonal_matrix_is_a_scale(family):
    """v -> A v with A = 1 / s is what `scale_pair_` does with s, and a real turn c is its q_k with s = c."""
    scaled, mixed = model_of(family), model_of(family)
    block = decoder_blocks(scaled)[0]
    shape = heads_of(block, scaled.config).value_KC.shape
    scales = 2 ** random(*shape)
    scale_pair_(block, pair_named(block, scaled.config, "v_o"), scales.flatten())
    mix_values_(decoder_blocks(mixed)[0], mixed.config, torch.diag_embed(1 / scales))
    for name, parameter in scaled.named_parameters():
        torch.testing.assert_close(mixed.get_parameter(name), parameter, rtol=1e-13, atol=0)


def test_a_real_turn_is_a_scale():
    scaled, turned = model_of("llama"), model_of("llama")
    block = decoder_blocks(scaled)[0]
    factors = random(2, 4)
    scale_pair_(block, pair_named(block, scaled.config, "q_k"), factors.flatten())
    turn_query_key_(decoder_blocks(turned)[0], turned.config, factors.to(torch.complex128))
    for name, parameter in scaled.named_parameters():
        torch.testing.assert_close(turned.get_parameter(name), parameter, rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_permutation_matrix_is_a_permutation(family):
    mixed, permuted = model_of(family), model_of(family)
    block = decoder_blocks(permuted)[0]
    order = random_orders(*heads_of(block, permuted.config).value_KC.shape)
    permute_values_(block, permuted.config, order)
    mix_values_(decoder_blocks(mixed)[0], mixed.config, torch.eye(8, dtype=torch.float64)[order])
    for name, parameter in permuted.named_parameters():
        assert torch.equal(mixed.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_permutations_move_numbers_and_round_none(family, dtype):
    model = model_of(family, dtype)
    block, old = decoder_blocks(model)[0], weights(model)
    order = random_orders(64)
    permute_mlp_(block, model.config, order)
    assert changed(old, model)
    permute_mlp_(block, model.config, order.argsort())
    assert not changed(old, model)


def test_permutations_by_hand():
    model = tiny_model("phi3")
    block, old = decoder_blocks(model)[0], weights(decoder_blocks(model)[0])
    order = random_orders(64)
    permute_mlp_(block, model.config, order)
    gate_up = old["mlp.gate_up_proj.weight"]
    assert torch.equal(block.mlp.gate_up_proj.weight, torch.cat([gate_up[:64][order], gate_up[64:][order]]))
    assert torch.equal(block.mlp.down_proj.weight, old["mlp.down_proj.weight"][:, order])


def test_matrices_change_what_wanda_would_keep():
    """Which scales cannot do: the input norms of the output linear mix."""
    model = model_of("llama")
    out = decoder_blocks(model)[0].self_attn.o_proj
    seen = []
    out.register_forward_pre_hook(lambda _, args: seen.append(args[0].square().sum(dim=(0, 1)).sqrt()))
    ranks = []
    for seed in (0, 1):
        if seed:
            mix(decoder_blocks(model)[0], model.config, seed)
        logits(model)
        ranks.append((weight_OI(out).abs() * seen[-1]).argsort(dim=1))
    assert not torch.equal(*ranks)


@pytest.mark.parametrize("wrong", ["repeat", "transpose"])
def test_a_wrong_matrix_does_not_pass_the_gate(wrong, monkeypatch):
    model = model_of("llama")
    before, block = logits(model), decoder_blocks(model)[0]
    heads = heads_of(block, model.config)
    parts = {name: getattr(heads, name) for name in Heads.__slots__}
    matrices = random(2, 8, 8)
    if wrong == "repeat":  # query heads 0, 2 read key/value head 0, and not 0, 1 as repeat_kv has it
        parts["out_KRC"] = heads.out_KRC.reshape(2, 2, 8).transpose(0, 1)
    else:
        monkeypatch.setattr(torch.linalg, "inv", lambda matrix: matrix.mT)
    monkeypatch.setattr("elastic_sparsity.rotation.heads_of", lambda *_: Heads(**parts))
    mix_values_(block, model.config, matrices)
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize("wrong", ["conjugate", "neighbours", "other_heads"])
def test_a_wrong_turn_does_not_pass_the_gate(wrong, monkeypatch):
    model = model_of("llama")
    before, block = logits(model), decoder_blocks(model)[0]
    heads = heads_of(block, model.config)
    parts = {name: getattr(heads, name) for name in Heads.__slots__}
    if wrong == "conjugate":
        monkeypatch.setattr(torch.Tensor, "conj", lambda factors: factors)
    elif wrong == "neighbours":  # channels 2 p and 2 p + 1, as GPT-J turns them
        half = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        parts["key_KC"], parts["query_KRC"] = heads.key_KC[:, half], heads.query_KRC[:, :, half]
    else:
        parts["query_KRC"] = heads.query_KRC.transpose(0, 1)
    monkeypatch.setattr("elastic_sparsity.rotation.heads_of", lambda *_: Heads(**parts))
    turn_query_key_(block, model.config, random_factors(block, model.config))
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_a_permutation_of_half_the_mlp_does_not_pass_the_gate(family, monkeypatch):
    model = model_of(family)
    before, block = logits(model), decoder_blocks(model)[0]
    monkeypatch.setattr("elastic_sparsity.rotation._permute_inputs_", lambda *_: None)
    permute_mlp_(block, model.config, random_orders(64))
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


SINGULAR = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
SINGULAR[1, 3, 3] = 0
NEARLY = SINGULAR.clone()
NEARLY[1, 3, 3] = 1e-6


@pytest.mark.parametrize(
    ("fold", "argument", "error", "message"),
    [
        (mix_values_, SINGULAR, AbsorptionError, "that of head 1 has singular values from 0.0e.00 to 1.0e.00"),
        (mix_values_, SINGULAR * 0, AbsorptionError, "that of head 0 has singular values from 0.0"),
        (mix_values_, NEARLY, AbsorptionError, "from 1.0e-06 to 1.0e.00; expected a condition below 1e.05"),
        (mix_values_, SINGULAR[:1], ShapeError, r"found shape \(1, 8, 8\); expected \(2, 8, 8\)"),
        (mix_values_, SINGULAR / 0, NumericsError, "128 of 128 values are NaN"),
        (mix_values_, SINGULAR.long(), AbsorptionError, "found torch.int64; expected real floats"),
        (turn_query_key_, torch.zeros(2, 4, dtype=torch.complex64), AbsorptionError, "found a zero or torch.complex64"),
        (turn_query_key_, torch.ones(2, 4), AbsorptionError, "found a zero or torch.float32"),
        (turn_query_key_, torch.ones(2, 3, dtype=torch.complex64), ShapeError, r"\(2, 3\); expected \(2, 4\)"),
        (turn_query_key_, torch.ones(2, 4, dtype=torch.complex64) / 0, NumericsError, "NaN or infinite"),
        (permute_values_, torch.zeros(2, 8, dtype=torch.int64), AbsorptionError, "every index from 0 to 7 once"),
        (permute_values_, torch.arange(8), ShapeError, r"found shape \(8,\); expected \(2, 8\)"),
        (permute_mlp_, torch.arange(64.0), AbsorptionError, r"torch.float32; expected int64"),
        (permute_mlp_, torch.arange(1, 65), AbsorptionError, "every index from 0 to 63 once"),
        (permute_mlp_, torch.arange(63), ShapeError, r"mlp.down_proj's inputs: found shape \(63,\)"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(fold, argument, error, message):
    model = tiny_model("llama")
    old = weights(model)
    with pytest.raises(error, match=f"(?s){message}"):
        fold(decoder_blocks(model)[0], model.config, argument)
    assert not changed(old, model)


def test_weights_that_are_not_there_are_refused():
    """On the meta device a permutation would do nothing, and say nothing."""
    model = tiny_model("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match="down_proj: found torch.float32 weights on meta; expected floats"):
        permute_mlp_(decoder_blocks(model)[0], model.config, torch.arange(64))
    model = tiny_model("llama")
    down = decoder_blocks(model)[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="down_proj: found torch.int8 weights on cpu; expected floats"):
        permute_mlp_(decoder_blocks(model)[0], model.config, torch.arange(64))
