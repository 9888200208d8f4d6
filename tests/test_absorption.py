"""Scales and shifts folded into every family: equal logits, in float64 to 1e-10; and what must be refused."""

import re
from dataclasses import replace

import pytest
import torch
from exact import IDS, VARIANTS, changed, logits, model_of, random, random_scales, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from elastic_sparsity.absorption import (
    PAIR_NAMES,
    pair_named,
    round_gains_,
    scale_pair_,
    scale_pairs,
    shift_pair_,
    shift_pairs,
)
from elastic_sparsity.adapters import replace_module_
from elastic_sparsity.arch import ARCHITECTURES, architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.errors import AbsorptionError, NumericsError, ShapeError, UnsupportedModelError
from elastic_sparsity.folding import TOLERANCES, check_function_kept
from elastic_sparsity.importance import InputStatistics, magnitude_scores, wanda_scores
from elastic_sparsity.masks import drop_levels
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model
from elastic_sparsity.wiring import WIRINGS, wiring_of


def test_a_small_gain_is_rounded_without_loss():
    """Gemma stores gain - 1, which a narrow dtype cannot tell from -1; its linears take the rest up."""
    for family in ("gemma2", "llama", "opt"):
        model = model_of(family)
        offset = WIRINGS[family].gain_offset
        with torch.no_grad():
            for block in decoder_blocks(model):
                norm = block.get_submodule(WIRINGS[family].attention_norm)
                norm.weight.copy_(random(32))
                norm.weight[:4] = torch.tensor([0.03, 1e-3, -1e-3, 0.0], dtype=torch.float64) - offset
        before, narrow = logits(model), torch.bfloat16
        for block in decoder_blocks(model):
            round_gains_(block, model.config, narrow)
            weight = block.get_submodule(WIRINGS[family].attention_norm).weight
            assert torch.allclose(weight.to(narrow).double(), weight, rtol=0, atol=1e-12), family
            assert ((weight + offset).sign()[:4] == torch.tensor([1, 1, -1, 0])).all()
        check_function_kept(before, logits(model), torch.float64)


GLU = {"norm_qkv": 32, "q_k": 8, "v_o": 16, "norm_mlp": 32, "up_down": 64}
NO_QK = {name: count for name, count in GLU.items() if name != "q_k"}
PLAIN = {"norm_qkv": 32, "q_k": 32, "v_o": 32, "norm_mlp": 32}
SHIFTS = ("norm_qkv", "v_o", "norm_mlp")
# Free values of every pair, and which pairs shift. A pair that the code drops fails here.
EXPECTED = {
    "llama": (GLU, ()),
    "mistral": (GLU, ()),
    "qwen2": (GLU, ()),
    "qwen3": (NO_QK, ()),
    "gemma2": (GLU, ()),
    "gemma3_text": (NO_QK, ()),
    "phi3": (GLU, ()),
    "opt": ({**PLAIN, "fc1_fc2": 64}, SHIFTS),
    "gpt_neox": ({**PLAIN, "q_k": 28}, SHIFTS),
    "gpt2": (PLAIN, SHIFTS),
    "opt-350m": ({"q_k": 32, "v_o": 32, "fc1_fc2": 64}, ("v_o",)),
    "llama-biases": (GLU, ("v_o",)),
    "llama-one-kv-head": ({**GLU, "q_k": 4, "v_o": 8}, ()),
    "llama-tied": (GLU, ()),
    "gemma2-biases": (GLU, ("v_o",)),
    "qwen3-wide-heads": ({**NO_QK, "v_o": 32}, ()),
    "phi3-half-rotary": ({**GLU, "q_k": 12}, ()),
    "gpt_neox-half-rotary": ({**PLAIN, "q_k": 24}, SHIFTS),
    "gpt_neox-sequential": ({**PLAIN, "q_k": 28}, SHIFTS),
}
EVERY_PAIR = [(variant, name) for variant, (pairs, _) in EXPECTED.items() for name in pairs]
EVERY_SHIFT = [(variant, name) for variant, (_, shifts) in EXPECTED.items() for name in shifts]
EVERY_REFUSAL = [
    (variant, name) for variant in TINY_FAMILIES for name in PAIR_NAMES if name not in EXPECTED[variant][0]
]


def first_block(model):
    return decoder_blocks(model)[0]


