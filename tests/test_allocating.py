"""From a model to a plan and back into a run: what is found, resume, what is refused."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from typer.testing import CliRunner

from elastic_sparsity import ElasticCheckpoint, optimize
from elastic_sparsity.allocating import METHODS, Allocating, allocate, allocate_on
from elastic_sparsity.allocation import Size, by_linear, progressions, total, uniform, weakened
from elastic_sparsity.allocation_file import allocation_of, check_unfinished, load_plan
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens, silent
from elastic_sparsity.cli import app
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.errors import ConfigError, OutputError
from elastic_sparsity.inspection import block_sparsities
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import load_base
from elastic_sparsity.pipeline import run_allocation
from elastic_sparsity.plan_sizes import Sizes
from elastic_sparsity.planning import plan
from elastic_sparsity.preparing import prepare
from elastic_sparsity.run_folder import run_folder
from elastic_sparsity.search import SearchSettings
from elastic_sparsity.slicing import load_level
from elastic_sparsity.supernet import Supernet, linear_depths, linear_sizes
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.verify import verify
from elastic_sparsity.work_plan import Timing, seconds_of
from elastic_sparsity.workers import Workers

SPARSITIES = (0.5, 0.6, 0.7)
IDS = torch.randint(0, 200, (6, 24), generator=torch.Generator().manual_seed(0))
QUICK = SearchSettings(generations=4, offspring=4, windows=(1, 2), survivors=(2,))
RECIPE = tiny_recipe(calibration={"samples": 8}, ladder={"sparsities": SPARSITIES, "patterns": ()})


def wanted(method="search", search=QUICK):
    return Allocating(method=method, held_out=4, descent=DescentSettings(steps=3), search=search)


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    allocate(RECIPE, wanted(), path)
    return path


def test_what_is_found_is_better_than_where_it_began(plan_path):
    plan = load_plan(plan_path)
    assert all(found < start for start, found in plan.held_out_kl.values())
    assert not plan.before


def test_evolution_that_is_worse_on_all_text_is_not_kept(tmp_path, monkeypatch):
    """A judge by which every change pays on a few windows, and none on all of them."""
    flat = uniform(linear_sizes(tiny_model("llama")), 0.6)

    class Misled:
        def __init__(self, model, windows_ST, autocast):
            pass

        def __call__(self, windows):
            changed = sum(a != b for a, b in zip(applied[-1], flat, strict=True))
            return 1.0 + 0.01 * changed if len(windows) == 4 else 1.0 - 0.01 * changed

    applied = []
    monkeypatch.setattr("elastic_sparsity.allocating.TopKL", Misled)
    monkeypatch.setattr(Supernet, "apply_", lambda self, kept: applied.append(list(kept)))
    recipe = tiny_recipe(calibration={"samples": 8}, ladder={"sparsities": (0.6,), "patterns": ()})
    asked = Allocating(method="search", held_out=4, descent=DescentSettings(steps=0), search=QUICK)
    plan = allocate(recipe, asked, tmp_path / "plan.json")
    assert plan.losses["0.6"][-1] < 1 and plan.held_out_kl == {"0.6": [1.0, 1.0]}
    assert plan.level(0) == flat


def test_a_plan_serves_a_ladder_of_some_of_its_levels(plan_path, tmp_path):
    plan = load_plan(plan_path)
    ladder = {"sparsities": (0.5, 0.7), "patterns": ()}
    checkpoint = optimize(
        tiny_recipe(ladder=ladder, allocation={"plan": str(plan_path), "strength": 1.0}), tmp_path / "out"
    )
    assert {name: list(spec.kept) for name, spec in checkpoint.linears.items()} == {
        name: [linear.kept[0], linear.kept[2]] for name, linear in plan.linears.items()
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_one_layer_can_be_searched(layers, tmp_path):
    tiny_model("llama", num_hidden_layers=layers).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(
        model={"id": str(tmp_path / "model")}, calibration={"samples": 8}, ladder={"sparsities": SPARSITIES}
    )
    plan = allocate(recipe, wanted(), tmp_path / "plan.json")
    assert plan.finished and len({name.split(".")[2] for name in plan.linears}) == layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_nested_plan_of_the_budget(method, tmp_path):
    plan = allocate(RECIPE, wanted(method), tmp_path / "plan.json")
    assert plan == load_plan(tmp_path / "plan.json")
    sizes = linear_sizes(tiny_model("llama"))
    found = allocation_of(plan, tmp_path / "plan.json", sizes, SPARSITIES)
    for index, sparsity in enumerate(SPARSITIES):
        kept = [found[size.name][index] for size in sizes]
        assert total(sizes, kept) == total(sizes, uniform(sizes, sparsity))
        assert (kept == uniform(sizes, sparsity)) == (method == "uniform")
    assert all(len(losses) == (4 if method == "search" else 0) for losses in plan.losses.values())


def test_an_interrupted_search_goes_on_to_the_same_plan(plan_path, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    path, count = tmp_path / "plan.json", 0

    def stop(stage, done, total):
        nonlocal count
        count += stage.startswith(("descent", "search"))
        if count in (2, 6, 15):
            count += 1
            raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            allocate(RECIPE, wanted(), path, stop)
        assert not load_plan(path).finished
    with pytest.raises(ConfigError, match="its search is unfinished; start it again"):
        optimize(tiny_recipe(allocation={"plan": str(path)}), tmp_path / "never")
    with monkeypatch.context() as patched:  # known before a model is loaded
        patched.setattr("elastic_sparsity.allocating.load_base", None)
        with pytest.raises(OutputError, match="holds a search of other settings: search"):
            allocate(RECIPE, wanted(search=SearchSettings(generations=5, windows=(1, 2), survivors=(2,))), path)
    allocate(RECIPE, wanted(), path, stop)
    assert path.read_bytes() == plan_path.read_bytes()
    with pytest.raises(OutputError, match="holds a finished plan"):
        allocate(RECIPE, wanted(), path)


def test_an_unfinished_search_of_an_older_version_is_refused_as_such(plan_path, tmp_path):
    data = json.loads(plan_path.read_text())
    del data["made"]["damping"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**data, "finished": False}))
    with pytest.raises(OutputError, match="of an older version, which did not note damping; delete it"):
        allocate(RECIPE, wanted(), path)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_plan_whose_hash_says_nothing_here_is_taken(dtype, plan_path, tmp_path):
    """Of an older version, or of the same model loaded otherwise: names, shapes and budgets still have to fit."""
    data = json.loads(plan_path.read_text())
    data["made"] |= {"base_model": {"id": "x", "sha256": "0" * 64}, "dtype": dtype}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    optimize(tiny_recipe(allocation={"plan": str(path)}, block={"steps": 0}), tmp_path / "out")


def test_half_the_way_is_the_default(plan_path, tmp_path):
    ladder = {"sparsities": SPARSITIES, "patterns": ("2:4",)}
    recipe = tiny_recipe(ladder=ladder, allocation={"plan": str(plan_path)}, block={"steps": 0})
    checkpoint, plan = optimize(recipe, tmp_path / "out"), load_plan(plan_path)
    sizes = linear_sizes(tiny_model("llama"))
    expected = by_linear(sizes, weakened([plan.level(i) for i in range(3)], sizes, SPARSITIES, 0.5))
    assert {name: tuple(spec.kept) for name, spec in checkpoint.linears.items()} == expected
    assert expected not in (
        by_linear(sizes, [plan.level(i) for i in range(3)]),
        by_linear(sizes, [uniform(sizes, sparsity) for sparsity in SPARSITIES]),
    )


@pytest.mark.parametrize("missing", [("stalled",), ("stalled", "curvature")], ids=len)
def test_an_older_plan_serves_only_if_it_is_finished(missing, tmp_path):
    """Before `stalled` there was `refused`, which no version reads now."""
    path = tmp_path / "p.json"
    shipped = Path(__file__).parents[1] / "benchmarks" / "results" / "allocation-plan-2026-11-27.json"
    data, whole = json.loads(shipped.read_text()), load_plan(shipped)
    assert data["descents"].keys() == {"0.5", "0.6", "0.7"}
    for descent in data["descents"].values():
        descent["refused"] = 1
        for name in missing:
            del descent[name]
    path.write_text(json.dumps(data))
    sizes = [Size(name=name, rows=x.shape[0], width=x.shape[1]) for name, x in whole.linears.items()]
    kept = allocation_of(load_plan(path), path, sizes, whole.sparsities)
    assert kept == allocation_of(whole, shipped, sizes, whole.sparsities)
    path.write_text(json.dumps({**data, "finished": False}))
    with pytest.raises(OutputError, match=r"p\.json: holds an unfinished search of an older version.*delete it"):
        check_unfinished(load_plan(path), whole, path)
    check_unfinished(whole, whole, path)  # one with all of it goes on
    path.write_text(json.dumps({**data, "descents": {"0.5": {"losses": [1.0], "refused": "much"}}}))
    with pytest.raises(ConfigError, match="no allocation plan: .descents.0.5.refused"):
        load_plan(path)
    path.write_text(json.dumps({**data, "descents": {"0.5": {"losses": [1.0], "stale": 1}}}))
    with pytest.raises(ConfigError, match="no allocation plan: .descents.0.5.stale"):
        load_plan(path)


def test_a_run_keeps_what_the_plan_says(plan_path, tmp_path):
    ladder = {"sparsities": SPARSITIES, "patterns": ("2:4",)}
    optimize(tiny_recipe(ladder=ladder, allocation={"plan": str(plan_path), "strength": 1.0}), tmp_path / "out")
    checkpoint, plan = ElasticCheckpoint(tmp_path / "out"), load_plan(plan_path)
    blocks = block_sparsities(tmp_path / "out")
    assert [(block.name, block.count) for block in blocks] == [("model.layers.0", 7), ("model.layers.1", 7)]
    mine = [x for name, x in plan.linears.items() if name.startswith("model.layers.1.")]
    weights = sum(x.shape[0] * x.shape[1] for x in mine)
    kept = [sum(x.shape[0] * x.kept[level] for x in mine) for level in range(3)]
    assert blocks[1].sparsity == pytest.approx((*(1 - k / weights for k in kept), 0.5))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert result.exit_code == 0 and "zeros by block" in result.output
    assert {name: list(spec.kept) for name, spec in checkpoint.linears.items()} == {
        name: linear.kept for name, linear in plan.linears.items()
    }
    for level in checkpoint.ladder.levels:
        model = load_level(checkpoint, level, torch.float32)
        for name, linear in linears_of(model).items():
            per_row = (weight_OI(linear) != 0).sum(1)
            if level.pattern is None:
                assert per_row.unique().tolist() == [plan.linears[name].kept[level.index]]
            else:
                assert per_row.unique().tolist() == [weight_OI(linear).shape[1] // 2]
    assert all(check.passed for check in verify(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_searches_its_own_plan(dtype, tmp_path):
    """The same as the command's on the same text, and what the run says it kept."""
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(
        model={"id": str(tmp_path / "model")}, precision="float32", calibration={"samples": 24},
        allocation={"search": True, "held_out": 16, "strength": 1.0},
    )  # fmt: skip
    checkpoint = optimize(recipe, tmp_path / "out")
    plan = allocate(recipe, Allocating(), tmp_path / "plan.json")
    assert {name: list(spec.kept) for name, spec in checkpoint.linears.items()} == {
        name: linear.kept for name, linear in plan.linears.items()
    }
    assert plan.level(1) != uniform(linear_sizes(tiny_model("llama")), 0.6)
    assert plan.made["dtype"] == str(dtype).removeprefix("torch.")
    rerun = {"model": {"id": str(tmp_path / "model")}, "allocation": {"plan": str(tmp_path / "plan.json")}}
    optimize(tiny_recipe(**rerun, block={"steps": 0}), tmp_path / "rerun")
    assert all(check.passed for check in verify(tmp_path / "out"))
    assert not (tmp_path / "out.run").exists()


