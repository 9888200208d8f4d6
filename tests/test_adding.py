"""Structured levels in an elastic checkpoint: the model that `prune` makes, safely added, carried, and proved."""

import copy
import importlib.util
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import tiny_recipe
from exact import VARIANTS, cut_sizes, model_of
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_checkpoint import opened_files  # noqa: F401
from test_cli import run
from test_corrupt import EDITS, edited, fields, forge, tensors
from test_exports import run_onnx
from test_hub import FIRST, REPOSITORY, hub  # noqa: F401
from test_transfer import contents
from transformers import AutoModelForCausalLM

from elastic_sparsity import (
    ElasticCheckpoint,
    ElasticModel,
    add_structured,
    adding,
    checkpoint_writer,
    choose_level,
    copy_level,
    export_level,
    export_peft,
    levels,
    optimize,
    pruning,
    reapply_masks_,
    restore_overlay,
    save_sliced,
    set_level,
    upgrade,
    verify,
    write_overlay,
)
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.bench import bench
from elastic_sparsity.errors import (
    CheckpointError,
    ConfigError,
    ElasticSparsityError,
    LevelError,
    OutputError,
    UnsupportedModelError,
)
from elastic_sparsity.manifest import CONFIG_NAME, digest
from elastic_sparsity.measure import evaluate_path
from elastic_sparsity.models import load_base
from elastic_sparsity.packing import unpack_bits
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.pruning import load_pruned, prune
from elastic_sparsity.structured import prune_structured_
from elastic_sparsity.structured_parts import parts_of, sizes_for
from elastic_sparsity.structured_search import Searched
from elastic_sparsity.structured_sizes import Sizes
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.wiring import wiring_of

