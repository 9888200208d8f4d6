"""The command `prune` as a user meets it: a smaller folder that plain transformers opens, or one clear line."""

import json

import pytest
import torch
from test_cli import run, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_sparsity.models import load_base
from elastic_sparsity.pruning import prune
from elastic_sparsity.tiny import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
QUICK = ("--samples", 4, "--length", 16)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("scores", ["obs", "flap", "magnitude"])
def test_a_folder_that_transformers_opens(capsys, tmp_path, text_file, scores):
    before = save_tiny(tmp_path / "dense").num_parameters()
    output = tmp_path / "small"
    code, stdout, stderr = run(
        capsys, "prune", tmp_path / "dense", "--structured", 0.5, "--calibration", text_file, "--output", output,
        "--scores", scores, *QUICK, "-q",
    )  # fmt: skip
    assert code == 0, stderr
    assert "1 of 2 key/value heads stay" in stdout and "32 of 64 MLP channels: 50.00 %" in stdout
    model = AutoModelForCausalLM.from_pretrained(output)
    assert f"{before:,} parameters became {model.num_parameters():,}" in stdout
    config = json.loads((output / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert config["intermediate_size"] == 32
    ids = AutoTokenizer.from_pretrained(output)("a fox", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert load_base(str(output)).model.num_parameters() == model.num_parameters(), "we open it too"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "text.txt"]


def test_equal_seeds_give_equal_files_and_dtypes_stay(tmp_path, text_file):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "dense")
    load_base("random:llama").tokenizer.save_pretrained(tmp_path / "dense")
    options = {"sparsity": 0.5, "calibration": str(text_file), "samples": 4, "length": 16, "precision": "float32"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(str(tmp_path / "dense"), tmp_path / name, seed=seed, **options)
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").dtype == torch.bfloat16


def test_progress_and_self_calibration(tmp_path):
    seen = []
    found = prune(
        "random:mistral", tmp_path / "small", sparsity=0.5, samples=4, length=16,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert ("pruning blocks, structured 50 %", 2, 2) in seen
    assert len(found.sizes.groups) == 2 and found.sizes.sparsity == 0.5
    assert found.parameters_before - found.parameters_after == found.sizes.removed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--structured", 0], "sparsity: 0 is not between 0 and 1"),
        (["--structured", 1], "sparsity: 1 is not between 0 and 1"),
        (["--structured", "nan"], "sparsity: nan is not between 0 and 1"),
        (["--structured", 0.5, "--multiple", 7], "multiple: 7 does not divide the 64 channels"),
        (["--structured", 0.5, "--multiple", 0], "multiple: 0 does not divide"),
        (["--structured", 0.95], "sparsity: 0.95 of the blocks' linears cannot be removed"),
        (["--structured", 0.5, "--scores", "best"], "--scores: 'best' is not one of obs, flap, magnitude"),
        (["--structured", 0.5, "--calibration", "./missing.txt"], "no such file"),
        (["--structured", 0.5, "--samples", 10**6], "calibration: 1800 tokens give 112 samples of 16"),
        (["--structured", 0.5, "--dtype", "int3"], "model.dtype"),
        (["--structured", 0.5, "--damping", 0], "scores.damping"),
        (["--structured", 0.5, "--lr", "1e-3"], "--lr: is the rate of a tuning, and without --steps there is none"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, text_file, options, message):
    output = tmp_path / "small"
    code, stdout, stderr = run(
        capsys, "prune", "random:llama", "--calibration", text_file, *QUICK, "--output", output, "-q", *options
    )
    assert (code, stdout) == (2, "")
    assert message in stderr and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_existing_output_is_refused_before_any_work(capsys, tmp_path, text_file):
    (tmp_path / "mine").write_text("")
    code, _, stderr = run(
        capsys, "prune", "no/model/of/this/name", "--structured", 0.5, "--output", tmp_path, "-q"
    )  # fmt: skip
    assert code == 2 and "already holds something" in stderr
    code, _, stderr = run(capsys, "prune", "random:mamba", "--structured", 0.5, "--output", tmp_path / "x", "-q")
    assert code == 2 and "'mamba' has no row in the architecture table" in stderr
