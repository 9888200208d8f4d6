"""induction.py, induction_parts.py and refresh.py as a user starts them, on tiny random models; the kept pieces."""

import ast
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_recipe
from test_benchmarks import place, start, started  # noqa: F401  place is a fixture

import induction  # isort: skip  found by test_benchmarks
import induction_made  # isort: skip
import induction_parts  # isort: skip
import refresh  # isort: skip
from induction_plot import held_share, shown_blocks  # isort: skip
from induction_rows import EVERY_PAIR, ROWS, Row, residual_axes, variant_of  # isort: skip
from induction_work import WorkFolder, code_of, code_sha256, work_folder  # isort: skip
from spent import spent, together  # isort: skip

from elastic_sparsity.config import AUTO_FOLDS
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.inducing import induce
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.models import weights_hash
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.residual import rotate_residual_
from elastic_sparsity.tiny import tiny_model

COST = {"seconds", "cpu_seconds", "peak_bytes", "added_bytes"}
STAMP = {"date", "device", "commit", "versions"}


@pytest.fixture
def few(place, tmp_path):  # noqa: F811
    return ["--calibration", place / "calibration.txt", "--evaluation", place / "evaluation.txt", "--model",
            "random:llama", "--length", "16", "--window", "64", "--levels", "0.5", "2:4", "--results", tmp_path,
            "--work", tmp_path / "work", "--samples", "4", "--methods", "magnitude", "wanda"]  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """How often what is expensive was done, by name."""
    counts = dict.fromkeys(("learn", "fold", "absorb", "evaluate"), 0)

    def counted(name):
        function = getattr(induction_made, name)

        def run(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return run

    for name in counts:
        monkeypatch.setattr(induction_made, name, counted(name))
    return counts


def no_model(name):
    raise AssertionError("a finished result needs no model")


def result_of(tmp_path, name):
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_induction_fills_cells_and_goes_on(few, tmp_path, made, monkeypatch):
    first = [*few, "--steps", "2", "--precision", "float32", "--max-windows", "4"]
    started(induction, *first, "--seeds", "0", "--methods", "wanda")
    before = result_of(tmp_path, "induction")
    assert set(before["cells"]) == {f"0/wanda/{level}/{kind}" for level in ("0.5", "2:4") for kind in induction.KINDS}
    assert before["question"]["precision"] == "float32" and before["dense"] > 1 and made["learn"] == 1
    assert {row["verdict"] for row in before["summary"]} == {"one seed"}
    text = started(induction, *first, "--seeds", "0", "1")
    found = result_of(tmp_path, "induction")
    cells = found["cells"]
    assert len(cells) == 16 and {name: cells[name] for name in before["cells"]} == before["cells"]
    assert made["learn"] == 2, "one a seed, the first from the work folder"
    for name, cell in cells.items():
        assert cell.keys() >= STAMP and cell["seed"] == int(name[0])
        assert cell["pruning"].keys() >= COST and cell["perplexity"] > 1
    for level in ("0.5", "2:4"):
        copied = cells[f"1/magnitude/{level}/plain"]
        assert copied == {**cells[f"0/magnitude/{level}/plain"], "seed": 1,
                          "copied_from": f"0/magnitude/{level}/plain"}  # fmt: skip
    assert set(found["induction"]) == {"0", "1"} and found["induction"]["1"]["peak_bytes"] > 1e7
    assert [(row["method"], row["level"], row["seeds"]) for row in found["summary"]] == [
        (method, level, [0, 1]) for method in ("wanda", "magnitude") for level in ("0.5", "2:4")
    ]
    assert "verdict" in text and "worse by more than the spread in" in text
    assert (tmp_path / "induction.png").read_bytes().startswith(b"\x89PNG")
    counts = dict(made)
    with monkeypatch.context() as patch:
        patch.setattr(induction, "load_base", no_model)
        started(induction, *first, "--seeds", "0", "1")
    assert made == counts and result_of(tmp_path, "induction") == found, "nothing is measured again"
    started(induction, *first, "--seeds", "0", "--restart")
    again = result_of(tmp_path, "induction")["cells"]
    assert made["learn"] == counts["learn"], "what was learned is kept"
    assert {name: cell["perplexity"] for name, cell in again.items()} == {
        name: cells[name]["perplexity"] for name in again
    }
    _, stopped = start(induction, *first, "--precision", "bfloat16")
    assert stopped is not None and "precision: float32, now bfloat16" in stopped


def test_equal_weights_are_not_measured_twice(made):
    windows_ST = torch.arange(64).view(2, 32) % 260
    model = tiny_model("llama")
    first = induction_made.judged(model, {}, windows_ST, torch.no_grad)
    again = induction_made.judged(tiny_model("llama"), {"a cell": first}, windows_ST, torch.no_grad)
    assert again == {**first, "same_weights_as": "a cell"} and made["evaluate"] == 1
    model.lm_head.weight.data[0, 0] += 1
    other = induction_made.judged(model, {"a cell": first}, windows_ST, torch.no_grad)
    assert other["perplexity"] != first["perplexity"] and made["evaluate"] == 2


def test_weights_cast_once_give_the_figures_of_casts_at_every_window():
    model, windows_ST = tiny_model("llama").float(), torch.randint(0, 256, (2, 24))
    kept, autocast = weights_hash(model), autocast_factory("bfloat16", "cpu")
    expected = evaluate({"it": model}, windows_ST, autocast=autocast)["it"].perplexity
    assert induction_made.judged(model, {}, windows_ST, autocast)["perplexity"] == expected
    assert weights_hash(model) == kept
    exact = induction_made.judged(model, {}, windows_ST, autocast_factory("float32", "cpu"))["perplexity"]
    assert exact == evaluate({"it": model}, windows_ST, autocast=nullcontext)["it"].perplexity != expected


def test_parts_make_every_piece_once_and_go_on(few, tmp_path, made):
    few += ["--steps", "2", "--block-steps", "2", "--held-out", "2", "--every", "6"]
    started(induction_parts, *few, "--rows", "none", "folds")
    before = result_of(tmp_path, "induction_parts")
    assert made["fold"] == 1 and made["learn"] == made["absorb"] == 0
    text = started(induction_parts, *few, "--generate", "2", "--plot")
    found = result_of(tmp_path, "induction_parts")
    cells = found["cells"]
    assert {name: cells[name] for name in before["cells"]} == before["cells"]
    assert len(cells) == 4 * len(ROWS) - 2, "the closed form is for magnitude alone"
    # A fold a kind, the whole set, it without each kind, the default's, the residual order alone and before them;
    # scores with and without folds (the default's and all give this model the same weights); four forms of reading A
    # for two kinds of scores.
    assert {name: made[name] for name in ("fold", "learn", "absorb")} == {"fold": 12, "learn": 2, "absorb": 8}
    for name, cell in cells.items():
        assert cell.keys() >= STAMP and cell["induction"].keys() >= COST and cell["seed"] == 0
        assert (cell["induction"]["peak_bytes"] > 0) == (not name.startswith("none/"))
        assert ("gains" in cell) == ("gains" in name)
    gains = cells["gains/wanda/0.5"]
    assert gains["induction"]["peak_bytes"] == gains["gains"]["peak_bytes"]
    assert cells["all, gains/wanda/0.5"]["induction"]["seconds"] >= cells["all/wanda/0.5"]["induction"]["seconds"]
    assert all(row["logits_moved"] < 1e-5 for name, row in found["rows"].items() if name[:4] not in ("none", "gain"))
    assert found["rows"]["residual rotation/any"]["residual"]["added_parameters"] == 0, "its head is not tied"
    assert found["question"]["precision"] == "float32"
    assert found["greedy"] | {"prompts": 2, "tokens": 200, "identical": 2} == found["greedy"]
    assert found["induced_dense"] == pytest.approx(found["dense"], rel=1e-5)
    assert (tmp_path / "induction_parts.png").read_bytes().startswith(b"\x89PNG")
    assert "lower at" in text and "peak" in text
    # An order of channels moves no mask of Wanda's within rows: up to rounding the same function.
    for row in ("value_order", "mlp_order", "residual_order"):
        plain = cells["none/wanda/0.5"]["perplexity"]
        assert cells[f"{row}/wanda/0.5"]["perplexity"] == pytest.approx(plain, rel=1e-4)
    counts = dict(made)
    again = started(induction_parts, *few, "--generate", "2", "--plot")
    assert made == counts and result_of(tmp_path, "induction_parts") == found, "nothing is measured again"
    assert "kept since" not in again, "nor is anything looked up"


def test_a_model_that_induce_wrote_is_compared_with_the_original(few, tmp_path):
    changes = {"reading": "norms", "folds": ["values", "value_order", "mlp_order"], "samples": 6, "held_out": 2}
    induce(tiny_recipe(induction=changes, calibration={"source": "self", "samples": 16, "length": 16}), tmp_path / "it")
    few += ["--every", "6", "--steps", "2", "--held-out", "2", "--rows", "--generate", "2"]
    started(induction_parts, *few, "--induced", tmp_path / "it")
    found = result_of(tmp_path, "induction_parts")
    assert not found["cells"] and found["greedy"].items() >= {"of": "it", "prompts": 2, "identical": 2}.items()
    assert found["induced_dense"] == pytest.approx(found["dense"], rel=1e-5)
    assert found["induced_dense"] != found["dense"]
    _, stopped = start(induction_parts, *few[:-2], "--induced", tmp_path / "it")
    assert stopped is not None and "--induced: is what --generate and --plot look at" in stopped


def test_parts_refuse_what_the_model_has_no_exact_form_of(few, tmp_path):
    few = [*few, "--steps", "1", "--block-steps", "1", "--held-out", "2", "--model", "random:opt", "--levels", "0.5"]
    text = started(induction_parts, *few, "--rows", "none", "residual rotation", "mlp_order", "--methods", "wanda")
    found = result_of(tmp_path, "induction_parts")
    assert list(found["cells"]) == ["none/wanda/0.5"]
    assert "LayerNorm" in found["rows"]["residual rotation/any"]["refused"]
    assert "N:M masks alone" in found["rows"]["mlp_order/any"]["refused"]
    assert "residual rotation: refused" in " ".join(text.split())


def test_prompts_are_not_repeated(few, tmp_path):
    few += ["--steps", "1", "--held-out", "2", "--rows", "none", "--generate", "99"]
    _, stopped = start(induction_parts, *few)
    assert stopped is not None and "--generate: 99 prompts, but only" in stopped
    assert not (tmp_path / "induction_parts.json").exists()


def test_refresh_measures_each_row_once(few, tmp_path, monkeypatch):
    few = [*few[:2], "--model", "random:llama", "--results", tmp_path, "--length", "32", "--rounds", "1"]
    text = started(refresh, *few)
    found = result_of(tmp_path, "refresh")
    assert list(found["rows"]) == list(refresh.ROWS) and "CPU s" in text
    assert all(row.keys() >= STAMP and row["times"] > 0 for row in found["rows"].values())
    del found["rows"]["norms only"]
    (tmp_path / "refresh.json").write_text(json.dumps(found))
    started(refresh, *few)
    whole = result_of(tmp_path, "refresh")
    assert whole["rows"]["norms and scores"] == found["rows"]["norms and scores"] and len(whole["rows"]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "load_base", no_model)
        started(refresh, *few)
    assert result_of(tmp_path, "refresh") == whole
    _, stopped = start(refresh, *few[:-1], "2")
    assert stopped is not None and "rounds: 1, now 2" in stopped


def test_a_piece_is_made_once_a_question(tmp_path, capsys):
    work, calls = WorkFolder(tmp_path), []

    def make():
        calls.append(1)
        return {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"used": True, "kl": {"0.5": 0.25}}

    tensors, facts = work.piece("scores", {"seed": 0}, make)
    again, same = work.piece("scores", {"seed": 0}, make)
    assert len(calls) == 1 and facts == same and facts.keys() >= COST | STAMP | {"used", "kl"}
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    work.piece("scores", {"seed": 1}, make)
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2, "another question, another file; no scratch"
    assert "kept since" in capsys.readouterr().out


def test_code_counts_and_comments_do_not():
    one = 'def f(x):\n    """Doubles."""\n    return 2 * x\n'
    same = 'def f(x):\n    """Twice as much."""\n\n    return 2*x  # as it should\n'
    assert code_of(ast.parse(one)) == code_of(ast.parse(same)) != code_of(ast.parse(one.replace("2 *", "3 *")))
    found = {name: code_sha256(modules) for name, modules in induction_made.CODE.items()}
    assert len(set(found.values())) == len(found)


def damaged_header(data):
    return b"\xff" * 8 + data[8:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "cannot be used"),
        (lambda data: b"", "cannot be used"),
        (damaged_header, "cannot be used"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
        (lambda data: data.replace(b'\\"used\\": true', b'\\"used\\": null'), "is damaged"),
        (lambda data: data.replace(b'\\"seed\\": 0', b'\\"seed\\": 7'), "another question"),
        (lambda data: data.replace(b'"record"', b'"drocer"'), "cannot be used"),
    ],
    ids=["cut", "empty", "header", "bit", "fact", "foreign", "no record"],
)
def test_a_damaged_piece_is_made_anew(damage, message, tmp_path, capsys):
    work = WorkFolder(tmp_path)

    def make():
        return {"a": torch.arange(3.0)}, {"used": True}

    tensors, _ = work.piece("scores", {"seed": 0}, make)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    bad = damage(good)
    assert bad != good
    path.write_bytes(bad)
    again, facts = work.piece("scores", {"seed": 0}, make)
    assert torch.equal(again["a"], tensors["a"]) and facts["used"] is True
    said = capsys.readouterr().out
    assert message in said and "made anew" in said and "kept since" not in said
    work.piece("scores", {"seed": 0}, make)
    assert "kept since" in capsys.readouterr().out