IDS = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(0))
HALF, QUARTER = "structured-0.5", "structured-0.25"
FILE = f"{HALF}.safetensors"
DOWN, OUT = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"
NO_TRAINING = {"block": {"steps": 0}, "end_to_end": {"trainable": "off"}}


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, settings, tmp_path_factory):
    """A checkpoint with both structured levels. Read only."""
    folder = tmp_path_factory.mktemp("structured") / "whole"
    shutil.copytree(tiny_checkpoint, folder)
    added = add_structured(folder, [0.5, 0.25], **settings)
    assert [level.name for level in added] == [HALF, QUARTER]
    return folder


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_base(folder, variant, dtype):
    model_of(variant, dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def fraction_with_heads(model):
    """Removes heads too, where the family's config can say so; the others cannot lose so much."""
    return 0.5 if wiring_of(model.config).free_heads else 0.4


@pytest.mark.parametrize(
    ("variant", "dtype", "scores"),
    [
        *((variant, "float32", "obs") for variant in VARIANTS if not variant.startswith("gpt_neox-")),
        *((family, "bfloat16", "obs") for family in ("llama", "gpt2", "qwen2")),
        *((family, "float32", "flap") for family in ("llama", "qwen3", "opt", "gemma2", "phi3")),
        ("gpt2", "float32", "magnitude"),
    ],
)
def test_a_level_is_what_prune_makes(variant, dtype, scores, settings, tmp_path):
    """Every family; the same calibration and seed; also through save, transformers and a second dtype."""
    save_base(tmp_path / "base", variant, getattr(torch, dtype))
    recipe = tiny_recipe(
        model={"id": str(tmp_path / "base")},
        calibration={"source": settings["calibration"]},
        ladder={"sparsities": [0.5], "patterns": []},
        **NO_TRAINING,
    )
    optimize(recipe, tmp_path / "c")
    fraction = fraction_with_heads(load_base(str(tmp_path / "base")).model)
    add_structured(tmp_path / "c", [fraction], scores=scores, **settings)
    prune(str(tmp_path / "base"), tmp_path / "pruned", sparsity=fraction, scores=scores, **settings)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    found = ElasticModel.from_pretrained(tmp_path / "c", f"structured-{fraction}")
    assert found.dtype == wanted.dtype == getattr(torch, dtype)
    assert same_parameters(found, wanted) and torch.equal(logits(found), logits(wanted))
    assert type(found) is type(wanted) and not found.training

    save_sliced(tmp_path / "c", f"structured-{fraction:.0%}", tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_parameters(plain, wanted) and torch.equal(logits(plain), logits(wanted))
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("plain", "pruned")]
    assert configs[0] == configs[1]
    checks = verify(tmp_path / "c")
    assert len(checks) == 5 and all(check.passed for check in checks), checks


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2"])
def test_a_level_equals_the_masked_refitted_model_at_the_units_it_lists(variant, settings, tmp_path):
    """The oracle is the pruned model of full size; and the bitmaps say which of its units stay."""
    save_base(tmp_path / "base", variant, torch.float32)
    recipe = tiny_recipe(
        model={"id": str(tmp_path / "base")}, ladder={"sparsities": [0.5], "patterns": []}, **NO_TRAINING
    )
    optimize(recipe, tmp_path / "c")
    base = load_base(str(tmp_path / "base"))
    fraction = fraction_with_heads(base.model)
    add_structured(tmp_path / "c", [fraction], **settings)
    tokens = adding.pruning_tokens(
        adding.pruning_recipe(
            "test", model={"id": "x"}, calibration={"source": settings["calibration"], "samples": 6, "length": 16},
            batch_size=4, damping=0.01, steps=0, lr=3e-4, seed=0, precision="float32",
        ), base, "obs", lambda *step: None,
    )  # fmt: skip
    masked = base.model
    sizes = sizes_for(masked, fraction, 8)
    kept = prune_structured_(masked, tokens, sizes, at_once=8, autocast=autocast_factory("float32", "cpu"))
    found = ElasticModel.from_pretrained(tmp_path / "c", f"structured-{fraction}")
    assert torch.allclose(logits(found), logits(masked), atol=2e-5)
    section = load_file(tmp_path / "c" / f"structured-{fraction}.safetensors")
    prefix = next(iter(linears_of(masked))).partition(".0.")[0]
    for index, (block, units) in enumerate(zip(decoder_blocks(masked), kept, strict=True)):
        for part in parts_of(block, masked.config):
            stays = unpack_bits(section[f"{prefix}.{index}.{part.path}.units"], len(part.units_UC))
            assert torch.equal(stays.nonzero().flatten(), units[part.name])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_blocks_of_a_searched_level_differ(family, text_file, tmp_path, monkeypatch):
    """By recipe; then everything that a level of equal counts can do. What is found differs for sure."""

    def found(model, *args, **options):
        even = cut_sizes(model)
        groups = (1, 2) if family == "llama" else even.groups
        sizes = Sizes(
            groups=groups, num_groups=even.num_groups, channels=(8, 40), num_channels=even.num_channels,
            removed=even.removed, total=even.total,
        )  # fmt: skip
        return Searched(sizes=sizes, equal={}, losses=[])

    monkeypatch.setattr(pruning, "search_sizes", found)
    searched = {"fractions": [0.4], "search": "blocks", "multiple": 8}
    recipe = tiny_recipe(
        model={"id": f"random:{family}"}, structured=searched, end_to_end={"trainable": "off"},
        block={"steps": 0, "samples": 20}, calibration={"source": str(text_file), "samples": 20, "length": 16},
    )  # fmt: skip
    folder = tmp_path / "elastic"
    optimize(recipe, folder)
    (level,) = ElasticCheckpoint(folder).structured
    assert level.channels == (8, 40)
    assert level.key_value_heads == {"llama": (1, 2), "phi3": 1, "gpt2": 4}[family]
    assert [check for check in verify(folder) if not check.passed] == []
    model = ElasticModel.from_pretrained(folder, level.name)
    down = {"llama": "mlp.down_proj", "phi3": "mlp.down_proj", "gpt2": "mlp.c_proj"}[family]
    widths = [weight_OI(block.get_submodule(down)).shape[1] for block in decoder_blocks(model)]
    assert widths == list(level.channels)
    save_sliced(folder, level.name, tmp_path / "plain")
    plain, _ = load_pruned(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(model))
    with pytest.raises(UnsupportedModelError, match="format gguf: this model's blocks differ"):
        export_level(folder, level.name, tmp_path / "gguf", format="gguf")
    rows, _ = evaluate_path(str(tmp_path / "plain"), str(text_file), window=16, max_windows=2)
    of_level, _ = evaluate_path(str(folder), str(text_file), window=16, max_windows=2, level=level.name)
    assert rows[0]["perplexity"] == pytest.approx(of_level[0]["perplexity"], rel=1e-5)
    if family == "llama" and importlib.util.find_spec("onnxruntime"):
        export_level(folder, level.name, tmp_path / "onnx", "onnx")
        assert torch.allclose(run_onnx(tmp_path / "onnx", IDS, torch.ones_like(IDS)), logits(model), atol=1e-4)
    copy_level(folder, level.name, tmp_path / "one")
    assert torch.equal(logits(ElasticModel.from_pretrained(tmp_path / "one")), logits(model))

    path = folder / CONFIG_NAME
    for changed, match in (
        ([*level.channels, 8], "found counts of 3 blocks, but the model has 2"),
        (level.channels[::-1], "found F32 .* expected F32"),
    ):
        raw = json.loads(path.read_text())
        raw["ladder"]["structured"][0]["channels"] = changed
        raw["digest"] = digest(raw)
        bad = tmp_path / f"bad{len(changed)}"
        shutil.copytree(folder, bad)
        (bad / CONFIG_NAME).write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=match):
            ElasticModel.from_pretrained(bad, level.name)


