"""The page: balanced, nothing from elsewhere, every figure in it, every name escaped, what is missing said in words."""

import json
import os
import re
import shutil
import subprocess

import pytest
from reports import HASH, KL, PERPLEXITY, Page, hostile_record, quality, with_record

from elastic_sparsity import ElasticCheckpoint, write_report
from elastic_sparsity.report_facts import read_facts
from elastic_sparsity.report_page import use_commands


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("page") / "tiny-elastic")
    return with_record(folder, quality=quality(), base_model={"id": "owner/model", "sha256": HASH})


@pytest.fixture(scope="module")
def text(folder):
    return write_report(folder).read_text(encoding="utf-8")


def check_page(text):
    """Balanced, and no way out of it but plain links."""
    page = Page(text)
    assert page.problems == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "video", "audio"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or "#"
            link = tag == "a" and value.startswith("https://huggingface.co/")
            assert link or value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", text)
    return page


def test_it_parses_and_is_self_contained(text):
    page = check_page(text)
    policy = next(x for _, x in page.tags if x.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy.startswith("default-src 'none'")
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert ("a", {"href": "https://huggingface.co/owner/model"}) in page.tags


def test_every_level_and_figure_is_there(text, folder):
    seen = Page(text).text
    for level in ElasticCheckpoint(folder).ladder.levels:
        assert level.title in seen
    for values in PERPLEXITY.values():
        for value in values.values():
            assert f"{value:,.2f}" in seen
    for value in KL.values():
        assert f"{value:.4f}" in seen
    for words in ("21.98", "wikitext2-test.raw.txt", HASH, "147 windows of 2,048 tokens", "bfloat16", "sparsegpt",
                  ">= 50.00 %", "end_to_end.trainable", "random:llama", "calibration tokens 96"):  # fmt: skip
        assert words in seen, words
    config = json.loads((folder / "elastic_config.json").read_text())
    assert config["data"]["calibration_sha256"] in seen and config["checkpoint_id"] in seen


def test_what_is_missing_is_said(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (folder / "run.json").unlink()
    (folder / "shell-level-0.5.safetensors").unlink()
    ElasticCheckpoint(folder).update_record(dict.fromkeys(("training", "recipe", "versions", "resolved")))
    seen = check_page(write_report(folder).read_text(encoding="utf-8")).text
    for words in (
        "neither perplexity nor KL to the dense model was measured", "no training record by block",
        "time and peak memory of the run not recorded", "Recipe: not recorded",
        "The files of 50 %, 2:4 are not in this folder", "license is not recorded", "seed not recorded", "50 % 50.00 %",
    ):  # fmt: skip
        assert words in seen, words
    assert not re.search(r"<td[^>]*></td>", (folder / "report.html").read_text()), "a blank says nothing"
    ElasticCheckpoint(folder).update_record({"quality": {"rows": [
        {"level": "0.5", "method": "elastic", "perplexity": 12.0, "kl": None},
        {"level": "0.6", "method": "elastic", "perplexity": float("inf"), "kl": float("nan")},
    ]}})  # fmt: skip
    seen = check_page(write_report(folder).read_text(encoding="utf-8")).text
    for words in (
        "Perplexity was not measured at 70 %, 2:4.", "KL to the dense model was not measured at 50 %, 70 %, 2:4.",
        "How these figures were measured is not recorded", "The dense model was not measured",
        "No other pruning method", "perplexity at 60 % is no finite number", "infinite not a number",
    ):  # fmt: skip
        assert words in seen, words


def test_hostile_names_are_text(tiny_checkpoint, tmp_path):
    folder = hostile_record(shutil.copytree(tiny_checkpoint, tmp_path / "<script>alert(2)<"))
    text = write_report(folder).read_text(encoding="utf-8")
    page = check_page(text)
    assert "<script" not in text and "<script>alert(1)</script>" in page.text and "<script>alert(2)<" in page.text


def test_commands_run_in_a_shell(tiny_checkpoint, tmp_path):
    """A folder's name cannot end its quotes; the commands are what README promises."""
    name = 'a\'b "c" $(touch owned) `d`'
    facts = read_facts(ElasticCheckpoint(tiny_checkpoint), name)
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for command in ("elastic-sparsity", "python"):
        (stubs / command).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (stubs / command).chmod(0o755)
    environment = {**os.environ, "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}"}
    slice_, python = (
        subprocess.run(
            ["sh", "-c", x], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for x in use_commands(facts)
    )
    assert slice_.splitlines() == ["slice", name, "--level", "0.6", "--output", f"{name}-0.6"]
    source = python.removeprefix("-c\n")
    compile(source, "command", "exec")
    assert json.dumps(name) in source and not (tmp_path / "owned").exists()


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no headless browser (chromium) is installed")
def test_a_browser_opens_it_offline(folder, text, tmp_path):
    page = folder / "report.html"
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=390,844",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = Page(done.stdout).text
    assert "tiny-elastic" in seen and "33.54" in seen and "Limits" in seen
    assert "Content Security Policy" not in done.stderr