def test_a_finished_plan_of_another_run_is_not_used(tmp_path, monkeypatch):
    """One that lies in a run's folder by accident."""
    recipe = tiny_recipe(calibration={"samples": 24}, allocation={"search": True, "held_out": 16})
    allocate(recipe, Allocating(), tmp_path / "plan.json")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "plan.json").rename(tmp_path / "out.run" / "allocation.json")
    other = tiny_recipe(calibration={"samples": 24}, allocation={"search": True, "held_out": 16}, seed=4)
    with pytest.raises(OutputError, match=r"allocation\.json: holds a search of other settings: .*seed"):
        optimize(other, tmp_path / "out")


def test_half_of_a_plan_is_for_runs_that_train():
    assert tiny_recipe().allocation_strength == 0.5
    for end_to_end in ({"trainable": "off"}, {"trainable": "auto", "steps": 0}):
        assert tiny_recipe(block={"steps": 0}, end_to_end=end_to_end).allocation_strength == 1.0
        assert tiny_recipe(block={"steps": 1}, end_to_end=end_to_end).allocation_strength == 0.5


@pytest.mark.parametrize("search", [False, True])
def test_all_of_a_plan_is_for_runs_that_memory_keeps_from_training(search, tmp_path, monkeypatch):
    """`end_to_end.trainable = "auto"` says less than what it became."""
    wanted = {"calibration": {"samples": 24}, "block": {"steps": 0}, "end_to_end": {"trainable": "auto"}}
    recipe = tiny_recipe(**wanted, allocation={"search": True, "held_out": 16})
    if not search:
        allocate(recipe, Allocating(held_out=16), tmp_path / "plan.json")
        recipe = tiny_recipe(**wanted, allocation={"plan": str(tmp_path / "plan.json")})
    monkeypatch.setattr("elastic_sparsity.preparing.free_here", lambda: {"host": 1})
    with run_folder(tmp_path / "c") as folder:
        job, dtype, _ = prepare(recipe, folder, Workers(), silent)
        job = run_allocation(job, dtype)
        made = load_plan(folder.allocation if search else tmp_path / "plan.json")
    assert job.trainable == "off"
    assert job.allocation == {name: tuple(linear.kept) for name, linear in made.linears.items()}
    assert job.allocation["model.layers.0.self_attn.q_proj"] != job.allocation["model.layers.1.self_attn.q_proj"]


