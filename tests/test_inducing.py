"""Induction in a run and on its own: kept for a resume, absorbed exactly, read from its file, refused if damaged."""

import json
import random
import shutil
import string

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elastic_sparsity import ElasticModel, export_peft, inducing, optimize, pipeline, write_overlay
from elastic_sparsity.absorption import scale_pair_, scale_pairs
from elastic_sparsity.adding import add_structured
from elastic_sparsity.arch import architecture_of, decoder_blocks, linears_of, weight_OI
from elastic_sparsity.config import make_recipe
from elastic_sparsity.errors import AbsorptionError, CheckpointError, ConfigError, NumericsError, OutputError
from elastic_sparsity.feature_stage import better
from elastic_sparsity.fold_choice import FoldResult
from elastic_sparsity.inducing import absorb_importance_, change_weights_, induce
from elastic_sparsity.induction_file import FILE_NAME, FORMAT, load_scales
from elastic_sparsity.masks import pattern_mask
from elastic_sparsity.models import load_base
from elastic_sparsity.slicing import load_level
from elastic_sparsity.tiny import TINY_FAMILIES, byte_tokenizer, tiny_model

STAGE = {"steps": 6, "batch_size": 2, "lr": 0.05, "samples": 4, "held_out": 4}
CALIBRATION = {"source": "self", "samples": 16, "length": 16}


def recipe(**sections):
    return tiny_recipe(**{"induction": STAGE, "calibration": CALIBRATION, **sections})


def test_a_run_learns_scales_and_records_them(tmp_path):
    found = optimize(recipe(), tmp_path / "elastic").config["training"]["induction"]
    assert found["kl_before"].keys() == found["kl_after"].keys() == {"0.5", "0.6", "0.7", "2:4"}
    assert isinstance(found["used"], bool)
    without = optimize(recipe(induction={"steps": 0}), tmp_path / "without")
    assert without.config["training"]["induction"] == {}


def test_scales_reach_the_masks(tmp_path, monkeypatch):
    """One channel of every linear that must survive everywhere."""
    learned = inducing.learn

    def favour_channel_3(*args):
        found = learned(*args)
        for scale in found.scales.values():
            scale[3] = 1e9
        return found

    monkeypatch.setattr(pipeline, "learn", favour_channel_3)
    checkpoint = optimize(recipe(end_to_end={"trainable": "off"}), tmp_path / "elastic")
    for level in checkpoint.ladder.levels:
        for name, linear in linears_of(load_level(checkpoint, level, torch.float32)).items():
            assert (linear.weight[:, 3] != 0).all(), (level, name)
            assert (linear.weight == 0).any(), (level, name)


def test_a_search_in_a_run_orders_weights_by_what_was_learned(tmp_path, monkeypatch):
    real, seen = pipeline.plan_in_run, []

    def spy(*args, **options):
        seen.append(options["channel_scales"])
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "plan_in_run", spy)
    optimize(recipe(allocation={"search": True, "held_out": 4}), tmp_path / "elastic")
    (scales,) = seen
    assert scales.keys() == linears_of(tiny_model("llama")).keys()


def test_what_bfloat16_rounds_away_is_said(tmp_path, monkeypatch):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    messages = []
    monkeypatch.setattr(inducing.log, "info", lambda text, *args: messages.append(text % args))
    induce(recipe(model={"id": str(tmp_path / "base")}), tmp_path / "induced")
    (said,) = (float(x.rpartition(" ")[2]) for x in messages if "rounding to torch.bfloat16" in x)
    assert 1e-5 < said < 0.1
    assert load_base(str(tmp_path / "induced")).model.dtype == torch.bfloat16