def test_the_table_covers_every_family():
    assert set(WIRINGS) == set(ARCHITECTURES)
    assert set(EXPECTED) == set(VARIANTS) >= set(TINY_FAMILIES)
    for variant in TINY_FAMILIES:
        config = model_of(variant).config
        row = wiring_of(config)
        paths = {*row.attention_inputs, row.out, *row.mlp_inputs, row.down}
        assert paths == set(architecture_of(config.model_type).linears)


@pytest.mark.parametrize("variant", EXPECTED)
def test_pairs_are_those_of_the_table(variant):
    model = model_of(variant)
    pairs, shifts = EXPECTED[variant]
    for block in decoder_blocks(model):
        found = scale_pairs(block, model.config)
        assert {pair.name: pair.num_values for pair in found} == pairs
        assert [pair.name for pair in found] == [name for name in PAIR_NAMES if name in pairs]
        assert {pair.name for pair in shift_pairs(block, model.config)} == set(shifts)
        assert {pair.name for pair in found if pair.positive} == {"fc1_fc2"} & set(pairs)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("variant", "name"), EVERY_PAIR)
def test_scales_keep_the_function(variant, name, dtype):
    model = model_of(variant, dtype)
    before, old = logits(model), weights(model)
    for index, block in enumerate(decoder_blocks(model)):
        pair = pair_named(block, model.config, name)
        scale_pair_(block, pair, random_scales(pair, seed=index))
        paths = {f"layers.{index}.", f"h.{index}."}
        sides = {side.path for side in (*pair.multiplied, *pair.divided)}
        for side in sides:
            assert any(f"{path}{side}.weight" in key for path in paths for key in changed(old, model)), side
    check_function_kept(before, logits(model), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("variant", "name"), EVERY_SHIFT)
def test_shifts_keep_the_function(variant, name, dtype):
    model = model_of(variant, dtype)
    before, old = logits(model), weights(model)
    for index, block in enumerate(decoder_blocks(model)):
        pair = pair_named(block, model.config, name)
        shift_pair_(block, pair, random(pair.num_values, seed=index))
        scale_pair_(block, pair, random_scales(pair, seed=index))
    assert len(changed(old, model)) >= 4
    check_function_kept(before, logits(model), dtype)


@pytest.mark.parametrize("variant", ["gemma2", "opt", "gpt_neox"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), octaves=st.floats(0, 10))
def test_all_pairs_one_after_another_keep_the_function(variant, seed, octaves):
    """Whatever the scales are: up to 2^10 up and down, of both signs where that is allowed."""
    model = model_of(variant)
    before = logits(model)
    for block in decoder_blocks(model):
        for pair in scale_pairs(block, model.config):
            scales = random_scales(pair, seed)
            scale_pair_(block, pair, scales.sign() * scales.abs() ** (octaves / 2))
    check_function_kept(before, logits(model), torch.float64)


def test_by_hand():
    """Scale 2 on input channel 3 of q, k and v: their columns double, and so does 1 / gain; the rest stays."""
    model = tiny_model("gemma2")
    block, old = first_block(model), weights(first_block(model))
    pair = pair_named(block, model.config, "norm_qkv")
    scales = torch.ones(32)
    scales[3] = 2.0
    scale_pair_(block, pair, scales)
    assert pair.consumers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    for path in pair.consumers:
        expected = old[f"{path}.weight"]
        expected[:, 3] *= 2
        assert torch.equal(block.get_submodule(path).weight, expected)
    gain = old["input_layernorm.weight"]
    gain[3] = (1 + gain[3]) / 2 - 1
    torch.testing.assert_close(block.input_layernorm.weight, gain)


