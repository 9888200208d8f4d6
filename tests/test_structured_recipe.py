"""`[structured]` of a recipe: what `add-structured` adds later, resumable, planned, and refused before any work."""

import json

import pytest
from conftest import tiny_recipe
from test_transfer import contents

from elastic_sparsity import (
    ElasticCheckpoint,
    add_structured,
    adding,
    levels,
    optimize,
    pipeline,
    plan,
    preparing,
    verify,
    write_report,
)
from elastic_sparsity.adding import check_sizes
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.errors import ConfigError, NumericsError, OutputError
from elastic_sparsity.manifest import CONFIG_NAME
from elastic_sparsity.measure import measure
from elastic_sparsity.model_shapes import read_shapes, shapes_model
from elastic_sparsity.plan_sizes import STAGES
from elastic_sparsity.planning import choose
from elastic_sparsity.report_facts import read_facts
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
STRUCTURED = {"fractions": [0.25, 0.5], "multiple": 8}


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)

    def make(**sections):
        return tiny_recipe(
            calibration={"source": str(path), "samples": 4}, ladder={"sparsities": [0.5, 0.7], "patterns": []},
            block={"steps": 1}, end_to_end={"steps": 3, "batch_size": 2},
            evaluation={"source": str(path), "window": 16}, **sections,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def made(recipe_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "c"
    optimize(recipe_of(structured=STRUCTURED), folder)
    return folder


def checkpoint_files(folder):
    """All but the recorded recipe, which says whether the levels came with the run."""
    found = contents(folder)
    found.pop("run.json")
    config = json.loads(found.pop(CONFIG_NAME))
    del config["recipe"]
    return found, config


def test_a_run_ends_with_what_could_have_been_added_later(made, recipe_of, tmp_path):
    """The same id, bit for bit the same files: training does not know of structured levels."""
    recipe = recipe_of()
    optimize(recipe, tmp_path / "c")
    add_structured(
        tmp_path / "c", [0.25, 0.5], calibration=recipe.calibration.source, samples=4, length=16, batch_size=2,
        multiple=8, precision="float32", steps=2,
    )  # fmt: skip
    assert checkpoint_files(tmp_path / "c") == checkpoint_files(made)
    assert [x.name for x in levels(made)] == ["0.5", "0.7", "structured-0.25", "structured-0.5"]
    assert all(check.passed for check in verify(made))
    assert not made.with_name("c.run").exists()


def test_an_interrupted_run_goes_on(made, recipe_of, tmp_path, monkeypatch):
    """Killed between two levels, after the checkpoint was written: no stage runs again, and all bytes are the same."""
    recipe, real, calls = recipe_of(structured=STRUCTURED), adding.smaller_model, []

    def second_is_killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(adding, "smaller_model", second_is_killed)
        with pytest.raises(KeyboardInterrupt):
            optimize(recipe, tmp_path / "c")
    assert [x.name for x in levels(tmp_path / "c")] == ["0.5", "0.7", "structured-0.25"]
    assert all(check.passed for check in verify(tmp_path / "c")), "whole, as far as it goes"
    for other in ({"fractions": [0.5]}, {"steps": 1}, {"scores": "magnitude"}):  # than the level that is there has
        with pytest.raises(OutputError, match="holds a checkpoint of another recipe"):
            optimize(recipe_of(structured={**STRUCTURED, **other}), tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_and_save", None)  # not called again
        optimize(recipe, tmp_path / "c")
    assert checkpoint_files(tmp_path / "c") == checkpoint_files(made)
    assert (tmp_path / "c" / "run.json").exists() and not (tmp_path / "c.run").exists()


def test_what_structured_levels_need_may_change_before_they_are_made(recipe_of, tmp_path, monkeypatch):
    """As their errors and warnings advise; nothing that is done is done again, and the record is of the new recipe."""
    recipe = recipe_of(structured=STRUCTURED)
    with monkeypatch.context() as patch:
        patch.setattr(adding, "smaller_model", lambda *_, **__: (_ for _ in ()).throw(NumericsError("loss")))
        with pytest.raises(NumericsError):
            optimize(recipe, tmp_path / "c")
    changed = recipe_of(structured={**STRUCTURED, "steps": 1, "lr": 1e-5})
    evaluation = changed.evaluation.model_copy(update={"max_windows": 1})
    changed = changed.model_copy(update={"evaluation": evaluation})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_and_save", None)  # not called again
        optimize(changed, tmp_path / "c")
    optimize(changed, tmp_path / "whole")
    assert checkpoint_files(tmp_path / "c") == checkpoint_files(tmp_path / "whole")
    recorded = [ElasticCheckpoint(tmp_path / name).config["recipe"] for name in ("c", "whole")]
    assert recorded[0] == recorded[1] and recorded[0]["structured"]["lr"] == 1e-5


def test_an_interrupted_level_keeps_its_search(tmp_path, monkeypatch):
    """Killed while it prunes to the counts that were found: they are not searched again, and all bytes are the same."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    recipe = tiny_recipe(
        calibration={"source": str(path), "samples": 20}, ladder={"sparsities": [0.5], "patterns": []},
        block={"steps": 1, "samples": 20}, structured={"fractions": [0.5], "multiple": 8, "search": "blocks"},
    )  # fmt: skip
    optimize(recipe, tmp_path / "whole")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("elastic_sparsity.pruning.prune_structured_", killed)
        optimize(recipe, tmp_path / "c")
    assert (tmp_path / "c.run" / "structured-0.5.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("elastic_sparsity.structured_search.TopKL", None)  # nothing is judged again
        optimize(recipe, tmp_path / "c")
    assert checkpoint_files(tmp_path / "c") == checkpoint_files(tmp_path / "whole")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["c", "text.txt", "whole"]


def test_quality_is_measured_and_recorded(recipe_of, tmp_path):
    recipe = recipe_of(structured={"fractions": [0.5], "multiple": 8, "scores": "magnitude"})
    checkpoint = optimize(recipe, tmp_path / "c")
    rows = measure(recipe, checkpoint)
    mine = [row for row in rows if row["level"] == "structured-0.5"]
    assert [row["method"] for row in mine] == ["elastic"], "no one-shot pruner makes such a level"
    found = {x.name: x for x in levels(tmp_path / "c")}
    assert found["structured-0.5"].perplexity == mine[0]["perplexity"]
    assert mine[0]["bytes"] == checkpoint.bytes_of(checkpoint.find("structured-0.5"))
    record = ElasticCheckpoint(tmp_path / "c").config["structured"]["structured-0.5"]
    assert (record["scores"], record["calibration_tokens"], record["sparsity"]) == ("magnitude", 0, 0.5)

    page = write_report(tmp_path / "c").read_text()
    card = (tmp_path / "c" / "README.md").read_text()
    for text in (page, card):
        assert "structured 50 %" in text and "50.00 % removed" in text
    masked = sum(entry.bytes for name, files in checkpoint.manifest.files.items() for entry in files
                 if not name.startswith("structured-"))  # fmt: skip
    assert read_facts(checkpoint, "c").total_bytes == masked, "what is compared with a file a level"


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({"fractions": [0.5, 0.5]}, r"structured.fractions: \[0.5, 0.5\] names one twice"),
        ({"fractions": [1.0]}, r"structured.fractions.0: Input should be less than 1, found 1.0"),
        ({"fractions": [0.5], "scores": "best"}, "structured.scores"),
        ({"fraction": [0.5]}, "structured.fraction: unknown key; did you mean 'fractions'"),
        ({"fractions": [0.5], "multiple": 0}, "structured.multiple"),
    ],
)
def test_a_recipe_is_refused_by_name(structured, message, recipe_of):
    with pytest.raises(ConfigError, match=message):
        recipe_of(structured=structured)


IMPOSSIBLE = [
    ({"fractions": [0.95]}, "random:llama", "sparsity: 0.95 of the blocks' linears cannot be removed"),
    ({"fractions": [0.8]}, "random:opt", "with at least 4 of 4 key/value heads"),
    ({"fractions": [0.5], "multiple": 7}, "random:llama", "multiple: 7 does not divide"),
    ({"fractions": [0.5, 0.51]}, "random:llama", "both keep 1 key/value heads and 32 MLP channels"),
]


@pytest.mark.parametrize(("structured", "model", "message"), IMPOSSIBLE)
def test_sizes_that_cannot_be_met_cost_no_work(structured, model, message, recipe_of, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "calibration_tokens", None)  # not even the text
    with pytest.raises(ConfigError, match=message):
        optimize(recipe_of(structured=structured, model={"id": model}), tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("structured", "model", "message"), IMPOSSIBLE)
def test_a_plan_refuses_what_a_run_refuses_from_the_config_alone(structured, model, message, recipe_of, tmp_path):
    tiny_model(model.removeprefix("random:")).config.save_pretrained(tmp_path)  # no weights beside it
    for names in ({"model": {"id": model}}, {"model": {"id": str(tmp_path)}}):
        with pytest.raises(ConfigError, match=message):
            plan(recipe_of(structured=structured, **names), gpu=False, probe=False)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_model_of_shapes_has_the_counts_of_a_whole_one(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    empty = shapes_model(str(tmp_path))
    assert {p.untyped_storage().nbytes() for p in empty.parameters()} == {4}  # one float32, whatever the shape
    for fractions in ([0.2], [0.2, 0.4]):
        assert check_sizes(empty, fractions, 8) == check_sizes(model, fractions, 8)


def test_streamed_weights_are_refused_and_auto_does_not_choose_them(recipe_of):
    off = {"end_to_end": {"trainable": "off"}}
    with pytest.raises(ConfigError, match="structured.fractions: needs the whole model in memory"):
        tiny_recipe(structured=STRUCTURED, memory={"weights": "stream"}, calibration={"source": "x"}, **off)
    chosen = choose(recipe_of(structured=STRUCTURED), read_shapes("random:llama", "auto"), {"host": 1}, False)
    assert chosen.weights == "resident"


def test_the_plan_counts_them(recipe_of):
    plain = plan(recipe_of(), gpu=False, probe=False)
    found = plan(recipe_of(structured=STRUCTURED), gpu=False, probe=False)
    assert STAGES[-2:] == ("structured", "tuning")
    mine = {term.name: term.bytes for term in found.terms if term.stages[0] == "structured"}
    numbers = 2 * (9216 + 2 * 32) + 2 * 260 * 32 + 32  # blocks (linears, norms), embeddings, head, last norm
    assert mine["base model, once more"] == 4 * numbers - 4 * (2 * 260 * 32 + 32)
    assert mine["what is cut out"] == 4 * 2 * 9216 * 3 // 4
    assert mine["structured levels"] == 4 * 2 * 9216 * 5 // 4
    assert mine["hidden states"] == 2 * 4 * 16 * 32 * 4
    assert not {"base model, once more", "structured levels"} & {term.name for term in plain.terms}
    work = {x.name: x for x in found.work if x.phase == "structured"}
    assert work["inputs of the branches' ends"].passes == 2 * 3 * 2 * 4 * 16  # fractions, passes, blocks, tokens
    assert work["orders and refits"].flops > 0 == sum(x.phase == "structured" for x in plain.work)
    untuned = {**STRUCTURED, "scores": "magnitude", "steps": 0}
    by_magnitude = plan(recipe_of(structured=untuned), gpu=False, probe=False)
    assert not [x for x in by_magnitude.work if x.phase == "structured"]


def test_the_plan_counts_their_search(recipe_of):
    few = {"calibration": {"samples": 20, "source": "x"}, "block": {"samples": 20}}
    found = {
        search: plan(tiny_recipe(structured={**STRUCTURED, "search": search}, **few), gpu=False, probe=False)
        for search in (None, "equal", "blocks")
    }
    mine = {
        search: {term.name: term.bytes for term in each.terms if term.stages == ("structured",)}
        for search, each in found.items()
    }
    ends = [(32, 32), (64, 32)]  # o_proj, down_proj: inputs, outputs
    assert mine["blocks"]["factors of all branches"] == 2 * sum(8 * i * i + 16 * i * o for i, o in ends)
    assert mine["equal"]["factors of all branches"] == 2 * sum(8 * i * i + 12 * i * o for i, o in ends)
    assert mine[None].keys() < mine["equal"].keys() < mine["blocks"].keys()
    work = {search: {x.name: x for x in each.work if x.phase == "structured"} for search, each in found.items()}
    length, steps = 16, DescentSettings().steps
    assert work["blocks"]["inputs for the search's orders"].passes == 2 * 3 * 2 * (20 - 16) * length
    assert work["blocks"]["judgements"].passes == 2 * 2 * (1 + 2 + steps) * 16 * length
    assert work["equal"]["judgements"].passes == 2 * 2 * (1 + 2) * 16 * length
    assert work["blocks"]["gradients"].passes == 2 * 2 * steps * 16 * length
    assert work["blocks"]["head of gradients"].is_head and not work["blocks"]["gradients"].is_head
    assert work[None].keys() < work["equal"].keys() < work["blocks"].keys()
    with pytest.raises(ConfigError, match="4 calibration samples, of which 16 are held out"):
        plan(recipe_of(structured={**STRUCTURED, "search": "blocks"}), gpu=False, probe=False)