def test_a_run_goes_on_behind_the_stage(tmp_path, monkeypatch):
    whole = optimize(recipe(), tmp_path / "whole").folder

    def crash(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_block_phase_", crash)
        with pytest.raises(KeyboardInterrupt):
            optimize(recipe(), tmp_path / "again")
    assert (tmp_path / "again.run" / "induction.safetensors").is_file()

    def not_again(*args):
        raise AssertionError("learned a second time")

    monkeypatch.setattr(pipeline, "learn", not_again)
    again = optimize(recipe(), tmp_path / "again").folder
    for path in whole.glob("*"):
        if path.name != "run.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_damaged_stage_is_refused(tmp_path, monkeypatch):
    def crash(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_block_phase_", crash)
    with pytest.raises(KeyboardInterrupt):
        optimize(recipe(), tmp_path / "elastic")
    path = tmp_path / "elastic.run" / "induction.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="--restart"):
        optimize(recipe(), tmp_path / "elastic")


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_absorbed_importance_is_in_the_magnitudes(family):
    model, plain = tiny_model(family), tiny_model(family)
    ids = torch.arange(40).reshape(2, 20)
    widths = {name: weight_OI(linear).shape[1] for name, linear in linears_of(model).items()}
    by_width = {w: torch.rand(w, generator=torch.Generator().manual_seed(w)) + 0.2 for w in set(widths.values())}
    absorb_importance_(model, {name: by_width[width] for name, width in widths.items()}, rows_apart=True)
    assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    prefix, seen = architecture_of(model.config.model_type).blocks, 0
    for index, block in enumerate(decoder_blocks(model)):
        # The inputs of the attention's output belong to several heads, which share a scale, so they are left out.
        for path in (p for pair in scale_pairs(block, model.config) if pair.kind != "value" for p in pair.consumers):
            before, after = (
                weight_OI(plain.get_submodule(f"{prefix}.{index}.{path}")),
                weight_OI(block.get_submodule(path)),
            )
            ratio, wanted = (after / before).double(), by_width[before.shape[1]].double()
            # Rows may have been divided too, each by one number.
            assert torch.allclose(ratio / ratio[:, :1], (wanted / wanted[0]).expand_as(ratio), rtol=1e-3), path
            seen += 1
    assert seen >= (2 if family == "opt-350m" else 4)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@torch.no_grad()
def test_where_the_whole_matrix_is_compared_no_linear_has_its_rows_divided(family):
    model, plain = tiny_model(family), tiny_model(family)
    ids = torch.arange(40).reshape(2, 20)
    importance = {name: torch.linspace(0.2, 5.0, weight_OI(linear).shape[1])
                  for name, linear in linears_of(model).items()}  # fmt: skip
    absorb_importance_(model, importance, rows_apart=False)
    assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    prefix, changed = architecture_of(model.config.model_type).blocks, 0
    for index, block in enumerate(decoder_blocks(model)):
        behind_norms = {p for pair in scale_pairs(block, model.config) if pair.kind == "norm" for p in pair.consumers}
        for path in architecture_of(model.config.model_type).linears:
            ratio = weight_OI(block.get_submodule(path)) / weight_OI(plain.get_submodule(f"{prefix}.{index}.{path}"))
            assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4), "every row alike"
            assert torch.allclose(ratio, torch.ones_like(ratio)) == (path not in behind_norms)
            changed += path in behind_norms
    assert changed >= 4


def test_channels_that_share_a_producer_get_the_geometric_mean():
    model = tiny_model("llama")
    plain = tiny_model("llama")
    ones = {name: torch.ones(weight_OI(linear).shape[1]) for name, linear in linears_of(model).items()}
    name = "model.layers.0.self_attn.q_proj"
    ones[name] = ones[name].clone()
    ones[name][0] = 8.0  # k and v ask for 1: 8 ** (1 / 3) = 2
    absorb_importance_(model, ones, rows_apart=True)
    ratio = (model.get_submodule(name).weight / plain.get_submodule(name).weight)[0].detach()
    assert float(ratio[0] / ratio[1]) == pytest.approx(2.0, rel=1e-5)


@pytest.fixture(scope="module")
def induced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("induced")
    text = folder / "text.txt"
    text.write_text("the fox of the zeros is here again and there. " * 200)
    wanted = recipe(calibration={**CALIBRATION, "source": str(text)})
    found = induce(wanted, folder / "model")
    return folder / "model", found, text


def test_an_induced_model_is_a_plain_one_that_computes_the_same(induced):
    folder, _, _ = induced
    ids = torch.arange(60).reshape(3, 20)
    stock, original = AutoModelForCausalLM.from_pretrained(folder), tiny_model("llama")
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, original(ids).logits, atol=1e-5)
    assert stock.num_parameters() == original.num_parameters()
    for path, changes in (("gate_proj", True), ("down_proj", False)):  # the ladder has levels by the whole matrix
        before, after = (x.get_submodule(f"model.layers.0.mlp.{path}").weight for x in (original, stock))
        assert torch.allclose(after, before, rtol=1e-2) != changes


def test_scales_come_back_with_the_model(induced, tmp_path):
    folder, found, text = induced
    base = load_base(str(folder))
    assert base.channel_scales.keys() == found.scales.keys()
    assert all(torch.equal(base.channel_scales[name], scale) for name, scale in found.scales.items())
    assert "induction_sha256" in base.identity
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / FILE_NAME).unlink()
    assert load_base(str(plain)).channel_scales == {}