def test_grouped_query_heads_are_laid_out_as_transformers_repeats_them():
    model = tiny_model("llama")
    pair = pair_named(first_block(model), model.config, "v_o")
    (out,) = pair.multiplied
    scales = torch.arange(16.0)
    assert out.spread(scales, 32, 1.0).tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_rotary_pairs_are_half_a_head_apart_and_the_rest_is_free():
    """8 channels a head, of which RoPE turns the first 4: (0, 2) and (1, 3); 4 to 7 have values of their own."""
    model = model_of("gpt_neox-half-rotary")
    pair = pair_named(first_block(model), model.config, "q_k")
    (keys,), (queries,) = pair.multiplied, pair.divided
    assert keys.channels_N[:9].tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 32]  # q, k, v of 8 rows a head
    assert queries.channels_N[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 24]
    for side in (keys, queries):
        assert side.values_N[:9].tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_fold_is_rounded_once(dtype):
    model = tiny_model("gemma2").to(dtype)
    block, old = first_block(model), weights(first_block(model))
    pair = pair_named(block, model.config, "norm_mlp")
    scales = random_scales(pair)
    scale_pair_(block, pair, scales)
    gain = old["pre_feedforward_layernorm.weight"].double()
    assert torch.equal(block.pre_feedforward_layernorm.weight, ((1 + gain) * (1 / scales) - 1).to(dtype))
    assert torch.equal(block.mlp.up_proj.weight, (old["mlp.up_proj.weight"].double() * scales).to(dtype))


def test_spread_is_differentiable():
    model = tiny_model("llama")
    (side,) = pair_named(first_block(model), model.config, "v_o").multiplied
    scales = torch.ones(16, requires_grad=True)
    side.spread(scales, 32, 1.0).sum().backward()
    assert scales.grad.tolist() == [2.0] * 16, "two query heads read each value channel"


def repeated(block, config, pair):
    (out,) = pair.multiplied
    return replace(pair, multiplied=(replace(out, values_N=torch.arange(16).repeat(2)),))


def without_key(block, config, pair):
    return replace(pair, multiplied=tuple(side for side in pair.multiplied if "k_proj" not in side.path))


def without_offset(block, config, pair):
    return replace(pair, divided=tuple(replace(side, gain_offset=0.0) for side in pair.divided))


def after_the_branch(block, config, pair):
    return replace(pair, divided=tuple(replace(side, path="post_attention_layernorm") for side in pair.divided))


def one_value_a_channel(block, config, pair):
    (keys,), (queries,) = pair.multiplied, pair.divided
    values = torch.arange(16)
    of_queries = values.view(2, 1, 8).expand(2, 2, 8).flatten()
    return replace(
        pair,
        num_values=16,
        multiplied=(replace(keys, values_N=values),),
        divided=(replace(queries, values_N=of_queries),),
    )


def interleaved(block, config, pair):
    """Pairs (0, 1), (2, 3), ... as GPT-J turns them."""
    sides = (*pair.multiplied, *pair.divided)
    first, second = (replace(side, values_N=side.values_N.reshape(-1, 2, 4).mT.flatten()) for side in sides)
    return replace(pair, multiplied=(first,), divided=(second,))


def gate_half(block, config, pair):
    (up,) = pair.divided
    return replace(pair, divided=(replace(up, channels_N=up.channels_N - 64),))


def heads_as_blocks(block, config, pair):
    (values,) = pair.divided
    return replace(pair, divided=(replace(values, channels_N=torch.arange(64, 96)),))


def any_sign(block, config, pair):
    return replace(pair, positive=False)


@pytest.mark.parametrize(
    ("family", "name", "mutate"),
    [
        ("llama", "v_o", repeated),
        ("llama", "norm_qkv", without_key),
        ("gemma2", "norm_mlp", without_offset),
        ("gemma2", "norm_mlp", after_the_branch),
        ("llama", "q_k", one_value_a_channel),
        ("llama", "q_k", interleaved),
        ("phi3", "up_down", gate_half),
        ("gpt_neox", "v_o", heads_as_blocks),
        ("opt", "fc1_fc2", any_sign),
    ],
)
def test_a_wrong_fold_does_not_pass_the_gate(family, name, mutate):
    model = model_of(family)
    before, block = logits(model), first_block(model)
    pair = pair_named(block, model.config, name)
    scale_pair_(
        block,
        mutate(block, model.config, pair),
        random_scales(replace(mutate(block, model.config, pair), positive=False)),
    )
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("opt-350m", {"attention_norm": "self_attn_layer_norm"}),
        ("opt-350m", {"mlp_norm": "final_layer_norm"}),
        ("qwen3", {"head_norms": ()}),
        ("gemma3_text", {"head_norms": ()}),
    ],
)
def test_pairs_left_out_of_the_table_would_change_the_function(family, change, monkeypatch):
    model = model_of(family)
    before, block = logits(model), first_block(model)
    known = {pair.name for pair in scale_pairs(block, model.config)}
    row = replace(wiring_of(model.config), **change)
    monkeypatch.setattr("elastic_sparsity.absorption.wiring_of", lambda _: row)
    (wrong,) = (pair for pair in scale_pairs(block, model.config) if pair.name not in known)
    scale_pair_(block, wrong, random_scales(wrong))
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_gelu_passes_no_scale(family):
    model = model_of(family)
    before, block = logits(model), first_block(model)
    row = wiring_of(model.config)
    config = {row.activation: "relu", "model_type": model.config.model_type}
    pair = pair_named(block, type("Config", (), config), "fc1_fc2")
    scale_pair_(block, pair, random_scales(pair))
    with pytest.raises(AbsorptionError, match="a fold changed them by"):
        check_function_kept(before, logits(model), torch.float64)