def test_a_work_folder_that_cannot_be_is_named(few, tmp_path):
    (tmp_path / "work").write_text("a file")
    _, stopped = start(induction, *few)
    assert stopped is not None and "name another --work folder" in stopped


def test_without_a_work_folder_pieces_last_as_long_as_the_run(capsys):
    with work_folder(None) as work:
        work.piece("scores", {}, lambda: ({"a": torch.ones(1)}, {}))
        assert len(list(work.folder.iterdir())) == 1
    assert not work.folder.exists() and "a restart learns it again" in capsys.readouterr().out


def test_memory_is_that_of_the_block():
    with spent() as large:
        torch.ones(100 << 20, dtype=torch.uint8).sum()
    with spent() as small:
        torch.ones(1 << 20, dtype=torch.uint8).sum()
    assert large["added_bytes"] >= 90 << 20
    assert small["added_bytes"] < 60 << 20
    assert small["peak_bytes"] < large["peak_bytes"] - (60 << 20), "a mark that never falls would say the same"
    both = together(large, small)
    assert (both["peak_bytes"], both["added_bytes"]) == (large["peak_bytes"], large["added_bytes"])
    assert set(together().values()) == {0}
    assert both["cpu_seconds"] == pytest.approx(large["cpu_seconds"] + small["cpu_seconds"], abs=0.06)


