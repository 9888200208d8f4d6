"""Budgets -> a level and why: by a table, by an oracle, and in the words of every refusal."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import tiny_recipe
from machines import made_up_profile, profile_data

from elastic_sparsity import ElasticCheckpoint, ElasticModel, choose_level, copy_level, optimize
from elastic_sparsity.errors import CheckpointError, ConfigError, LevelError, ProfileError

PERPLEXITY = {"dense": 10.0, "0.5": 12.5, "0.6": 20.0, "0.7": 40.0, "2:4": 16.0}  # qualities 0.8, 0.5, 0.25, 0.625
PACKED_MS = {"0.5": 8.0, "0.6": 6.0, "0.7": 4.0, "2:4": 9.0}
LEVELS = ("0.5", "2:4", "0.6", "0.7")  # best first, by perplexity


def record(folder, perplexity):
    rows = [
        {"level": level, "method": "dense" if level == "dense" else "elastic", "perplexity": value, "kl": 0.1}
        for level, value in perplexity.items()
    ]
    ElasticCheckpoint(folder).update_record({"quality": {"protocol": {}, "rows": rows}})
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A checkpoint with perplexities in its record. Without adapters, whose bytes drown the shells' in tiny models."""
    folder = tmp_path_factory.mktemp("measured") / "checkpoint"
    optimize(tiny_recipe(adapters={"ranks": 0}, block={"steps": 0}, end_to_end={"trainable": "off"}), folder)
    return record(folder, PERPLEXITY)


@pytest.fixture(scope="module")
def sizes(measured):
    checkpoint = ElasticCheckpoint(measured)
    return {level.name: checkpoint.download_bytes(level) for level in checkpoint.ladder.levels}


@pytest.fixture(scope="module")
def profile(measured):
    mine = ElasticCheckpoint(measured).manifest.checkpoint_id
    dense = [(mine, level, "dense-float32", 10.0) for level in LEVELS]
    return made_up_profile([*dense, *((mine, level, "packed-float32", ms) for level, ms in PACKED_MS.items())])


@pytest.fixture(scope="module")
def quick_dense(measured):
    mine = ElasticCheckpoint(measured).manifest.checkpoint_id
    dense = [(mine, level, "dense-float32", 3.0) for level in LEVELS]
    return made_up_profile([*dense, *((mine, level, "packed-float32", ms) for level, ms in PACKED_MS.items())])


# budgets (bytes as a level's whole download and a difference) -> level, or a refusal, and a part of the text
TABLE = [
    ({"max_ms_per_token": 100}, "0.5", "best level within the budget (best recorded perplexity)."),
    ({"max_ms_per_token": 9}, "0.5", 'Load it with runtime="packed", dtype="float32".'),
    ({"max_ms_per_token": 8}, "0.5", "8 ms a token (measured), quality 0.8."),
    ({"max_ms_per_token": 7.9}, "0.6", "Not the better 2:4 packed: its 9 ms a token (measured) are over 7.9."),
    ({"max_ms_per_token": 5}, "0.7", "Not the better 60 % packed: its 6 ms a token (measured) are over 5."),
    ({"max_ms_per_token": 3.9}, None, "no level decodes within 3.9 ms a token; the fastest, 70 % packed, is measured"),
    ({"max_bytes": ("2:4", 0)}, "0.5", "best recorded perplexity"),
    ({"max_bytes": ("0.5", 0)}, "0.5", "best recorded perplexity"),
    ({"max_bytes": ("0.5", -1)}, "0.6", "Not the better 2:4 packed: its "),
    ({"max_bytes": ("0.6", -1)}, "0.7", "Not the better 60 % packed: its "),
    ({"max_bytes": ("0.7", 0)}, "0.7", "best recorded perplexity"),
    ({"max_bytes": ("0.7", -1)}, None, "; the smallest, 70 %, needs "),
    ({"max_bytes": 10}, None, "no level fits into 10 bytes; the smallest, 70 %, needs "),
    ({"max_bytes": "1GB"}, "0.5", "within the budget"),
    (
        {"min_quality": 0.8},
        "0.5",
        "smallest level of quality 0.8 or more. Not the smaller 60 % packed",
    ),
    ({"min_quality": 0.6}, "0.5", "Not the smaller 60 % packed: its quality 0.5 is below 0.6."),
    ({"min_quality": 0.5}, "0.6", "Not the smaller 70 % packed: its quality 0.25 is below 0.5."),
    ({"min_quality": 0.81}, None, "no level reaches quality 0.81; the best, 50 %, has 0.8."),
    ({"min_quality": 0.01}, "0.7", "smallest level of quality 0.01 or more"),
    ({"min_quality": 0.5, "max_ms_per_token": 7}, "0.6", "Not the better 2:4 packed"),
    ({"min_quality": 0.6, "max_ms_per_token": 7}, None, "the nearest is 50 % packed. 50 % packed: its 8 ms a token"),
    ({"min_quality": 0.6, "max_ms_per_token": 6.5}, None, "the nearest is 60 % packed. 50 % packed"),
    ({"min_quality": 0.6, "max_ms_per_token": 7}, None, "60 % packed: its quality 0.5 is below 0.6"),
    ({"min_quality": 0.4, "max_ms_per_token": 5}, None, "no level meets all budgets"),
    ({"min_quality": 0.25, "max_ms_per_token": 5, "max_bytes": "1GB"}, "0.7", "70 % packed"),
    ({"min_quality": 0.6, "max_bytes": ("2:4", -1)}, "0.5", "quality 0.8"),
    ({"min_quality": 0.6, "max_bytes": ("0.5", -1)}, None, "2:4 packed: its "),
]