def test_what_a_section_holds(whole):
    """Names, shapes and dtypes as the specification says."""
    section, checkpoint = load_file(whole / FILE), ElasticCheckpoint(whole)
    weights = {name: tuple(x.shape) for name, x in section.items() if ".layers.0." in name and x.dtype != torch.uint8}
    at = "model.layers.0"
    assert weights == {
        **{f"{at}.self_attn.{name}_proj.weight": (rows, 32) for name, rows in (("q", 16), ("k", 8), ("v", 8))},
        f"{at}.self_attn.o_proj.weight": (32, 16),
        f"{at}.mlp.gate_proj.weight": (32, 32),
        f"{at}.mlp.up_proj.weight": (32, 32),
        f"{at}.mlp.down_proj.weight": (32, 32),
    }
    units = {name: tuple(x.shape) for name, x in section.items() if ".layers.0." in name and x.dtype == torch.uint8}
    assert units == {f"{at}.self_attn.o_proj.units": (1,), f"{at}.mlp.down_proj.units": (8,)}
    assert checkpoint.config["ladder"]["structured"][1] == {
        "fraction": 0.5, "key_value_heads": 1, "channels": 32, "biases": False, "weights": 9216,
    }  # fmt: skip
    assert checkpoint.bytes_of(checkpoint.find(HALF)) == sum(
        (whole / name).stat().st_size for name in (FILE, "shared.safetensors")
    )


def test_adding_changes_nothing_else(tiny_checkpoint, whole):
    """Every file and every field that was there stays, but the digest; so the other levels are bit for bit the same."""
    before, after = contents(tiny_checkpoint), contents(whole)
    assert after.keys() - before.keys() == {FILE, f"{QUARTER}.safetensors"}
    assert all(after[name] == data for name, data in before.items() if name != CONFIG_NAME)
    old, new = (json.loads(found[CONFIG_NAME]) for found in (before, after))
    assert new.pop("digest") != old.pop("digest")
    assert new.pop("structured").keys() == {HALF, QUARTER}
    assert [x["fraction"] for x in new["ladder"].pop("structured")] == [0.25, 0.5]
    assert {new["files"].pop(name)[0]["file"] for name in (HALF, QUARTER)} == {FILE, f"{QUARTER}.safetensors"}
    assert new == old
    assert all(check.passed for check in verify(whole)) and len(verify(whole)) == 9


def test_readers_of_before_still_read_it(whole):
    """They ignore the field inside `ladder` and the sections, and their digest covers both."""
    raw = json.loads((whole / CONFIG_NAME).read_text())
    known = {"sparsities", "patterns", "group_ends", "pattern_parent"}
    assert raw["format_version"] == 2 and raw["requires"] == []
    assert raw["ladder"].keys() - known == {"structured"}
    assert raw["digest"] == digest({**raw, "structured": "a record"})
    raw["ladder"]["structured"][0]["channels"] = 8
    assert raw["digest"] != digest(raw)