def test_rows_and_their_variants():
    half, pattern = Ladder(sparsities=(0.5,), patterns=("2:4",)).levels
    for level in (half, pattern):
        assert variant_of(ROWS["folds"], "magnitude", level) == variant_of(ROWS["gains"], "wanda", level) == "any"
        assert variant_of(ROWS["absorbed"], "magnitude", level) == "magnitude"
        assert variant_of(ROWS["scores"], "sparsegpt", level) == "wanda"
    assert [variant_of(ROWS["all"], "magnitude", level) for level in (half, pattern)] == ["magnitude", EVERY_PAIR]
    assert Row(folds=("mlp_order",)).needs_pattern and not Row(folds=("mlp_order", "values")).needs_pattern
    assert not ROWS["none"].needs_pattern and ROWS["residual_order"].needs_pattern
    by_default = {name for name, row in ROWS.items() if row.is_default}
    assert by_default == {"scores", *AUTO_FOLDS, "auto folds", "default"}


@pytest.fixture
def ids_ST():
    return torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(1))


def normalised_streams(model, ids_ST):
    with torch.no_grad():
        streams = model.base_model(ids_ST, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    x = torch.cat([stream.flatten(0, 1) for stream in streams]).double()
    return x / x.square().mean(dim=1, keepdim=True).sqrt()


def test_the_rotation_makes_the_streams_moments_diagonal(ids_ST):
    model = tiny_model("llama", num_hidden_layers=3)
    before = normalised_streams(model, ids_ST)
    rotate_residual_(model, residual_axes(model, ids_ST))
    after = normalised_streams(model, ids_ST)
    gram = after.T @ after
    assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.diag().max()
    assert (gram.diag().diff() <= 1e-4 * gram.diag().max()).all(), "largest first"
    assert gram.trace() == pytest.approx(float((before.T @ before).trace()), rel=1e-6)


def test_what_the_plot_shows():
    assert shown_blocks(30) == [0, 15, 29] and shown_blocks(2) == [0, 1] and shown_blocks(1) == [0]
    shares = held_share(torch.tensor([[3.0, 0.0, 4.0, 0.0]]))
    assert shares[0] == pytest.approx(16 / 25) and shares[-1] == 1 and (shares.diff() >= 0).all()