@pytest.mark.parametrize(("variant", "name"), EVERY_REFUSAL)
def test_a_pair_that_is_not_exact_is_refused_with_its_reason(variant, name):
    model = model_of(variant)
    with pytest.raises(AbsorptionError) as caught:
        pair_named(first_block(model), model.config, name)
    message = str(caught.value)
    assert message.startswith(f"pair {name}: not exact for {model.config.model_type}: ")
    assert message.endswith(f"Exact here: {', '.join(p for p in PAIR_NAMES if p in EXPECTED[variant][0])}.")
    reasons = "post-LN|take the scale|a GLU|no gate|only a ReLU passes"
    assert re.search(reasons, message)


def test_an_unknown_pair_is_refused():
    model = tiny_model("llama")
    with pytest.raises(AbsorptionError, match="'gate_down': no such name; expected one of norm_qkv, q_k, v_o"):
        pair_named(first_block(model), model.config, "gate_down")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.index_fill(0, torch.tensor([5]), 0.0), AbsorptionError, "1 of 64 are not allowed, first 0.0"),
        (lambda s: -s, AbsorptionError, "64 of 64 are not allowed, first -.*which a ReLU passes"),
        (lambda s: s * float("nan"), NumericsError, "64 of 64 values are NaN or infinite"),
        (lambda s: s / 0, NumericsError, "NaN or infinite"),
        (lambda s: s[:5], ShapeError, r"found shape \(5,\); expected \(64,\)"),
        (lambda s: s[None], ShapeError, r"found shape \(1, 64\)"),
        (lambda s: s.to(torch.complex64), AbsorptionError, "found torch.complex64; expected real floats"),
        (lambda s: torch.ones(64, dtype=torch.int64), AbsorptionError, "found torch.int64"),
        (
            lambda s: s * 1e-320,
            NumericsError,
            "fc1.weight.*gives NaN or infinity in torch.float32.*Nothing was changed",
        ),
        (lambda s: s * 1e39, NumericsError, "fc2.weight.*gives NaN or infinity in torch.float32"),
    ],
)
def test_bad_scales_are_refused_and_change_nothing(change, error, message):
    model = tiny_model("opt")
    block, old = first_block(model), weights(model)
    pair = pair_named(block, model.config, "fc1_fc2")
    with pytest.raises(error, match=f"(?s){message}"):
        scale_pair_(block, pair, change(random_scales(pair)))
    assert not changed(old, model)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("qwen2", "v_o", "shift of v_o: self_attn.o_proj: found no bias"),
        ("llama", "norm_mlp", "post_attention_layernorm, mlp.gate_proj, mlp.up_proj: found no bias"),
        ("opt", "fc1_fc2", "found a pair of kind mlp, whose product or activation passes no shift"),
        ("opt", "q_k", "found a pair of kind query_key"),
    ],
)
def test_shifts_without_a_place_are_refused(family, name, message):
    model = tiny_model(family)
    block, old = first_block(model), weights(model)
    pair = pair_named(block, model.config, name)
    with pytest.raises(AbsorptionError, match=message):
        shift_pair_(block, pair, torch.ones(pair.num_values))
    assert not changed(old, model)


