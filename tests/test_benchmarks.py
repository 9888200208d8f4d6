"""The evidence scripts as a user starts them, on tiny random models, and what they refuse."""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation
import cells
import estimates
import size
import zero_shot

from elastic_sparsity import ElasticCheckpoint, optimize
from elastic_sparsity.errors import DataError, NumericsError
from elastic_sparsity.files import write_json
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

DATA = Path(__file__).parents[2] / "shared" / "data"
RECIPE = """
[model]
id = "random:llama"
[calibration]
source = "given by --calibration"
samples = 8
length = 16
[ladder]
sparsities = [0.6]
patterns = ["2:4"]
[adapters]
ranks = 2
[block]
steps = 4
samples = 4
batch_size = 2
[end_to_end]
trainable = "base"
steps = 40
batch_size = 2
"""


@pytest.mark.parametrize("script", sorted(path.stem for path in Path(cells.__file__).parent.glob("*.py")))
def test_every_script_can_be_imported(script):
    """One that only its own long run would start is soon left behind by what it uses."""
    importlib.import_module(script)


def test_a_random_llama_of_7b_shapes_is_what_speed_scripts_ask_for(monkeypatch):
    """As latency.py and estimates.py call it, in small."""
    monkeypatch.setattr(estimates, "LLAMA_7B", (32, 64, 4, 4, 2, 260))
    text = started(estimates)
    assert text == started(estimates) and "laptop-avx2" in text


