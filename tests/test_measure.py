"""What a run measures of its checkpoint: the models as shipped, rows that no later failure loses, and going on."""

import json
import shutil

import pytest
import torch
from conftest import in_processes, tiny_recipe
from test_cli import expect_error, run

from elastic_sparsity import ElasticCheckpoint, measure, measure_memory, optimize, pipeline
from elastic_sparsity.errors import NumericsError, OutputError
from elastic_sparsity.evaluate import Quality
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.workers import Workers

QUICK = """
[model]
id = "{model}"
[calibration]
source = "self"
samples = 4
length = 16
[evaluation]
max_windows = 2
baselines = ["wanda", "magnitude"]
[ladder]
sparsities = [0.5, 0.7]
[adapters]
ranks = 2
[block]
steps = 0
samples = 2
[end_to_end]
trainable = "off"
"""
CELLS = [("dense", "dense"), *((level, x) for level in ("0.5", "0.7") for x in ("elastic", "wanda", "magnitude"))]


def save_base(folder, dtype=torch.float32):
    tiny_model("llama").to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(QUICK.format(model=save_base(tmp_path / "base")))
    return path


def quality_of(folder):
    return json.loads((folder / "elastic_config.json").read_text()).get("quality", {})


def cells(rows):
    return [(row["level"], row["method"]) for row in rows]


def fails_at(level, error):
    """Loading this level fails."""
    real = measure.load_level

    def load(checkpoint, wanted, dtype):
        if wanted.name == level:
            raise error
        return real(checkpoint, wanted, dtype)

    return load


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_levels_compute_as_the_dense_model_does(tmp_path, monkeypatch, precision):
    """Weights in one dtype, that of the protocol; rotary frequencies, which are buffers, never rounded."""
    base = save_base(tmp_path / "base", torch.bfloat16)
    recipe = tiny_recipe(
        model={"id": str(base)}, precision=precision, block={"steps": 0}, end_to_end={"trainable": "off"}
    )
    seen = {}

    def evaluate(models, **_):
        for name, model in models.items():
            rotary = model.get_buffer("model.rotary_emb.inv_freq").clone()
            seen.setdefault(name, []).append(({x.dtype for x in model.parameters()}, rotary))
        return dict.fromkeys(models, Quality(2.0, 0.0, 1))

    monkeypatch.setattr(measure, "evaluate", evaluate)
    measure.measure(recipe, optimize(recipe, tmp_path / "c"))
    ((_, rotary),) = seen["dense"]
    assert len(seen["elastic"]) == len(seen["wanda"]) == 4 and rotary.dtype == torch.float32
    for dtypes, found in (one for several in seen.values() for one in several):
        assert dtypes == {getattr(torch, precision)} and torch.equal(found, rotary)


def test_measuring_goes_on_where_it_was_stopped(capsys, recipe, tmp_path, monkeypatch):
    out = tmp_path / "c"
    assert run(capsys, "train", recipe, "--output", tmp_path / "whole", "-q")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(measure, "load_level", fails_at("0.7", KeyboardInterrupt()))
        assert run(capsys, "train", recipe, "--output", out, "-q")[0] != 0
    assert cells(quality_of(out)["rows"]) == CELLS[:4] and not (out / "results.json").exists()
    assert not out.with_name("c.run").exists()

    monkeypatch.setattr(pipeline, "train_and_save", lambda *_: pytest.fail("trained again"))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "load_level", fails_at("0.5", AssertionError("measured again")))
        other = tmp_path / "other.toml"
        other.write_text(recipe.read_text().replace("samples = 2", "samples = 3"))
        expect_error(capsys, "already holds something", "train", other, "--output", out)
        expect_error(capsys, "already holds something", "train", recipe, "--output", out, "--restart")
        code, stdout, stderr = run(capsys, "train", recipe, "--output", out, "-q")
    assert code == 0 and "dense" in stdout, stderr
    for name in ("elastic_config.json", "results.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (out / "results.png").is_file()
    expect_error(capsys, "already holds something", "train", recipe, "--output", out)


def test_a_baseline_that_breaks_down_loses_no_other_row(capsys, recipe, tmp_path, monkeypatch):
    real, out = measure.prune_one_shot_, tmp_path / "c"

    def prune(model, tokens, level, method, **options):
        if (level.name, method) == ("0.5", "wanda"):
            raise NumericsError("statistics are not finite")
        real(model, tokens, level, method, **options)
        if (level.name, method) == ("0.7", "magnitude"):
            model.model.norm.weight.fill_(torch.nan)

    monkeypatch.setattr(measure, "prune_one_shot_", prune)
    code, _, stderr = run(capsys, "train", recipe, "--output", out)
    assert code == 0, stderr
    broken = [("0.5", "wanda"), ("0.7", "magnitude")]
    quality = quality_of(out)
    assert cells(quality["rows"]) == [cell for cell in CELLS if cell not in broken]
    assert cells(quality["left_out"]) == broken and "not finite" in quality["left_out"][1]["error"]
    said = " ".join(stderr.split())
    assert "wanda at 50 % is left out: statistics are not finite" in said
    assert "magnitude at 70 % is left out: evaluation: the loss of magnitude is not finite." in said
    assert (out / "results.png").is_file()
    expect_error(capsys, "already holds something", "train", recipe, "--output", out)


def test_a_level_that_is_no_number_stops_it(recipe, tmp_path, monkeypatch):
    made = tiny_recipe(block={"steps": 0}, end_to_end={"trainable": "off"})
    checkpoint, real = optimize(made, tmp_path / "c"), measure.load_level

    def load(checkpoint, level, dtype):
        model = real(checkpoint, level, dtype)
        if level.name == "0.6":
            model.model.norm.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(measure, "load_level", load)
    with pytest.raises(NumericsError, match="loss of elastic is not finite"):
        measure.measure(made, checkpoint)
    assert [x["level"] for x in quality_of(tmp_path / "c")["rows"] if x["method"] == "elastic"] == ["0.5"]


def test_other_weights_than_the_run_had_are_not_measured_beside_its_levels(capsys, recipe, tmp_path, monkeypatch):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(measure, "load_level", fails_at("0.7", KeyboardInterrupt()))
        run(capsys, "train", recipe, "--output", out, "-q")
    before = (out / "elastic_config.json").read_bytes()
    model = tiny_model("llama")
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "base")
    expect_error(capsys, "but base_model.sha256 is", "train", recipe, "--output", out, "-q")
    assert (out / "elastic_config.json").read_bytes() == before
    with pytest.raises(OutputError, match=r"data\.calibration_sha256 is 0000\.\.\. now and was '"):
        checkpoint = ElasticCheckpoint(out)
        measure.check_same(checkpoint, checkpoint.config["base_model"]["sha256"], "0000")