def test_a_run_killed_in_its_search_goes_on_to_the_same_bytes(tmp_path):
    class Stop(Exception):
        pass

    count = 0

    def stop(stage, done, total):
        nonlocal count
        count += stage.startswith("descent")
        if count in (2, 5):
            count += 1
            raise Stop

    recipe = tiny_recipe(calibration={"samples": 8}, allocation={"search": True, "held_out": 4})
    whole = optimize(recipe, tmp_path / "whole").config
    for _ in range(2):
        with pytest.raises(Stop):
            optimize(recipe, tmp_path / "out", stop)
        assert load_plan(tmp_path / "out.run" / "allocation.json").descents
        assert not (tmp_path / "out").exists()
    other = tiny_recipe(calibration={"samples": 8}, allocation={"search": True, "held_out": 3})
    with pytest.raises(ConfigError, match=r"differs in recipe\.allocation\.held_out"):
        optimize(other, tmp_path / "out")
    file = tmp_path / "out.run" / "allocation.json"
    kept = file.read_text()
    file.write_text(kept[:-20])
    with pytest.raises(ConfigError, match="not a readable allocation plan"):
        optimize(recipe, tmp_path / "out")
    file.write_text(kept)
    assert optimize(recipe, tmp_path / "out", stop).config["checkpoint_id"] == whole["checkpoint_id"]


