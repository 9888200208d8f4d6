"""The commands as a user meets them: `add-structured`, and `slice`, `upgrade`, `inspect`, `export` of such a level."""

import json
import shutil

import pytest
from test_cli import run
from test_transfer import contents
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ("--samples", 4, "--length", 16, "--precision", "float32", "-q")


def test_add_slice_and_inspect(capsys, tiny_checkpoint, text_file, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(tiny_checkpoint, folder)
    code, stdout, stderr = run(
        capsys, "add-structured", folder, "--fractions", "0.25, 0.5", "--calibration", text_file, *QUICK
    )
    assert code == 0, stderr
    assert "holds level structured-0.5 (1 key/value heads and 32 MLP channels a block; " in stdout
    assert stdout.count("holds level") == 2

    code, stdout, _ = run(capsys, "slice", folder, "--level", "structured-0.5", "--output", tmp_path / "half")
    assert code == 0 and "half: level structured-0.5, open it with AutoModelForCausalLM" in stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert (model.config.num_key_value_heads, model.config.intermediate_size) == (1, 32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "half")("a fox", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3

    code, stdout, _ = run(
        capsys, "slice", folder, "--level", "structured-0.5", "--format", "elastic", "--output", tmp_path / "device"
    )
    assert code == 0 and "of tensors; open it with ElasticModel" in stdout
    code, stdout, _ = run(capsys, "upgrade", tmp_path / "device", "--from", folder, "--level", "structured-25%")
    assert code == 0 and "added structured-0.25.safetensors" in stdout

    code, stdout, _ = run(capsys, "inspect", folder, "--json", "--verify")
    found = json.loads(stdout)
    assert code == 0 and [x["name"] for x in found["levels"] if x["structured"]] == [
        "structured-0.25",
        "structured-0.5",
    ]
    assert len(found["checks"]) == 9 and len(found["layer_types"][0]["sparsity"]) == 4
    code, stdout, _ = run(capsys, "inspect", folder)
    assert code == 0 and "structured 50 %" in stdout and "zeros by block" not in stdout
    assert "structured 50 %: 1 key/value heads and 32 MLP channels a block, not tuned" in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fractions", "half"], "--fractions: 'half' are no numbers"),
        (["--fractions", "1"], "sparsity: 1 is not between 0 and 1"),
        (["--fractions", "nan"], "sparsity: nan is not between 0 and 1"),
        (["--fractions", "0.5", "--scores", "best"], "--scores: 'best' is not one of"),
        (["--fractions", "0.5", "--model", "random:opt"], "it holds other weights"),
        (["--fractions", "0.5", "--damping", 0], "scores.damping"),
        (["--fractions", "0.5", "--lr", "1e-3"], "--lr: is the rate of a tuning, and without --steps there is none"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_checkpoint, text_file, tmp_path, options, message):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    code, stdout, stderr = run(
        capsys, "add-structured", tmp_path / "c", "--calibration", text_file, *QUICK, *options
    )  # fmt: skip
    assert (code, stdout) == (2, "")
    assert message in stderr and "Traceback" not in stderr
    assert contents(tmp_path / "c") == contents(tiny_checkpoint)


def test_no_checkpoint_there(capsys, tmp_path):
    code, _, stderr = run(capsys, "add-structured", tmp_path / "none", "--fractions", "0.5")
    assert code == 2 and "no elastic checkpoint here" in stderr