def test_order_does_not_matter_and_equal_calls_give_equal_bytes(tiny_checkpoint, whole, settings, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    add_structured(tmp_path / "c", [0.25], **settings)
    add_structured(tmp_path / "c", [0.5], **settings)
    a, b = contents(whole), contents(tmp_path / "c")
    assert all(a[name] == b[name] for name in a if name != CONFIG_NAME) and a.keys() == b.keys()
    configs = [ElasticCheckpoint(folder).config for folder in (whole, tmp_path / "c")]
    assert configs[0] == configs[1]


def test_levels_inspection_and_choice(whole):
    found = levels(whole)
    assert [x.name for x in found] == ["0.5", "0.6", "0.7", "2:4", QUARTER, HALF]
    assert [x.structured for x in found] == [False] * 4 + [True] * 2
    assert [x.sparsity for x in found][4:] == [0.25, 0.5] and all(x.available for x in found)
    sizes = {
        level.name: ElasticCheckpoint(whole).download_bytes(level) for level in ElasticCheckpoint(whole).structured
    }
    smallest = choose_level(whole, max_bytes=sizes[HALF])
    assert (smallest.level, smallest.runtime, smallest.bytes) == (HALF, "dense", sizes[HALF])
    assert choose_level(whole, max_bytes=10**9).level == "0.5", "nobody gets a structured level unasked"
    assert choose_level(whole, profile="laptop-avx2", max_ms_per_token=1e9).level == "0.5"
    assert ElasticModel.from_pretrained(whole, max_bytes=sizes[HALF]).config.intermediate_size == 32


def test_quality_decides_once_it_is_recorded(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    rows = [{"level": name, "method": "elastic", "perplexity": p} for name, p in
            (("0.5", 12.0), ("0.6", 14.0), ("0.7", 20.0), ("2:4", 13.0))]  # fmt: skip
    dense = {"level": "dense", "method": "dense", "perplexity": 10.0}
    checkpoint.update_record({"quality": {"rows": [dense, *rows]}})
    assert choose_level(tmp_path / "c", min_quality=0.5).level == "0.5", "the smallest that is known to have it"
    with pytest.raises(LevelError, match="no level reaches quality 0.99"):
        choose_level(tmp_path / "c", min_quality=0.99)
    copy_level(tmp_path / "c", HALF, tmp_path / "device")  # of no level that it has is any quality recorded
    with pytest.raises(LevelError, match="no level meets all budgets.* its quality is not recorded"):
        choose_level(tmp_path / "device", min_quality=0.5)
    rows.append({"level": HALF, "method": "elastic", "perplexity": 11.0})
    checkpoint.update_record({"quality": {"rows": [dense, *rows]}})
    assert choose_level(tmp_path / "c", min_quality=0.5).level == HALF
    assert choose_level(tmp_path / "c", max_bytes=10**9).level == HALF


def test_copy_upgrade_and_auto(tiny_checkpoint, whole, tmp_path):
    copied = copy_level(whole, HALF, tmp_path / "device")
    assert {path.name for path in (tmp_path / "device").glob("*.safetensors")} == {FILE, "shared.safetensors"}
    assert copied.find("auto").name == HALF
    assert same_parameters(ElasticModel.from_pretrained(tmp_path / "device"), ElasticModel.from_pretrained(whole, HALF))
    assert [check.passed for check in verify(tmp_path / "device")] == [True, True]
    written = upgrade(tmp_path / "device", whole, QUARTER)
    assert written == [f"{QUARTER}.safetensors"]
    assert "shell-core.safetensors" in upgrade(tmp_path / "device", whole, 0.7)
    assert copied.find("auto").name == "0.7"

    # A copy that is older than the structured levels takes the new elastic_config.json with them.
    copy_level(tiny_checkpoint, 0.7, tmp_path / "old")
    assert upgrade(tmp_path / "old", whole, HALF) == [FILE]
    assert (tmp_path / "old" / CONFIG_NAME).read_bytes() == (whole / CONFIG_NAME).read_bytes()
    assert {x.name for x in levels(tmp_path / "old") if x.available} == {"0.7", HALF}
    assert all(check.passed for check in verify(tmp_path / "old"))
    assert upgrade(tmp_path / "old", tiny_checkpoint, 0.5), "and masks still come from the older whole"
    with pytest.raises(LevelError, match=r"structured-0.9.*it has: 0.5, 0.6, 0.7, 2:4, structured-0.25"):
        upgrade(tmp_path / "old", whole, "structured-0.9")


def test_two_additions_apart_are_not_mixed(tiny_checkpoint, whole, settings, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    add_structured(tmp_path / "other", [0.5], **{**settings, "seed": 3})
    before = contents(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"its structured-0.5 is not that of .* added to them apart"):
        upgrade(tmp_path / "other", whole, QUARTER)
    assert contents(tmp_path / "other") == before


def test_only_its_files_are_opened(whole, opened_files):  # noqa: F811
    ElasticModel.from_pretrained(whole, HALF)
    assert set(opened_files) == {FILE, "shared.safetensors"}


def test_what_needs_masks_refuses_by_name(whole, tmp_path):
    model = ElasticModel.from_pretrained(whole, 0.5)
    before = copy.deepcopy(model)
    for live, wanted in ((model, HALF), (ElasticModel.from_pretrained(whole, HALF), "0.5")):
        with pytest.raises(LevelError, match=r"set_level: structured-0.5 is a smaller model"):
            set_level(live, wanted)
    assert same_parameters(model, before)
    set_level(ElasticModel.from_pretrained(whole, HALF), HALF)  # where it is
    for action in (
        lambda: reapply_masks_(before, whole, HALF),
        lambda: export_peft(whole, tmp_path / "peft", HALF),
        lambda: export_level(whole, HALF, tmp_path / "bitmask", "bitmask"),
        lambda: export_level(whole, HALF, tmp_path / "packed", "packed-2of4"),
        lambda: bench(whole, levels=[HALF]),
    ):
        with pytest.raises(LevelError, match="level structured-0.5 is a smaller model without masks or adapters"):
            action()
    for options, what in (({"runtime": "packed"}, "runtime: 'packed'"), ({"merge_adapters": False}, "merge_adapters")):
        with pytest.raises(ConfigError, match=f"{what}.* structured-0.5 is a smaller dense model"):
            ElasticModel.from_pretrained(whole, HALF, **options)
    with pytest.raises(LevelError, match=r"'structured-0.4' is not in this checkpoint; it has: .*structured-0.5\. `el"):
        ElasticModel.from_pretrained(whole, "structured-0.4")
    with pytest.raises(LevelError, match=r"level 0.9 is not in this checkpoint; it has: .*2:4, structured-0.25"):
        ElasticModel.from_pretrained(whole, 0.9)
    assert not list(tmp_path.iterdir())


def test_a_report_takes_what_eval_wrote(whole, text_file, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "c")
    output = tmp_path / "e.json"
    options = ("--window", "16", "--max-windows", "1", "-q", "--output", output)
    assert run(capsys, "eval", tmp_path / "c", "--text", text_file, *options)[0] == 0
    code, _, stderr = run(capsys, "report", tmp_path / "c", "--results", output)
    assert code == 0, stderr
    rows = [row["level"] for row in json.loads(output.read_text())["rows"]]
    assert rows == ["0.5", "0.6", "0.7", "2:4", QUARTER, HALF]
    assert f"{json.loads(output.read_text())['rows'][-1]['perplexity']:.2f}" in (tmp_path / "c/report.html").read_text()


def test_a_folder_of_a_structured_level_alone_has_nothing_to_bench(whole, text_file, tmp_path):
    copy_level(whole, HALF, tmp_path / "device")
    with pytest.raises(CheckpointError, match="no level is complete here"):
        bench(tmp_path / "device", prompt=4, new_tokens=2, repeats=1)
    rows, _ = evaluate_path(str(tmp_path / "device"), str(text_file), window=16, max_windows=2)
    assert [row["level"] for row in rows] == [HALF]


def test_eval_and_placement(whole, text_file):
    rows, _ = evaluate_path(str(whole), str(text_file), window=16, max_windows=2)
    assert [row["level"] for row in rows] == ["0.5", "0.6", "0.7", "2:4", QUARTER, HALF]
    one, _ = evaluate_path(str(whole), str(text_file), window=16, max_windows=2, level=HALF)
    assert one[0]["perplexity"] == rows[-1]["perplexity"] and one[0]["bytes"] < rows[0]["bytes"]
    placed = ElasticModel.from_pretrained(whole, HALF, device_map={"": "cpu"}, dtype="bfloat16")
    assert placed.dtype == torch.bfloat16 and torch.isfinite(logits(placed)).all()


def test_formats_of_plain_models_take_a_structured_level(whole, tmp_path):
    pytest.importorskip("onnxruntime")
    found = export_level(whole, HALF, tmp_path / "onnx", "onnx")
    model = ElasticModel.from_pretrained(whole, HALF)
    assert found.level == HALF and found.dense_bytes == 4 * model.num_parameters()
    assert torch.allclose(run_onnx(tmp_path / "onnx", IDS, torch.ones_like(IDS)), logits(model), atol=1e-4)


def test_of_a_hub_only_its_files_are_downloaded(whole, hub):  # noqa: F811
    hub.commits[FIRST] = whole
    extras = {entry.file for entry in ElasticCheckpoint(whole).manifest.extras}
    model = ElasticModel.from_pretrained(REPOSITORY, HALF, **hub.options)
    assert hub.sent() == {CONFIG_NAME, FILE, "shared.safetensors"} | extras
    assert same_parameters(model, ElasticModel.from_pretrained(whole, HALF))
    assert ElasticModel.from_pretrained(REPOSITORY, **hub.options).elastic_state.level.name == "0.5"


@settings_of(max_examples=60, derandomize=True, deadline=None)
@given(EDITS, st.integers(0, 7))
def test_fuzzed_bytes(fuzzed, edits, kind):
    """Size and hash mended or not: an error of ours, or a sound model."""
    originals = {path: path.read_bytes() for path in (fuzzed / FILE, fuzzed / CONFIG_NAME)}
    forge(FILE, lambda b: edited(b, edits), fixed=kind > 1)(fuzzed)
    try:
        model = ElasticModel.from_pretrained(fuzzed, HALF)
        assert all(weight.isfinite().all() for weight in model.parameters())
        assert model.config.intermediate_size == 32
    except ElasticSparsityError:
        pass
    finally:
        for path, original in originals.items():
            path.write_bytes(original)


@pytest.fixture(scope="module")
def fuzzed(whole, tmp_path_factory):
    return shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "c")


def test_an_overlay_leaves_structured_levels_out(settings, tmp_path):
    """They are the base's weights; what is restored lists them, and `upgrade` brings them back."""
    recipe = tiny_recipe(block={"steps": 1, "base_lr": 0.0}, end_to_end={"trainable": "adapters", "steps": 1})
    optimize(recipe, tmp_path / "whole")
    add_structured(tmp_path / "whole", [0.5], **settings)
    write_overlay(tmp_path / "whole", tmp_path / "overlay")
    assert not (tmp_path / "overlay" / FILE).exists()
    restore_overlay(tmp_path / "overlay", tmp_path / "again")
    assert [x.available for x in levels(tmp_path / "again")] == [True] * 4 + [False]
    assert all(check.passed for check in verify(tmp_path / "again"))
    with pytest.raises(CheckpointError, match="structured-0.5.safetensors is missing"):
        ElasticModel.from_pretrained(tmp_path / "again", HALF)
    assert upgrade(tmp_path / "again", tmp_path / "whole", HALF) == [FILE]
    assert all(check.passed for check in verify(tmp_path / "again"))


@pytest.mark.parametrize("moment", ["prune", "write", "rename", "config"])
def test_an_interrupted_addition_leaves_the_old_checkpoint(
    moment, tiny_checkpoint, whole, settings, tmp_path, monkeypatch
):
    folder = tmp_path / "c"
    shutil.copytree(tiny_checkpoint, folder)

    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        name = {"prune": "smaller_model"}.get(moment)
        if name:
            patch.setattr(adding, name, killed)
        elif moment == "write":
            patch.setattr(checkpoint_writer.TensorFileWriter, "write", killed)
        else:
            patch.setattr(checkpoint_writer, {"rename": "file_entry", "config": "write_json"}[moment], killed)
        with pytest.raises(Killed):
            add_structured(folder, [0.5], **settings)
    before, after = contents(tiny_checkpoint), contents(folder)
    assert all(after[name] == data for name, data in before.items())
    assert after.keys() - before.keys() <= {FILE}, "a file that nothing lists"
    assert all(check.passed for check in verify(folder)) and len(levels(folder)) == 4
    add_structured(folder, [0.5], **settings)
    assert same_parameters(ElasticModel.from_pretrained(folder, HALF), ElasticModel.from_pretrained(whole, HALF))
    assert all(check.passed for check in verify(folder)) and len(levels(folder)) == 5


def test_a_finished_fraction_stays(tiny_checkpoint, settings, tmp_path, monkeypatch):
    folder, real = tmp_path / "c", adding.smaller_model
    shutil.copytree(tiny_checkpoint, folder)
    calls = []

    def second_fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(adding, "smaller_model", second_fails)
        with pytest.raises(KeyboardInterrupt):
            add_structured(folder, [0.25, 0.5], **settings)
    assert [x.name for x in levels(folder) if x.structured] == [QUARTER]
    assert all(check.passed for check in verify(folder))
    with pytest.raises(CheckpointError, match="has level structured-0.25 already; leave it out"):
        add_structured(folder, [0.25, 0.5], **settings)
    add_structured(folder, [0.5], **settings)
    assert [x.name for x in levels(folder) if x.structured] == [QUARTER, HALF]


@pytest.mark.parametrize(
    ("fractions", "options", "error", "message"),
    [
        ([], {}, ConfigError, "fractions: none"),
        ([1.0], {}, ConfigError, "sparsity: 1 is not between 0 and 1"),
        ([0.5, 0.5], {}, ConfigError, "names one twice"),
        ([0.5, 0.51], {}, ConfigError, r"0.51 and 0.5 both keep 1 key/value heads and 32 MLP channels"),
        ([0.95], {}, ConfigError, "cannot be removed"),
        ([0.5], {"multiple": 7}, ConfigError, "multiple: 7 does not divide the 64 channels"),
        ([0.5], {"scores": "best"}, ConfigError, "scores: 'best' is not one of"),
        ([0.5], {"model": "random:qwen3"}, CheckpointError, r"it holds other weights .* than the base model recorded"),
        ([0.5], {"calibration": "./none.txt"}, ElasticSparsityError, "no such file"),
        ([0.5], {"length": 10**4}, ConfigError, "the model reads at most 256"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(
    fractions, options, error, message, tiny_checkpoint, settings, tmp_path
):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    with pytest.raises(error, match=message):
        add_structured(tmp_path / "c", fractions, **{**settings, **options})
    assert contents(tmp_path / "c") == contents(tiny_checkpoint)
    with pytest.raises(ConfigError, match="is no folder; download"):
        add_structured("owner/name", [0.5])


def test_another_base_is_told_by_what_is_shared(tiny_checkpoint, settings, tmp_path):
    """Also where no hash is recorded."""
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    checkpoint.update_record({"base_model": {"id": "random:mistral"}})
    with pytest.raises(CheckpointError, match="it is a 'mistral', the checkpoint a 'llama'"):
        add_structured(tmp_path / "c", [0.5], **settings)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    checkpoint.update_record({"base_model": {"id": str(tmp_path / "base")}})
    with pytest.raises(CheckpointError, match="differs, which all levels share"):
        add_structured(tmp_path / "c", [0.5], **settings)
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="its linears are not those of the checkpoint"):
        add_structured(tmp_path / "c", [0.5], **settings)
    checkpoint.update_record({"base_model": "nothing"})
    with pytest.raises(CheckpointError, match="does not record its base model; name it"):
        add_structured(tmp_path / "c", [0.5], **settings)
    add_structured(tmp_path / "c", [0.5], model="random:llama", **settings)


def test_a_full_disk_is_named(tiny_checkpoint, settings, tmp_path, monkeypatch):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer.TensorFileWriter, "write", full)
    with pytest.raises(OutputError, match=r"structured-0.5.safetensors: cannot be written: .*No space left"):
        add_structured(tmp_path / "c", [0.5], **settings)
    assert contents(tmp_path / "c") == contents(tiny_checkpoint)


def flip_a_weight(data):
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def ladder(**changes):
    return fields(CONFIG_NAME, "ladder", "structured", 1, **changes)


def rename(old, new):
    return tensors(FILE, lambda t: t.update({new: t.pop(old)}))


DAMAGE = {
    "flipped byte": (forge(FILE, flip_a_weight, fixed=False), f"{FILE}: sha256 differs"),
    "truncated": (forge(FILE, lambda b: b[:-1], fixed=False), f"{FILE}: has .* bytes, expected"),
    "truncated, hash mended": (forge(FILE, lambda b: b[:-1]), f"{FILE}: cannot be read"),
    "unit beyond the last": (
        tensors(FILE, lambda t: t.update({f"{OUT}.units": torch.tensor([0b101], dtype=torch.uint8)})),
        f"{FILE}: {OUT}.units: .*padding bits",
    ),
    "too many units": (
        tensors(FILE, lambda t: t.update({f"{OUT}.units": torch.tensor([0b11], dtype=torch.uint8)})),
        f"{FILE}: {OUT}.units: 2 of 2 units stay, expected 1",
    ),
    "no unit": (
        tensors(FILE, lambda t: t[f"{DOWN}.units"].zero_()),
        f"{FILE}: {DOWN}.units: 0 of 64 units stay, expected 32",
    ),
    "units as numbers": (
        tensors(FILE, lambda t: t.update({f"{OUT}.units": torch.tensor([0])})),
        f"{FILE}: {OUT}.units: found I64",
    ),
    "units of another length": (
        tensors(FILE, lambda t: t.update({f"{DOWN}.units": torch.full((4,), 255, dtype=torch.uint8)})),
        f"{FILE}: {DOWN}.units: found U8",
    ),
    "wrong shape": (
        tensors(FILE, lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:, :24].contiguous()})),
        rf"{FILE}: {DOWN}.weight: found F32 \(32, 24\), expected F32 \(32, 32\)",
    ),
    "wrong dtype": (
        tensors(FILE, lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].half()})),
        f"{FILE}: {DOWN}.weight: found F16",
    ),
    "missing tensor": (tensors(FILE, lambda t: t.pop(f"{DOWN}.weight")), f"{FILE}: 1 tensors missing"),
    "extra tensor": (rename(f"{DOWN}.weight", "x"), f"{FILE}: 1 tensors not expected"),
    "not finite": (tensors(FILE, lambda t: t[f"{DOWN}.weight"].fill_(float("nan"))), f"{DOWN}.weight"),
    "another checkpoint's": (
        tensors(FILE, lambda t: None, elastic_checkpoint="0123456789abcdef"),
        "belongs to another elastic checkpoint",
    ),
    "another count": (ladder(channels=24), "found F32"),
    "a huge count": (ladder(channels=2**30), "keeps 1073741824 of 64 units of mlp"),
    "more heads than there are": (ladder(key_value_heads=3), "keeps 3 of 2 units of attention"),
    "another sum": (ladder(weights=9215), "has 9216 weights, elastic_config.json says 9215"),
    "biases that are not there": (ladder(biases=True), "tensors missing"),
    "no fraction": (ladder(fraction=1.0), "ladder.structured.1.fraction"),
    "a fraction twice": (ladder(fraction=0.25), "fractions must be strictly increasing"),
    "more weights than there are": (ladder(weights=10**9), "keeps 1000000000 of"),
    "another fraction": (ladder(fraction=0.75), "no structured-0.75|structured-0.5'? is of no level"),
    "a section of no level": (fields(CONFIG_NAME, "ladder", structured=[]), "is of no level in ladder.structured"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, whole, tmp_path):
    damage, message = DAMAGE[name]
    shutil.copytree(whole, tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        ElasticModel.from_pretrained(tmp_path / "c", HALF)
    try:
        checks = verify(tmp_path / "c")
    except CheckpointError:  # elastic_config.json itself
        return
    failed = [check for check in checks if not check.passed]
    assert len(failed) == 1 and re.search(message, failed[0].detail)
    ElasticModel.from_pretrained(tmp_path / "c", 0.7)  # other levels do not care


def test_verify_reads_by_itself(whole, monkeypatch, tmp_path):
    """A loader that gets a weight wrong is found."""
    module = sys.modules["elastic_sparsity.verify"]  # the package's name of it is the function
    real = module.load_level

    def wrong(checkpoint, level, dtype):
        model = real(checkpoint, level, dtype)
        with torch.no_grad():
            next(iter(linears_of(model).values())).weight[0, 0] += 1
        return model

    monkeypatch.setattr(module, "load_level", wrong)
    failed = [check for check in module.verify(whole) if not check.passed]
    assert {check.name.split(":")[0] for check in failed} >= {"structured 25 %", "structured 50 %"}


def test_shards_read_as_one(tiny_checkpoint, settings, tmp_path, monkeypatch):
    real = checkpoint_writer.add_section
    monkeypatch.setattr(adding, "add_section", lambda *a: real(*a, max_shard_bytes=10_000))
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    add_structured(tmp_path / "c", [0.5], **settings)
    files = [entry.file for entry in ElasticCheckpoint(tmp_path / "c").manifest.files[HALF]]
    assert len(files) > 2 and files[0] == f"{HALF}-00001-of-{len(files):05d}.safetensors"
    assert all(check.passed for check in verify(tmp_path / "c"))
