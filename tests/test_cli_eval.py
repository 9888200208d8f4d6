"""What `eval --output` keeps, and which levels it measures of a folder that does not hold all."""

import gc
import json
import shutil
import weakref

import pytest
from conftest import tiny_recipe
from test_cli import expect_error, run
from test_zero_shot import TASKS, choice_documents, write

from elastic_sparsity import copy_level, measure, optimize
from elastic_sparsity.bench import bench
from elastic_sparsity.cli_eval import Record
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.task_files import load_tasks
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


@pytest.mark.parametrize("held", ['{"model": "another", "rows": []}', '{"rows": []}', "[1]", "{", "notes", "\xff"])
def test_what_an_output_holds_of_another_model_or_program_stays(capsys, tiny_checkpoint, text, tmp_path, held):
    output = tmp_path / "e.json"
    output.write_text(held, encoding="latin-1")
    message = "holds results of 'another'" if "another" in held else "holds what no `eval` wrote"
    expect_error(capsys, message, "eval", tiny_checkpoint, "--text", text, *OPTIONS, output)
    assert output.read_text(encoding="latin-1") == held
    output.write_text("")  # as mktemp makes it
    assert run(capsys, "eval", tiny_checkpoint, "--level", "0.5", "--text", text, *OPTIONS, output)[0] == 0


def test_an_output_in_a_new_folder(capsys, tiny_checkpoint, text, tmp_path):
    output = tmp_path / "new" / "folder" / "e.json"
    assert run(capsys, "eval", tiny_checkpoint, "--level", "0.5", "--text", text, *OPTIONS, output)[0] == 0
    assert list(rows_of(output)) == ["0.5"]


def test_two_processes_with_one_output_keep_each_others_rows(tmp_path):
    output, protocol, weights = tmp_path / "e.json", {"text": "t"}, {"checkpoint_id": "c"}
    records = [Record(output, "model") for _ in range(2)]
    for record in records:
        record.start_text(protocol, weights)
        record.start_tasks(None, "float32")
    row = {"method": "elastic", **weights}
    for record, level in zip(records, ("0.5", "0.6"), strict=True):
        record.add_text({"level": level, "perplexity": 2.0, **row})
        record.add_task({"level": level, "task": "piqa", "sha256": "d", **row})
    assert list(rows_of(output)) == ["0.5", "0.6"]
    assert [x["level"] for x in json.loads(output.read_text())["zero_shot"]["rows"]] == ["0.5", "0.6"]
    late = Record(output, "model")
    late.start_text(protocol, weights)
    before = output.read_bytes()
    records[0].text_protocol = {"text": "another"}
    with pytest.raises(ConfigError, match="have the protocol"):
        records[0].add_text({"level": "0.7", "perplexity": 2.0, **row})
    assert output.read_bytes() == before


def test_levels_are_not_in_memory_together(tiny_checkpoint, text, monkeypatch):
    """A second one need not fit beside the first."""
    alive = weakref.WeakSet()
    load = measure.load_level

    def counted(*args, **options):
        gc.collect()
        found.append(len(alive))
        model = load(*args, **options)
        alive.add(model)
        return model

    monkeypatch.setattr(measure, "load_level", counted)
    write(text.parent, "piqa", choice_documents(4))
    tasks = load_tasks(["piqa"], folder=TASKS, data=text.parent, limit=1)
    for measure_all in (
        lambda: measure.evaluate_path(str(tiny_checkpoint), text, window=32, max_windows=1),
        lambda: measure.zero_shot_path(str(tiny_checkpoint), tasks, limit=1),
    ):
        found = []
        measure_all()
        assert found == [0] * 4


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
    output.unlink()
    code, stdout, stderr = run(capsys, "eval", "random:llama", *command)
    assert code == 0 and "kB" not in stdout, stderr
    assert json.loads(output.read_text())["rows"][0]["bytes"] is None


def test_options_that_would_change_nothing_are_refused(capsys, tmp_path):
    for option, value in (("--reference", "random:llama"), ("--window", "2048"), ("--max-windows", "1")):
        expect_error(capsys, f"{option}: is for perplexity", "eval", "random:llama", "--tasks", "piqa", option, value)
    for option, value in (("--task-limit", "3"), ("--task-batch", "8"), ("--task-data", tmp_path)):
        expect_error(capsys, f"{option}: is for tasks; name some", "eval", "random:llama", "--text", "t", option, value)