def test_adapters_and_other_shapes_are_refused():
    model = tiny_model("llama")
    block = first_block(model)
    with pytest.raises(UnsupportedModelError, match=r"\[32, 16, 16\] outputs .* expected \[32, 32, 32\] for 4 query"):
        scale_pairs(block, type("Config", (), {"model_type": "llama", "num_attention_heads": 4}))
    pair = pair_named(block, model.config, "v_o")
    block.self_attn.v_proj.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="self_attn.v_proj: found Linear with parameters .*adapter.weight"):
        scale_pair_(block, pair, torch.ones(16))
    with pytest.raises(UnsupportedModelError, match="self_attn.v_proj: found Linear with parameters .*adapter.weight"):
        scale_pairs(block, model.config)
    replace_module_(block, "self_attn.v_proj", torch.nn.Identity())
    with pytest.raises(UnsupportedModelError, match="self_attn.v_proj: found Identity"):
        scale_pairs(block, model.config)


@torch.no_grad()
def inputs_of_linears(model, block, paths):
    statistics = {path: InputStatistics(weight_OI(block.get_submodule(path)).shape[1], gram=False) for path in paths}
    handles = [
        block.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: statistics[path].update(args[0]))
        for path in paths
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return {path: statistic.square_sum_I for path, statistic in statistics.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_wanda_is_blind_to_scales_of_norms_and_magnitude_is_not(family):
    """|W s| times ||X|| / s: the same scores, hence the same masks; so scales alone cannot help Wanda."""
    model = model_of(family)
    block = first_block(model)
    pairs = [pair for pair in scale_pairs(block, model.config) if pair.kind == "norm"]
    paths = [path for pair in pairs for path in pair.consumers]
    before = inputs_of_linears(model, block, paths)
    scores = {path: wanda_scores(weight_OI(block.get_submodule(path)), before[path]) for path in paths}
    sizes = {path: magnitude_scores(weight_OI(block.get_submodule(path))) for path in paths}
    for pair in pairs:
        scale_pair_(block, pair, random_scales(pair))
    after = inputs_of_linears(model, block, paths)
    for path in paths:
        weight = weight_OI(block.get_submodule(path))
        torch.testing.assert_close(wanda_scores(weight, after[path]), scores[path], rtol=1e-5, atol=0)
        assert torch.equal(drop_levels(wanda_scores(weight, after[path]), [16, 8]), drop_levels(scores[path], [16, 8]))
        assert not torch.equal(drop_levels(magnitude_scores(weight), [16]), drop_levels(sizes[path], [16]))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_folded_model_is_an_ordinary_one(family, tmp_path):
    """Saved, and read by stock transformers: the same logits, bit for bit."""
    model = model_of(family, torch.float32)
    before = logits(model)
    for block in decoder_blocks(model):
        for pair in scale_pairs(block, model.config):
            scale_pair_(block, pair, random_scales(pair))
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(stock), logits(model))
    check_function_kept(before, logits(stock), torch.float32)


def test_the_oracle_is_float64_throughout():
    """transformers' own float32 casts would hide every error below 1e-8."""
    model = model_of("llama")
    with torch.no_grad():
        as_it_stands = model(IDS, use_cache=False).logits
    error = float((as_it_stands - logits(model)).abs().max() / as_it_stands.abs().max())
    assert 1e-9 < error < 1e-6


def test_the_gate():
    before = torch.tensor([1.0, -4.0])
    assert check_function_kept(before, before, torch.float32) == 0
    assert check_function_kept(before, before + 2e-5, torch.float32) == pytest.approx(5e-6, rel=0.05)
    assert check_function_kept(before.double(), before.double() + 2e-10, torch.float64) == pytest.approx(
        5e-11, rel=0.01
    )
    with pytest.raises(AbsorptionError, match=r"changed them by 2.50e-01 .* at most 1e-05 in torch.float32"):
        check_function_kept(before, before + 1, torch.float32)
    with pytest.raises(AbsorptionError, match="at most 1e-10 in torch.float64"):
        check_function_kept(before, before + 2e-5, torch.float64)
    with pytest.raises(AbsorptionError, match="found torch.bfloat16, too coarse"):
        check_function_kept(before, before, torch.bfloat16)
    with pytest.raises(ShapeError, match=r"found \(1,\) after \(2,\)"):
        check_function_kept(before, before[:1], torch.float32)
    with pytest.raises(NumericsError, match="logits after: 2 of 2 values are NaN"):
        check_function_kept(before, before * float("nan"), torch.float32)
    with pytest.raises(NumericsError, match="all are zero"):
        check_function_kept(before * 0, before, torch.float32)