def test_a_plan_counts_a_search_at_its_longest(tmp_path):
    recipe = tiny_recipe(calibration={"samples": 24}, allocation={"search": True, "held_out": 16})
    found = plan(recipe, limits={"host": 10**12, "disk": 10**12}, probe=False)
    rows = {work.name: work for work in found.work if work.phase == "allocation"}
    assert set(rows) == {"scores", "judgements", "prices", "head of judgements", "head of prices"}
    assert {term.name for term in found.terms if term.stages == ("allocation",)} == {
        "masked weights, their gradients, the order", "activations kept for the backward pass",
        "prices of the largest linear", "the dense model's likeliest tokens", "head and logits",
    }  # fmt: skip
    counted = 0

    def count(module, args, kwargs):
        nonlocal counted
        counted += (args[0] if args else kwargs["hidden_states"])[..., 0].numel()

    base = load_base("random:llama")
    token_ids, _ = calibration_tokens(recipe, base)
    blocks = decoder_blocks(base.model)
    for block in blocks:
        block.register_forward_pre_hook(count, with_kwargs=True)
    path = tmp_path / "plan.json"
    allocate_on(base, token_ids, recipe, Allocating(), path, None, silent, dtype=torch.float32, channel_scales={})
    planned = sum(work.passes for name, work in rows.items() if not name.startswith("head"))
    timing = Timing(tokens=8, forward=1.0, step=7.0, masks=0.5, scale=2.0)
    sizes = Sizes(read_shapes("random:llama"), recipe, found.choices)
    seconds = seconds_of(sizes, found.work, timing)
    renamed = [replace(work, name=f"row {i}") for i, work in enumerate(found.work)]
    assert seconds_of(sizes, renamed, timing) == seconds  # a row is known by what it is, not by its name
    others = [work for work in found.work if work is not rows["prices"]]
    # A probe's forward pass takes 1/8 s a token; with a backward pass it is three times that.
    assert seconds - seconds_of(sizes, others, timing) == pytest.approx(3 * rows["prices"].passes / 8)
    assert 0.2 * planned < counted <= planned + len(blocks) * recipe.block.batch_size * recipe.calibration.length