def test_damaged_files_are_refused(induced, tmp_path):
    folder, found, _ = induced
    linears = linears_of(tiny_model("llama"))
    first = next(iter(linears))
    good = load_file(folder / FILE_NAME)

    def refused(match, tensors=None, metadata=FORMAT):
        save_file(good if tensors is None else tensors, tmp_path / FILE_NAME, metadata)
        with pytest.raises(ConfigError, match=match):
            load_scales(tmp_path, linears)

    refused("expected", metadata={**FORMAT, "format_version": "9"})
    refused("expected", metadata={"format": "pt"})
    refused("another model", {name: x for name, x in good.items() if name != first})
    refused("another model", {**good, "model.layers.9.self_attn.q_proj": torch.ones(3)})
    refused("expected float32", {**good, first: torch.ones(5)})
    refused("expected float32", {**good, first: good[first].half()})
    refused("positive", {**good, first: -good[first]})
    refused("positive", {**good, first: torch.full_like(good[first], float("nan"))})
    whole = (folder / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_scales(tmp_path, linears)


def test_what_induce_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"induction\.steps"):
        induce(recipe(induction={"steps": 0}), tmp_path / "x")
    with pytest.raises(ConfigError, match="magnitude"):
        induce(recipe(scores={"method": "magnitude"}), tmp_path / "x")
    with pytest.raises(ConfigError, match="held_out"):
        recipe(induction={**STAGE, "held_out": 16})
    with pytest.raises(ConfigError, match="whole model"):
        recipe(memory={"weights": "stream"}, end_to_end={"trainable": "off"})
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    with pytest.raises(OutputError):
        induce(recipe(), full)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert make_recipe(recipe().model_dump()).induction.steps == 6


@pytest.mark.parametrize(
    ("model", "fold", "message"),
    [("qwen3", "query_key", "norms on queries and keys"), ("opt-350m", "residual_order", "embeddings")],
)
def test_a_fold_that_is_not_exact_is_refused_before_text_is_sampled(model, fold, message, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic_sparsity.calibration_text.sample_from_model", lambda *_, **__: pytest.fail("sampled"))
    wanted = recipe(model={"id": f"random:{model}"}, induction={**FOLDED, "folds": [fold]})
    for start in (optimize, induce):
        with pytest.raises(AbsorptionError, match=message):
            start(wanted, tmp_path / "x")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_small_gains_reach_the_checkpoint_in_whatever_dtype_it_is_computed(precision, tmp_path, monkeypatch):
    """Gemma's gains of 2^-8, made smaller: bfloat16 next to -1 does not know them."""
    model = tiny_model("gemma2").bfloat16()
    for block in decoder_blocks(model):
        block.input_layernorm.weight.data[:4] = 2**-8 - 1
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")

    def absorb(recipe, base, *_):
        for block in decoder_blocks(base.model):
            pair = scale_pairs(block, base.model.config)[0]
            scale_pair_(block, pair, torch.full((pair.num_values,), 2.2))
        return []

    monkeypatch.setattr(inducing, "absorb", absorb)
    wanted = recipe(
        model={"id": str(tmp_path / "base")},
        induction={**STAGE, "reading": "absorbed"},
        precision=precision,
        checkpoint={"dtype": "bfloat16"},
    )
    optimize(wanted, tmp_path / "c")
    for block in decoder_blocks(ElasticModel.from_pretrained(tmp_path / "c", 0.5)):
        assert ((block.input_layernorm.weight.float() + 1)[:4] > 0).all()


FOLDS = ["residual_order", "values", "query_key", "value_order", "mlp_order"]
FOLDED = {"steps": 0, "samples": 6, "held_out": 4, "folds": FOLDS}


@pytest.mark.parametrize(
    "changes",
    [
        {"induction": FOLDED},
        {"induction": {**FOLDED, "folds": ["residual_order"]}},
        {"induction": {**FOLDED, "folds": ["mlp_order"], "steps": 4, "batch_size": 2}},
        {
            "induction": {**STAGE, "reading": "absorbed", "start": "ones", "steps": 30},
            "scores": {"method": "magnitude"},
        },
    ],
    ids=["folds", "residual order alone", "folds and scores", "absorbed"],
)
def test_every_way_to_induce_writes_a_plain_model_that_says_the_same(tmp_path, changes):
    found = induce(recipe(**changes), tmp_path / "model")
    assert found.blocks
    stock, original = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tiny_model("llama")
    assert stock.num_parameters() == original.num_parameters()
    assert (tmp_path / "model" / FILE_NAME).is_file() == bool(found.scales)
    assert any(not torch.equal(a, b) for a, b in zip(stock.parameters(), original.parameters(), strict=True))
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, original(ids).logits, atol=1e-5)
    # Greedy text, which rounding could turn at a tie: 200 tokens from each of 20 prompts.
    prompts = torch.randint(4, 260, (20, 5), generator=torch.Generator().manual_seed(1))
    texts = [m.generate(prompts, max_new_tokens=200, do_sample=False, eos_token_id=None) for m in (stock, original)]
    assert texts[0].shape == (20, 205)
    assert torch.equal(*texts)