@pytest.mark.parametrize(("budgets", "level", "text"), TABLE)
def test_budgets(budgets, level, text, measured, sizes, profile):
    budgets = dict(budgets)
    if isinstance(budgets.get("max_bytes"), tuple):
        name, change = budgets["max_bytes"]
        budgets["max_bytes"] = sizes[name] + change
    if level is None:
        with pytest.raises(LevelError) as caught:
            choose_level(measured, profile=profile, **budgets)
        assert text in str(caught.value) and str(measured) in str(caught.value)
        return
    choice = choose_level(measured, profile=profile, **budgets)
    assert choice.level == level
    assert text in choice.explanation
    assert choice.quality == pytest.approx(10 / PERPLEXITY[level])
    assert (choice.runtime, choice.dtype, choice.how) == ("packed", "float32", "measured")
    assert (choice.bytes, choice.ms_per_token) == (sizes[level], pytest.approx(PACKED_MS[level]))


def test_every_budget_against_the_obvious_search(measured, sizes, profile):
    byte_budgets = [None, *sorted({size + change for size in sizes.values() for change in (-1, 0)})]
    found = refused = 0
    for max_bytes, max_ms, quality in itertools.product(byte_budgets, [None, 3, 4, 6, 7, 8, 9], [None, 0.3, 0.5, 0.7]):
        if max_bytes is max_ms is quality is None:
            continue
        fitting = [
            level
            for level in LEVELS
            if sizes[level] <= (max_bytes or math.inf)
            and PACKED_MS[level] <= (max_ms or math.inf)
            and 10 / PERPLEXITY[level] >= (quality or 0)
        ]
        budgets = {"max_bytes": max_bytes, "max_ms_per_token": max_ms, "min_quality": quality}
        if not fitting:
            refused += 1
            with pytest.raises(LevelError, match="no level"):
                choose_level(measured, profile=profile, **budgets)
            continue
        found += 1
        best = min(fitting, key=sizes.get) if max_bytes is max_ms is None else fitting[0]
        assert choose_level(measured, profile=profile, **budgets).level == best, budgets
    assert found > 50 and refused > 20


def test_without_a_profile_the_checkpoints_own_dtype_and_dense(measured):
    choice = choose_level(measured, min_quality=0.5)
    assert (choice.level, choice.runtime, choice.dtype) == ("0.6", "dense", None)
    assert (choice.ms_per_token, choice.how) == (None, None)
    assert choice.explanation.startswith("60 %: ") and " ms " not in choice.explanation
    assert "runtime" not in choice.explanation


def test_dense_where_packing_gains_nothing(measured, quick_dense):
    choice = choose_level(measured, profile=quick_dense, max_ms_per_token=5)
    assert (choice.level, choice.runtime, choice.ms_per_token) == ("0.5", "dense", pytest.approx(3.0))