def test_a_record_of_strange_kinds_is_measured_anew(capsys, recipe, tmp_path):
    out = tmp_path / "c"
    assert run(capsys, "train", recipe, "--output", out, "-q")[0] == 0
    whole = quality_of(out)
    for strange in (None, [1], {"rows": 3}, {"rows": [None, {"level": [], "method": 1}]},
                    {**whole, "rows": [{**row, "perplexity": "12"} for row in whole["rows"]]}):  # fmt: skip
        ElasticCheckpoint(out).update_record({"quality": strange})
        code, _, stderr = run(capsys, "train", recipe, "--output", out, "-q")
        assert code == 0 and quality_of(out) == whole, stderr


def test_a_base_model_that_stays_in_its_files_cannot_be_evaluated(capsys, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "optimize", lambda *_, **__: pytest.fail("refused before any work"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    recipe.write_text(recipe.read_text().replace('"self"', f'"{text}"') + '[memory]\nweights = "stream"\n')
    expect_error(
        capsys, "evaluation.source needs it whole in memory; leave the evaluation out", "train", recipe,
        "--evaluation", text, "--output", tmp_path / "c",
    )  # fmt: skip


def test_models_that_do_not_fit_are_told_before_the_run(caplog, monkeypatch):
    """1 dense, 1 level, 2 baselines of float32."""
    size = 4 * sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    wanted = tiny_recipe(evaluation={"baselines": ["wanda", "magnitude"]})
    for free, expected in ((4 * size, 0), (4 * size - 1, 1)):
        monkeypatch.setattr(measure_memory, "free_here", lambda free=free: {"host": free, "device": free})
        measure_memory.warn_of_memory(wanted, Workers())
        assert len(caplog.records) == expected
    assert "4 whole models take" in caplog.text


WORKERS = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from test_measure import fails_at
from conftest import tiny_recipe
from elastic_sparsity import ElasticCheckpoint, measure, optimize
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.quality_record import unmeasured
from elastic_sparsity.workers import Workers

torch.set_num_threads(1)
workers = Workers()
recipe, out = tiny_recipe(block={"steps": 0}, end_to_end={"trainable": "off"}), Path(sys.argv[1])
checkpoint = optimize(recipe, out)
real_load, real_prune = measure.load_level, measure.prune_one_shot_
measure.load_level = fails_at("0.7", KeyboardInterrupt())
try:
    measure.measure(recipe, checkpoint)
except KeyboardInterrupt:
    workers.wait()
measure.load_level = real_load
measure.load_level = fails_at("0.5", AssertionError("measured again"))

def prune(model, tokens, level, method, **options):
    if level.name == "2:4" and not workers.is_main:
        raise NumericsError("here alone")
    real_prune(model, tokens, level, method, **options)

measure.prune_one_shot_ = prune
made = unmeasured(recipe, out)
workers.wait()
rows = measure.measure(recipe, made, made_earlier=True)
assert unmeasured(recipe, out) is None
Path(f"{out}-{workers.rank}.json").write_text(json.dumps(rows))
workers.close()
"""


def test_several_workers_go_on_together(tmp_path):
    """Also if a baseline breaks down in one of them alone."""
    script, out = tmp_path / "run.py", tmp_path / "c"
    script.write_text(WORKERS)
    done = in_processes(2, script, out)
    assert not done.returncode, done.stderr[-6000:]
    quality = quality_of(out)
    rows = [json.loads((tmp_path / f"c-{rank}.json").read_text()) for rank in (0, 1)]
    assert rows[0] == rows[1] == quality["rows"]
    assert quality["left_out"] == [{"level": "2:4", "method": "wanda", "error": "another worker could not make it"}]
    assert cells(rows[0])[-2:] == [("0.7", "wanda"), ("2:4", "elastic")] and len(rows[0]) == 8


def test_the_same_protocol_is_not_measured_twice_and_another_is(tiny_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    rows = measure.measure(tiny_recipe(), checkpoint)
    assert measure.measure(tiny_recipe(), checkpoint, kl=False)[1]["kl"] is None
    again = measure.measure(tiny_recipe(), checkpoint)
    assert again == rows == quality_of(tmp_path / "c")["rows"]
    monkeypatch.setattr(measure, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert measure.measure(tiny_recipe(), ElasticCheckpoint(tmp_path / "c")) == rows