@pytest.mark.parametrize("patterns", [["2:4"], ["2:4", "4:8"]])
def test_closed_form_makes_n_m_by_magnitude_that_by_wanda(tmp_path, patterns):
    """Of every linear whose inputs have a pair of their own; heads of values that are shared take a mean."""
    asked = recipe(
        induction={"steps": 0, "reading": "norms", "samples": 6}, ladder={"sparsities": [], "patterns": patterns}
    )
    found = induce(asked, tmp_path / "model")
    assert found.used and not found.scales and not (tmp_path / "model" / FILE_NAME).exists()
    original, model = tiny_model("llama"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)
    weights = {name: weight_OI(linear) for name, linear in linears_of(model).items()}
    shared = 0
    for name, linear in linears_of(original).items():
        scores = weight_OI(linear).abs() * found.input_norms[name]
        for kept, size in ((2, 4), (4, 8))[: len(patterns)]:
            same = torch.equal(pattern_mask(weights[name].abs(), kept, size), pattern_mask(scores, kept, size))
            shared += not same
            assert same or name.endswith("o_proj"), name
    assert shared  # the tiny model has such heads


def test_closed_form_is_for_other_pruners_than_a_run(tmp_path):
    with pytest.raises(ConfigError, match="'norms' makes weights' magnitudes Wanda's scores"):
        optimize(recipe(induction={"steps": 0, "reading": "norms"}), tmp_path / "x")


def test_weights_too_large_for_their_dtype_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(inducing, "LOG_WIDEST", 40.0)
    base = load_base("random:llama", "float16")
    importance = {name: torch.logspace(-9, 9, weight_OI(x).shape[1]) for name, x in linears_of(base.model).items()}
    with (
        pytest.raises(NumericsError, match=r"folding gives weights that torch.float16 cannot hold; give model.dtype"),
        inducing._function_kept(base.model, torch.arange(8)[None], torch.float16),
    ):
        absorb_importance_(base.model, importance, rows_apart=True)


ABSORBED = {**STAGE, "reading": "absorbed", "start": "ones", "steps": 30, "samples": 6}