def test_without_recorded_quality_the_densest(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    sizes = {level.name: checkpoint.download_bytes(level) for level in checkpoint.ladder.levels}
    for budget in {size + change for size in sizes.values() for change in (-1, 0, 1)}:
        fitting = [name for name in ("0.5", "2:4", "0.6", "0.7") if sizes[name] <= budget]  # densest first
        if fitting:
            choice = choose_level(tiny_checkpoint, max_bytes=budget)
            assert (choice.level, choice.quality) == (fitting[0], None)
            assert "densest, as no quality is recorded" in choice.explanation
    with pytest.raises(LevelError, match="no level fits"):
        choose_level(tiny_checkpoint, max_bytes=min(sizes.values()) - 1)
    with pytest.raises(ConfigError, match="does not record; make it with an evaluation text"):
        choose_level(tiny_checkpoint, min_quality=0.5)


@pytest.mark.parametrize("value", ["10", None, float("nan"), float("inf"), -1, 0, True, [], {}])
def test_a_record_that_holds_no_number_is_no_quality(value, measured, tmp_path):
    folder = record(shutil.copytree(measured, tmp_path / "c"), {**PERPLEXITY, "0.5": value})
    assert choose_level(folder, max_bytes="1GB").level == "2:4"
    with pytest.raises(ConfigError, match="of every level, which this checkpoint does not record"):
        choose_level(folder, min_quality=0.1)
    record(folder, {**PERPLEXITY, "dense": value})
    assert choose_level(folder, max_bytes="1GB").quality is None


def test_only_levels_that_are_here(measured, tmp_path):
    copy_level(measured, "0.6", tmp_path / "device")
    choice = choose_level(tmp_path / "device", max_bytes="1GB")
    assert choice.level == "0.6"
    assert "Not the better 2:4: its files are not here." in choice.explanation
    (tmp_path / "device" / "shared.safetensors").unlink()
    with pytest.raises(LevelError, match="no level is complete here"):
        choose_level(tmp_path / "device", max_bytes="1GB")


def test_an_estimate_says_so(measured):
    choice = choose_level(measured, profile="phone", max_ms_per_token=1000)
    assert choice.how == "estimate, not measured"
    assert "(estimate, not measured)" in choice.explanation
    assert "Profile 'phone' is an estimate, not measured" in choice.explanation
    with pytest.raises(LevelError, match=r"is predicted at [\d.]+ ms \(estimate, not measured\)"):
        choose_level(measured, profile="phone", max_ms_per_token=1e-6)


def test_another_checkpoint_is_predicted(measured):
    profile = made_up_profile([("another-one", "0.5", "dense-float32", 1.0)])
    choice = choose_level(measured, profile=profile, max_ms_per_token=1000)
    assert choice.how == "predicted" and "(predicted)" in choice.explanation
    with pytest.raises(LevelError, match=r"the fastest, 70 % packed, is predicted at [\d.]+ ms\.$"):
        choose_level(measured, profile=profile, max_ms_per_token=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "no budget; give max_bytes, max_ms_per_token or min_quality"),
        ({"profile": "phone"}, ConfigError, "no budget"),
        ({"max_ms_per_token": 5}, ConfigError, "max_ms_per_token: needs a device profile; `elastic-sparsity bench`"),
        ({"max_bytes": 0}, ConfigError, "max_bytes: 0 is not a whole number above 0"),
        ({"max_bytes": 1.5}, ConfigError, "max_bytes: 1.5"),
        ({"max_bytes": True}, ConfigError, "max_bytes: True"),
        ({"max_bytes": "12 apples"}, ConfigError, "'12 apples' is no size"),
        ({"min_quality": 0}, ConfigError, "min_quality: 0 is not a number above 0"),
        ({"min_quality": float("nan")}, ConfigError, "min_quality: nan"),
        ({"max_ms_per_token": "5", "profile": "phone"}, ConfigError, "max_ms_per_token: '5'"),
        ({"max_bytes": 10, "profile": "toaster"}, ProfileError, "'toaster': no such file; profiles of the package"),
        ({"max_bytes": 10, "runtime": "fast"}, ConfigError, "runtime: 'fast' is not one of dense, packed"),
        ({"max_bytes": 10, "dtype": "int4"}, ConfigError, "dtype: 'int4' is not one of float32"),
        ({"max_bytes": 10, "branch": "x"}, ConfigError, "unknown argument 'branch'"),
    ],
)
def test_wrong_arguments(arguments, error, message, measured):
    with pytest.raises(error, match=message):
        choose_level(measured, **arguments)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no elastic checkpoint here"):
        choose_level(tmp_path, max_bytes=10)


