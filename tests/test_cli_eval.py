"""What `eval --output` keeps, and which levels it measures of a folder that does not hold all."""

import json
import shutil

import pytest
from conftest import tiny_recipe
from test_cli import expect_error, run

from elastic_sparsity import copy_level, measure, optimize
from elastic_sparsity.bench import bench
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

OPTIONS = ("--window", "64", "--max-windows", "1", "-q", "--output")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "news.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def rows_of(path):
    return {row["level"]: row["perplexity"] for row in json.loads(path.read_text())["rows"]}


def test_one_level_replaces_its_own_row_alone(capsys, tiny_checkpoint, text, tmp_path):
    output = tmp_path / "e.json"
    assert run(capsys, "eval", tiny_checkpoint, "--text", text, *OPTIONS, output)[0] == 0
    whole = rows_of(output)
    assert list(whole) == ["0.5", "0.6", "0.7", "2:4"]
    assert run(capsys, "eval", tiny_checkpoint, "--text", text, "--level", "0.6", *OPTIONS, output)[0] == 0
    assert rows_of(output) == whole


def test_what_was_finished_is_kept_when_a_later_level_fails(capsys, tiny_checkpoint, text, tmp_path, monkeypatch):
    output, load = tmp_path / "e.json", measure.load_level

    def failing(checkpoint, level, dtype):
        if level.name == "0.7":
            raise KeyboardInterrupt
        return load(checkpoint, level, dtype)

    monkeypatch.setattr(measure, "load_level", failing)
    assert run(capsys, "eval", tiny_checkpoint, "--text", text, *OPTIONS, output)[0] != 0
    assert list(rows_of(output)) == ["0.5", "0.6"]


def test_rows_of_another_text_or_of_other_weights_are_not_mixed_nor_lost(capsys, text, tmp_path, monkeypatch):
    folder, output, other = tmp_path / "c", tmp_path / "e.json", tmp_path / "other.txt"
    optimize(tiny_recipe(), folder)
    assert run(capsys, "eval", folder, "--text", text, *OPTIONS, output)[0] == 0
    before = output.read_bytes()
    other.write_text(text.read_text()[::-1])
    monkeypatch.setattr(measure, "load_level", lambda *_: pytest.fail("refused before any work"))
    expect_error(
        capsys, "e.json: its perplexities have the protocol", "eval", folder, "--text", other, *OPTIONS, output
    )
    shutil.rmtree(folder)
    optimize(tiny_recipe(seed=1), folder)
    expect_error(capsys, "are of other weights that were at this", "eval", folder, "--text", text, *OPTIONS, output)
    assert output.read_bytes() == before


def test_a_device_with_some_levels_measures_those_and_says_so(capsys, tiny_checkpoint, text, tmp_path):
    copy_level(tiny_checkpoint, "2:4", tmp_path / "device")  # has 50 % too, not the adapters of 60 % and 70 %
    output = tmp_path / "e.json"
    code, _, stderr = run(capsys, "eval", tmp_path / "device", "--text", text, *OPTIONS, output)
    assert code == 0 and "not all files of 0.6, 0.7 are here; only the other levels are used" in " ".join(
        stderr.split()
    )
    assert list(rows_of(output)) == ["0.5", "2:4"]
    profile = bench(tmp_path / "device", prompt=4, new_tokens=2, repeats=1, ways=["dense-float32"])
    assert {row.level for row in profile.measurements} == {"0.5", "2:4"}
    (tmp_path / "device" / "shell-core.safetensors").unlink()
    expect_error(capsys, "no level is complete here", "eval", tmp_path / "device", "--text", text, "-q")


def test_the_base_model_is_known_in_the_dtype_of_its_run(capsys, text, tmp_path):
    tiny_model("llama").half().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    optimize(tiny_recipe(model={"id": str(tmp_path / "base"), "dtype": "bfloat16"}), tmp_path / "c")
    for dtype, fits in (("auto", False), ("bfloat16", True)):
        output = tmp_path / f"{dtype}.json"
        assert run(capsys, "eval", tmp_path / "base", "--dtype", dtype, "--text", text, *OPTIONS, output)[0] == 0
        code, _, stderr = run(capsys, "report", tmp_path / "c", "--results", output, "--force")
        assert (code == 0) == fits and ("neither this checkpoint nor its base" in stderr) != fits
    expect_error(capsys, "--dtype is for plain models", "eval", tmp_path / "c", "--dtype", "float32", "--text", text)
    expect_error(capsys, "--dtype: 'int8' is not one of auto", "eval", tmp_path / "base", "--dtype", "int8", "--text",
                 text)  # fmt: skip


def test_one_folder_by_two_names_is_one_model(capsys, tiny_checkpoint, text, tmp_path, monkeypatch):
    output = tmp_path / "e.json"
    for path, level in ((tiny_checkpoint, "0.5"), (f"{tiny_checkpoint}/", "0.6"), (tiny_checkpoint.name, "0.7")):
        monkeypatch.chdir(tiny_checkpoint.parent)
        assert run(capsys, "eval", path, "--text", text, "--level", level, *OPTIONS, output)[0] == 0
    assert list(rows_of(output)) == ["0.5", "0.6", "0.7"]
    assert run(capsys, "eval", "random:llama", "--text", text, *OPTIONS, output)[0] == 0
    assert list(rows_of(output)) == ["dense"], "another model's file is begun anew"


def test_two_references_of_one_name_are_not_mixed(capsys, tiny_checkpoint, text, tmp_path):
    output = tmp_path / "e.json"
    for parent, scale in (("a", 1), ("b", 2)):
        model = tiny_model("llama")
        model.model.norm.weight.data.mul_(scale)
        model.save_pretrained(tmp_path / parent / "base")
        byte_tokenizer().save_pretrained(tmp_path / parent / "base")
    command = ("eval", tiny_checkpoint, "--text", text, *OPTIONS, output, "--level")
    assert run(capsys, *command, "0.5", "--reference", tmp_path / "a" / "base")[0] == 0
    protocol = json.loads(output.read_text())["protocol"]
    assert protocol["reference"] == "base" and len(protocol["reference_sha256"]) == 64
    expect_error(capsys, "name another --output", *command, "0.6", "--reference", tmp_path / "b" / "base")
    assert run(capsys, *command, "0.6", "--reference", tmp_path / "a" / "base")[0] == 0


def test_bytes_on_disk_are_those_of_the_files(capsys, text, tmp_path):
    output = tmp_path / "e.json"
    tiny_model("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    command = ("--text", text, "--window", "64", "--max-windows", "1", "--output", output)
    assert run(capsys, "eval", tmp_path / "base", *command)[0] == 0
    assert json.loads(output.read_text())["rows"][0]["bytes"] == size
    code, stdout, stderr = run(capsys, "eval", "random:llama", *command)
    assert code == 0 and "kB" not in stdout, stderr
    assert json.loads(output.read_text())["rows"][0]["bytes"] is None


def test_options_that_would_change_nothing_are_refused(capsys, tmp_path):
    for option, value in (("--reference", "random:llama"), ("--window", "2048"), ("--max-windows", "1")):
        expect_error(capsys, f"{option}: is for perplexity", "eval", "random:llama", "--tasks", "piqa", option, value)
    for option, value in (("--task-limit", "3"), ("--task-batch", "8"), ("--task-data", tmp_path)):
        expect_error(capsys, f"{option}: is for tasks; name some", "eval", "random:llama", "--text", "t", option, value)