@pytest.mark.parametrize(("stage", "scores"), [(FOLDED, "wanda"), (ABSORBED, "magnitude")], ids=["folds", "absorbed"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_run_that_changes_weights_is_induce_and_then_a_run(tmp_path, family, stage, scores):
    """The same tensors in every file, structured and tuned levels too, which share biases and norms with the others."""
    source = tmp_path / "text.txt"
    source.write_text("".join(random.Random(0).choices(string.ascii_letters + string.digits + " ", k=4000)))
    model, text = {"id": f"random:{family}"}, {"source": str(source), "samples": 16, "length": 16}
    asked = {"calibration": text, "structured": {"fractions": [0.5], "multiple": 8, "steps": 2}}
    asked["scores"] = {"method": scores}
    at_once = optimize(recipe(model=model, induction=stage, **asked), tmp_path / "at-once")
    induce(recipe(model=model, induction=stage, calibration=text, scores=asked["scores"]), tmp_path / "model")
    after = optimize(recipe(model={"id": str(tmp_path / "model")}, induction={"steps": 0}, **asked), tmp_path / "after")
    names = sorted(path.name for path in after.folder.glob("*.safetensors"))
    assert "structured-0.5.safetensors" in names
    for name in names:
        ours, theirs = load_file(at_once.folder / name), load_file(after.folder / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert at_once.config["base_model"]["id"] == model["id"]
    changes = at_once.config["training"]["induction"]["changes"]
    assert changes.keys() == set(stage.get("folds", ["absorbed"]))
    assert any(kind["changed"] for kind in changes.values())


def test_a_run_goes_on_behind_its_folds(tmp_path, monkeypatch):
    asked = recipe(induction={**FOLDED, "steps": 6, "batch_size": 2})
    whole = optimize(asked, tmp_path / "whole")

    def crash(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_induction", crash)
        with pytest.raises(KeyboardInterrupt):
            optimize(asked, tmp_path / "again")
    kept = tmp_path / "again.run" / "base.safetensors"
    intact = kept.read_bytes()
    kept.write_bytes(intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:])
    with pytest.raises(OutputError, match="--restart"):
        optimize(asked, tmp_path / "again")
    kept.write_bytes(intact)

    def not_again(*args):
        raise AssertionError("folded a second time")

    monkeypatch.setattr(pipeline, "change_weights_", not_again)
    again = optimize(asked, tmp_path / "again")
    assert whole.config["training"] == again.config["training"]
    for path in whole.folder.glob("*.safetensors"):
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_structured_levels_come_from_the_changed_weights_after_a_resume_too(tmp_path, monkeypatch):
    asked = recipe(induction=FOLDED, structured={"fractions": [0.5], "multiple": 8, "steps": 2})
    whole = optimize(asked, tmp_path / "whole")

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "add_levels", crash)
        with pytest.raises(KeyboardInterrupt):
            optimize(asked, tmp_path / "again")
    monkeypatch.setattr(pipeline, "change_weights_", crash)
    again = optimize(asked, tmp_path / "again")
    for path in whole.folder.glob("*.safetensors"):
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_what_needs_the_base_models_own_weights_says_so(tmp_path):
    folded = optimize(recipe(induction=FOLDED, end_to_end={"trainable": "adapters"}), tmp_path / "folded").folder
    with pytest.raises(CheckpointError, match=r"no overlay.*no induction\.folds"):
        write_overlay(folded, tmp_path / "overlay")
    with pytest.raises(CheckpointError, match=r"changed the model's weights first \(induction\)"):
        add_structured(folded, [0.5], samples=4, length=16)
    export_peft(folded, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "group-0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_a_level_that_keeps_everything_has_no_say():
    errors = {"0": 0.0, "0.5": 0.2}, {"0": 1e-13, "0.5": 0.1}
    assert better(*errors)
    assert not better(errors[0], {"0": 0.0, "0.5": 0.2})
    found = inducing.summary([FoldResult(before=errors[0], after=errors[1], used=True, kind="values", chosen="x")])
    assert found["values"]["error_ratio"] == {"0": 1.0, "0.5": pytest.approx(0.5)}


def test_changed_weights_keep_their_dtype_and_buffers_theirs(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    before = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    assert torch.float32 in {buffer.dtype for buffer in before.values()}
    ids = torch.randint(4, 260, (16, 16), generator=torch.Generator().manual_seed(0))
    assert any(x.used for x in change_weights_(recipe(induction=FOLDED), base, ids, "float32"))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    for name, buffer in base.model.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_a_run_does_not_change_weights_under_learned_scales(induced, tmp_path):
    with pytest.raises(ConfigError, match="holds scales that were learned for its weights as they are"):
        optimize(recipe(model={"id": str(induced[0])}, induction=FOLDED), tmp_path / "x")
    with pytest.raises(ConfigError, match="holds scales that were learned for its weights as they are"):
        induce(recipe(model={"id": str(induced[0])}, induction=FOLDED), tmp_path / "x")


def test_a_run_and_induce_refuse_what_they_cannot_do_by_name(tmp_path):
    with pytest.raises(ConfigError, match="'gains' are tuned after masking"):
        optimize(recipe(induction={"steps": 0, "reading": "gains"}), tmp_path / "x")
    for do in (induce, optimize):
        with pytest.raises(ConfigError, match="'gains' are tuned after masking"):
            do(recipe(induction={**STAGE, "reading": "gains"}), tmp_path / "x")
        with pytest.raises(ConfigError, match="0 steps absorb nothing"):
            do(recipe(induction={**FOLDED, "reading": "absorbed"}), tmp_path / "x")
        with pytest.raises(ConfigError, match="N:M masks alone"):
            do(recipe(induction=FOLDED, ladder={"patterns": []}), tmp_path / "x")
    with pytest.raises(ConfigError, match="'ria'"):
        induce(recipe(induction={**STAGE, "reading": "absorbed"}, scores={"method": "ria"}), tmp_path / "x")