def test_a_runtime_and_dtype_that_are_given_are_what_is_predicted(measured, profile, quick_dense):
    """The milliseconds of the fastest way say nothing of another one."""
    assert choose_level(measured, profile=profile, max_ms_per_token=9).runtime == "packed"
    with pytest.raises(LevelError, match="no level decodes within 9 ms a token; the fastest, 50 % dense, is measured"):
        choose_level(measured, profile=profile, max_ms_per_token=9, runtime="dense")
    packed = choose_level(measured, profile=quick_dense, max_ms_per_token=5, runtime="packed", dtype=torch.float32)
    assert (packed.level, packed.runtime, packed.dtype, packed.device) == ("0.7", "packed", "float32", "cpu")
    with pytest.raises(
        ProfileError, match="no way of runtime packed and dtype bfloat16; it has dense-float32, packed-"
    ):
        choose_level(measured, profile=profile, max_ms_per_token=9, runtime="packed", dtype="bfloat16")
    assert choose_level(measured, profile=profile, max_ms_per_token=9, dtype="auto").dtype == "float32"


def test_levels_that_a_given_runtime_cannot_hold_are_not_offered(measured, tmp_path, monkeypatch):
    with pytest.raises(LevelError, match="no level of this checkpoint runs by runtime packed and dtype float16"):
        choose_level(measured, max_bytes="1GB", runtime="packed", dtype="float16")
    with pytest.raises(LevelError, match="runs by runtime semi_structured"):  # 16 rows, which its products do not take
        choose_level(measured, max_bytes="1GB", runtime="semi_structured")
    monkeypatch.setattr("elastic_sparsity.choosing.misfit", lambda *_: None)
    choice = choose_level(measured, max_bytes="1GB", runtime="semi_structured", dtype="bfloat16")
    assert (choice.level, choice.runtime, choice.dtype, choice.device) == ("2:4", "semi_structured", "bfloat16", None)
    patternless = tiny_recipe(ladder={"patterns": []}, block={"steps": 0}, end_to_end={"trainable": "off"})
    optimize(patternless, tmp_path / "checkpoint")
    with pytest.raises(LevelError, match="no level of this checkpoint runs by runtime semi_structured"):
        choose_level(tmp_path / "checkpoint", max_bytes="1GB", runtime="semi_structured")


def test_a_profile_is_of_a_device(measured, tmp_path):
    rows = [(ElasticCheckpoint(measured).manifest.checkpoint_id, level, "dense-float32", 1.0) for level in LEVELS]
    of_gpu = profile_data(rows)
    of_gpu["device"]["kind"] = "cuda"
    (tmp_path / "gpu.json").write_text(json.dumps(of_gpu))
    budget = {"device_profile": tmp_path / "gpu.json", "max_ms_per_token": 2}
    assert choose_level(measured, profile=tmp_path / "gpu.json", max_ms_per_token=2).device == "cuda"
    with pytest.raises(ConfigError, match="device: 'cpu', but device_profile is of a cuda device"):
        ElasticModel.from_pretrained(measured, device="cpu", **budget)
    with pytest.raises(ConfigError, match="max_ms_per_token: a profile is of one device"):
        ElasticModel.from_pretrained(measured, device_map="auto", **budget)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device_profile: is of a cuda device, which is not on this machine"):
            ElasticModel.from_pretrained(measured, **budget)
    on_cpu = ElasticModel.from_pretrained(measured, device="cpu", device_profile="phone", max_ms_per_token=1000)
    assert on_cpu.device.type == "cpu"


def test_a_way_that_cannot_hold_the_linears_is_not_proposed(measured):
    """A GPU's profile is of another checkpoint; here k_proj has 16 rows, which 2:4 products do not take."""
    mine = ElasticCheckpoint(measured).manifest.checkpoint_id
    rows = [*((mine, level, "dense-float16", 10.0) for level in LEVELS), (mine, "2:4", "semi_structured-float16", 1.0)]
    profile = made_up_profile(rows, ways=(("dense", "float16"), ("semi_structured", "float16")))
    assert choose_level(measured, profile=profile, max_ms_per_token=20).runtime == "dense"
    with pytest.raises(LevelError, match="no level decodes within 5 ms a token; the fastest, 50 % dense"):
        choose_level(measured, profile=profile, max_ms_per_token=5)