def start(script, *arguments):
    """(what a script prints, why it stopped or None), run in this process as from a command line."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            cells.exit_on_error(script.main)
        except SystemExit as stopped:
            return out.getvalue(), errors.getvalue() if stopped.code == 2 else str(stopped.code)
    return out.getvalue(), None


def started(script, *arguments):
    text, stopped = start(script, *arguments)
    assert stopped is None, stopped
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe, two texts and the data of one task."""
    folder = tmp_path_factory.mktemp("benchmarks")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    for name in ("calibration", "evaluation"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choices(words, k=300)))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "data").mkdir()
    documents = [{"query": f"{i}:", "choices": draw.sample(words, 2), "gold": i % 2} for i in range(4)]
    (folder / "data" / "piqa.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
    return folder


@pytest.fixture(scope="module")
def common(place):
    return ["--recipe", place / "recipe.toml", "--calibration", place / "calibration.txt", "--results", place]


def asked_of(text, **more):
    """A question as the scripts ask it, about one text file."""
    args = argparse.Namespace(calibration=str(text), evaluation="self", restart=False, **more)
    return args, cells.question_of(args, ())


def test_a_changed_text_of_the_same_name_is_another_question(tmp_path):
    text, file = tmp_path / "news.txt", tmp_path / "results" / "it.json"
    text.write_text("a fox")
    args, first = asked_of(text)
    assert first["calibration"] == "news.txt" and first["evaluation_text_sha256"] is None  # "self" is no file
    assert first["calibration_text_sha256"] == hashlib.sha256(b"a fox").hexdigest()[:16]
    write_json(file, {**cells.begin(args, file, first, {"cells": {}}), "cells": {"dense": 1.0}})
    assert cells.begin(args, file, asked_of(text)[1], {"cells": {}})["cells"] == {"dense": 1.0}  # goes on
    text.write_text("a hen")
    args, second = asked_of(text)
    with pytest.raises(SystemExit) as stopped:
        cells.begin(args, file, second, {"cells": {}})
    assert f"calibration_text_sha256: {first['calibration_text_sha256']}, now " in str(stopped.value)
    args.restart = True
    assert cells.begin(args, file, second, {"cells": {}}) == {"cells": {}, "question": second}


def test_a_result_from_before_texts_were_hashed_is_not_gone_on_with(tmp_path):
    text, file = tmp_path / "news.txt", tmp_path / "it.json"
    text.write_text("a fox")
    args, question = asked_of(text, window=64)
    old = {name: value for name, value in question.items() if not name.endswith("sha256")}
    write_json(file, {"question": old, "cells": {}})
    with pytest.raises(SystemExit, match="calibration_text_sha256: not recorded, now .*--restart") as stopped:
        cells.begin(args, file, question, {"cells": {}})
    assert "evaluation" not in str(stopped.value) and "window" not in str(stopped.value)  # only what differs


def test_texts_that_cannot_give_a_figure_are_refused(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a fox")
    second.write_text("a fox")
    cells.check_texts(str(first), None, "self", "self")
    with pytest.raises(DataError, match="b.txt: holds the same as .*a.txt; measure on text that calibration does not"):
        cells.check_texts(str(first), str(second))
    with pytest.raises(DataError, match="a.txt: holds the same as .*a.txt"):
        cells.check_texts(str(first), str(first))
    second.write_text("a hen")
    cells.check_texts(str(first), str(second))
    cut_off = second.rename(tmp_path / "wikitext2-test.raw.txt")
    with pytest.raises(
        DataError, match="5 bytes, but the text of that name that benchmarks/README.md quotes has 1,290"
    ):
        cells.check_texts(str(first), str(cut_off))
    with cut_off.open("wb") as file:
        file.write(b"a hen" * (1_290_547 // 5) + b"!!")
    cells.check_texts(str(first), str(cut_off))


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_the_known_sizes_are_those_of_the_texts_at_hand():
    assert {path.name: path.stat().st_size for path in DATA.glob("*.txt")} == cells.KNOWN_BYTES


def test_ablation_refuses_another_text_of_the_same_name(tmp_path, place):
    (tmp_path / "calibration.txt").write_text("a fox")
    texts = ["--calibration", tmp_path / "calibration.txt", "--evaluation", place / "evaluation.txt"]
    output = tmp_path / "ablation.json"
    common = json.loads((Path(ablation.__file__).parent / "results" / "ablation.json").read_text())["common"]
    write_json(output, {"common": common, "rows": []})
    _, stopped = start(ablation, *texts, "--output", output)
    assert stopped is not None and "calibration_text_sha256: not recorded, now " in stopped
    assert "evaluation_text_sha256: not recorded, now " in stopped and "move it away" in stopped


def test_size_weighs_what_is_written(tiny_checkpoint, tmp_path):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    rows = {row["way"]: row for row in size.size_rows(checkpoint, tmp_path)}
    weights = sum(spec.size for spec in checkpoint.linears.values())
    width = checkpoint.dtype.itemsize
    elastic = rows["elastic"]
    assert elastic["download"]["0.6"] == checkpoint.download_bytes(checkpoint.ladder.find(0.6))
    assert elastic["linears"]["all"] < rows["bitmask"]["linears"]["all"]
    for way in ("bitmask", "dense"):
        parts = [rows[way]["linears"][level.name] for level in checkpoint.ladder.levels]
        assert rows[way]["linears"]["all"] == sum(parts)
    # Headers of the files, and of a bitmask also the rows' offsets, are all that is more than bits and values.
    assert 0 <= rows["dense"]["linears"]["2:4"] - width * weights < 4096
    least = weights / 8 + width * weights / 2
    assert (
        least
        < rows["bitmask"]["linears"]["2:4"]
        < least + 8 * sum(x.shape[0] + 2 for x in checkpoint.linears.values()) + 8192
    )
    assert rows["epts"]["computed"] and "2:4" not in rows["epts"]["linears"]
    assert rows["epts"]["linears"]["0.5"] >= (width + 2) * weights


def test_size_from_the_command_line(tiny_checkpoint, tmp_path):
    text = started(size, tiny_checkpoint, "--results", tmp_path)
    result = json.loads((tmp_path / "size.json").read_text())
    assert list(result["models"]) == ["checkpoint"] and (tmp_path / "size.png").is_file()
    assert "EPTS" in text and result["commit"] is not None
    _, stopped = start(size, tmp_path / "nothing", "--results", tmp_path)
    assert stopped is not None and "nothing" in stopped


def test_models_of_half_precision_keep_their_rotary_frequencies(tmp_path):
    """And compute in float32 if the protocol says so."""
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = {"id": str(tmp_path / "base")}
    checkpoint = optimize(
        tiny_recipe(model=model, block={"steps": 0}, end_to_end={"trainable": "off"}), tmp_path / "checkpoint"
    )
    args = argparse.Namespace(calibration=None, baseline_samples=2, dense=True, levels=["0.6"], baselines=["wanda"])
    for precision in ("float32", "bfloat16"):
        made = [make() for _, _, make in zero_shot.models(args, checkpoint, precision)]
        for found in made:
            assert {x.dtype for x in found.parameters()} == {getattr(torch, precision)}
            assert torch.equal(found.model.rotary_emb.inv_freq, tiny_model("llama").model.rotary_emb.inv_freq)
    pruned = tiny_model("llama")
    frequencies, head = pruned.model.rotary_emb.inv_freq.clone(), pruned.lm_head.weight.detach().bfloat16()
    assert size.bitmask_bytes(pruned, byte_tokenizer(), list(checkpoint.linears), torch.bfloat16) > 0
    assert torch.equal(pruned.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(pruned.lm_head.weight, head), "weights are measured as the file has them"


def test_zero_shot_goes_on_where_it_stopped(tiny_checkpoint, place):
    common = [tiny_checkpoint, "--task-data", place / "data", "--tasks", "piqa", "--results", place]
    started(zero_shot, *common, "--levels", 0.6)
    text = started(zero_shot, *common, "--levels", 0.6, "--dense")
    rows = json.loads((place / "zero_shot.json").read_text())["rows"]
    assert [(row["level"], row["method"], row["task"]) for row in rows] == [
        ("0.6", "elastic", "piqa"), ("dense", "dense", "piqa"),
    ]  # fmt: skip
    assert "goes on after 1 cells" in text and (place / "zero_shot.png").is_file()
    _, stopped = start(zero_shot, *common, "--limit", 2)
    assert stopped is not None and "has the protocol" in stopped
    started(zero_shot, *common, "--levels", 0.6, "--baselines", "wanda")
    rows = json.loads((place / "zero_shot.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["elastic", "dense", "wanda"]

    def no_number(*args):
        raise NumericsError("the logits are not finite")

    failing = [*common, "--levels", 0.6, "--baselines", "magnitude"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "scores", no_number)
        assert "magnitude 0.6 failed: the logits are not finite" in started(zero_shot, *failing)
    assert [*json.loads((place / "zero_shot.json").read_text())["failures"]] == ["magnitude 0.6"]
    started(zero_shot, *failing)
    result = json.loads((place / "zero_shot.json").read_text())
    assert result["rows"][-1]["method"] == "magnitude" and not result["failures"], "tried again, and found"
    other = [*common, "--levels", 0.7, "--baselines", "wanda", "--calibration", place / "evaluation.txt"]
    _, stopped = start(zero_shot, *other)
    assert stopped is not None and "gives samples of sha256" in stopped