def test_a_search_in_a_run_refuses_what_it_cannot_do(monkeypatch, tmp_path):
    for section, message in (
        ({"allocation": {"search": True, "slope": 0.1}}, "allocation.search: makes a plan"),
        ({"allocation": {"search": True, "plan": "plan.json"}}, "allocation.search: makes a plan"),
        ({"allocation": {"search": True, "held_out": 6}}, "6 of 6 samples leave none"),
        ({"allocation": {"search": True, "held_out": 1},
          "ladder": {"sparsities": (), "patterns": ("2:4",)}}, "ladder.sparsities is empty"),
        ({"allocation": {"search": True, "held_out": 1}, "memory": {"weights": "stream"},
          "end_to_end": {"trainable": "off"}}, "allocation.search: needs the whole model"),
        ({"allocation": {"search": "wish"}}, "allocation.search"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            tiny_recipe(**section)

    class Two(Workers):
        def __init__(self):
            super().__init__()
            self.count = 2

    monkeypatch.setattr("elastic_sparsity.pipeline.Workers", Two)
    with pytest.raises(ConfigError, match="runs in one process, found 2"):
        optimize(tiny_recipe(allocation={"search": True, "held_out": 2}), tmp_path / "out")


def test_a_run_takes_slopes(tmp_path):
    checkpoint = optimize(tiny_recipe(allocation={"slope": 0.1}), tmp_path / "out")
    sizes, depths = linear_sizes(tiny_model("llama")), linear_depths(tiny_model("llama"))
    levels = progressions(sizes, depths, SPARSITIES, [0.1] * 3)
    assert [list(spec.kept) for spec in checkpoint.linears.values()] == [list(x) for x in zip(*levels, strict=True)]
    assert levels[0] != uniform(sizes, 0.5)
    with pytest.raises(ConfigError, match="2 slopes for 3 ladder.sparsities"):
        tiny_recipe(allocation={"slope": (0.1, 0.2)})
    with pytest.raises(ConfigError, match="allocation.slope: a plan says all there is to say"):
        tiny_recipe(allocation={"slope": 0.1, "plan": "plan.json"})


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_one_shot_pruning_takes_an_allocation(method, plan_path):
    plan, model = load_plan(plan_path), tiny_model("llama")
    level = Ladder(sparsities=SPARSITIES).levels[1]
    kept = {name: linear.kept[1] for name, linear in plan.linears.items()}
    prune_one_shot_(model, IDS, level, method, allocation=kept, autocast=nullcontext)
    for name, linear in linears_of(model).items():
        weight = weight_OI(linear)
        assert float((weight != 0).float().mean()) == pytest.approx(kept[name] / weight.shape[1], abs=0.02)
    with pytest.raises(ConfigError, match="an N:M pattern keeps as much in every linear"):
        pattern = Ladder(sparsities=(), patterns=("2:4",)).levels[0]
        prune_one_shot_(model, IDS, pattern, method, allocation=kept, autocast=nullcontext)


def damaged(plan, how):
    data = copy.deepcopy(plan)
    first = next(iter(data["linears"].values()))
    if how == "model":
        data["linears"]["elsewhere"] = data["linears"].pop(next(iter(data["linears"])))
    elif how == "weights":
        data["made"]["base_model"]["sha256"] = "0" * 64
    elif how == "shape":
        first["shape"] = [first["shape"][0], first["shape"][1] + 1]
    elif how == "nested":
        first["kept"] = first["kept"][::-1]
    elif how == "budget":
        first["kept"] = [k - 1 for k in first["kept"]]
    elif how == "levels":
        data["sparsities"] = [0.5, 0.6, 0.8]
    elif how == "key":
        data["linear"] = {}
    elif how == "type":
        first["kept"] = ["many"] * 3
    elif how == "version":
        data["format_version"] = 2
    return data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("model", "is of another model: .* is in one of them only"),
        ("weights", r"is of another model: of weights with sha256 '0{12}'\.\.\., those of random:llama have"),
        ("shape", "has shape .* the model's"),
        ("nested", "not nested levels"),
        ("budget", "the budget is"),
        ("levels", r"is for the levels \[0.5, 0.6, 0.8\], the ladder has \[0.5, 0.6, 0.7\]"),
        ("key", "no allocation plan: 'linear"),
        ("type", "no allocation plan: 'linears"),
        ("version", "no allocation plan: 'format_version"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_any_work(how, message, plan_path, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damaged(json.loads(plan_path.read_text()), how)))
    recipe = tiny_recipe(allocation={"plan": str(path)})
    with pytest.raises(ConfigError, match=message):
        optimize(recipe, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    if how != "weights":  # of the config alone
        with pytest.raises(ConfigError, match=message):
            plan(recipe, probe=False)


@pytest.mark.parametrize("content", [None, "", "{", "[" * 5000, '{"format": 1}', "\x00"])
def test_files_that_are_no_plan(content, tmp_path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"plan\.json: (not a readable allocation plan|no allocation plan)"):
        load_plan(path)


def test_what_a_search_refuses(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match="only unstructured levels have one"):
        allocate(tiny_recipe(ladder={"sparsities": (), "patterns": ("2:4",)}), wanted(), path)
    with pytest.raises(ConfigError, match="6 calibration samples, 6 of them held out"):
        allocate(tiny_recipe(), Allocating(held_out=6, search=QUICK), path)
    with pytest.raises(ConfigError, match="method 'wish' is unknown"):
        Allocating(method="wish")
    few = wanted(search=SearchSettings(generations=0))  # of windows only an evolution has stages
    assert allocate(RECIPE, replace(few, held_out=2), tmp_path / "few.json").finished
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not a readable allocation plan"):
        allocate(RECIPE, wanted(), path)
    assert path.read_text() == "mine"


def test_the_command(tmp_path):
    run = CliRunner().invoke
    path = tmp_path / "plan.json"
    options = ["--samples", "4", "--length", "16", "--held-out", "8", "--steps", "2", "--generations", "1", "-q"]
    result = run(app, ["search", "random:llama", "--output", str(path), "--levels", "0.5,0.7", *options])
    assert result.exit_code == 0, result.output
    assert "70 %" in result.output
    assert load_plan(path).sparsities == [0.5, 0.7]
    assert (tmp_path / "plan.json.png").read_bytes().startswith(b"\x89PNG")
    other = ["search", "random:llama", "--output", str(tmp_path / "other.json"), "--levels", "0.6", "-q"]
    for method, option in (("owl", "--steps"), ("descent", "--generations")):
        result = run(app, [*other, "--method", method, option, "3"])
        assert result.exit_code == 1 and f"{option}: method '{method}' has none" in str(result.exception)
    few = ["--samples", "4", "--length", "16", "--held-out", "2", "--steps", "1", "--scores", "magnitude"]
    result = run(app, [*other, *few, "--precision", "float32"])
    assert result.exit_code == 0, result.output
    made = load_plan(tmp_path / "other.json").made
    assert (made["scores"], made["precision"], made["dtype"]) == ("magnitude", "float32", "float32")
    for arguments, message in (
        (["--levels", "0.5,much"], "ladder.sparsities"),
        (["--levels", "0.5", "--preset", "slow"], "--preset: 'slow' is unknown"),
        (["--levels", "0.5", "--method", "wish"], "method 'wish' is unknown"),
    ):
        result = run(app, ["search", "random:llama", "--output", str(tmp_path / "no.json"), *arguments, *options])
        assert result.exit_code == 1
        assert message in str(result.exception)
