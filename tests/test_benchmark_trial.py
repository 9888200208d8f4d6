"""trial.py as a user starts it, on a tiny random model: a change beside its reference, kept, and what is refused."""

import json

import pytest
from test_benchmarks import RECIPE, place, start, started  # noqa: F401  place is a fixture

import trial  # isort: skip  found by test_benchmarks


@pytest.fixture
def small(place, tmp_path):  # noqa: F811
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return ["--calibration", place / "calibration.txt", "--evaluation", place / "evaluation.txt", "--recipe",
            tmp_path / "tiny.toml", "--samples", "8", "--length", "16", "--block-samples", "4", "--steps", "6",
            "--window", "32", "--every", "2", "--results", tmp_path, "--work", tmp_path / "work"]  # fmt: skip


def trials(tmp_path):
    return json.loads((tmp_path / "trial.json").read_text())["trials"]


def test_a_change_beside_its_reference(small, tmp_path):
    started(trial, *small, "--trial", "as it is", "--seeds", "0", "1")
    text = started(trial, *small, "--trial", "no steps", "--set", "end_to_end.steps=0", "model.id=random:llama")
    found = trials(tmp_path)
    assert found["no steps"]["set"] == {"end_to_end": {"steps": 0}, "model": {"id": "random:llama"}}
    assert list(found["as it is"]["seeds"]) == ["0", "1"] and list(found["no steps"]["seeds"]) == ["0"]
    for name, row in [("as it is", x) for x in found["as it is"]["seeds"].values()] + [
        ("no steps", found["no steps"]["seeds"]["0"])
    ]:
        assert row["perplexity"].keys() == {"0.6", "2:4"} and all(x > 1 for x in row["perplexity"].values())
        assert set(row["kl_on_its_text"]) == ({"0.6", "2:4"} if name == "as it is" else set())
    seeds = found["as it is"]["seeds"]
    assert seeds["0"]["perplexity"] != seeds["1"]["perplexity"] != found["no steps"]["seeds"]["0"]["perplexity"]
    assert "no steps" in text and "as it is" in text and seeds["0"]["measured"].startswith("every 2 of")


def test_a_trial_runs_once_and_its_run_goes_on(small, tmp_path, monkeypatch):
    started(trial, *small, "--trial", "a")
    first, real, calls = trials(tmp_path), trial.optimize, []
    monkeypatch.setattr(trial, "optimize", lambda *args: calls.append(args) or real(*args))
    started(trial, *small, "--trial", "a")
    assert trials(tmp_path) == first and not calls
    (tmp_path / "trial.json").unlink()  # the checkpoint is there
    started(trial, *small, "--trial", "a")
    assert trials(tmp_path)["a"]["seeds"]["0"]["perplexity"] == first["a"]["seeds"]["0"]["perplexity"] and not calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "steps=3"], "expected SECTION.FIELD=VALUE"),
        (["--set", "nowhere.steps=3"], "'nowhere' is no section"),
        (["--set", "end_to_end.stepz=3"], "stepz"),
        (["--set", "end_to_end.steps=three"], "end_to_end.steps"),
    ],
)
def test_changes_that_are_none(changes, message, small, tmp_path):
    _, stopped = start(trial, *small, "--trial", "x", *changes)
    assert stopped is not None and message in stopped
    assert not (tmp_path / "trial.json").exists()


def test_another_trial_of_the_same_name_or_other_options(small):
    started(trial, *small, "--trial", "a", "--set", "end_to_end.steps=1")
    _, stopped = start(trial, *small, "--trial", "a", "--set", "end_to_end.steps=2")
    assert stopped is not None and "name it anew" in stopped
    _, stopped = start(trial, *small, "--trial", "b", "--every", "3")
    assert stopped is not None and "every: 2, now 3" in stopped
