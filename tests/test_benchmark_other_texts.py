"""other_texts.py as a user starts it, on a tiny random model, and what it refuses."""

import json

import pytest
from test_benchmarks import start, started

import other_texts  # isort: skip  found by test_benchmarks


@pytest.fixture
def data(tmp_path):
    boolq = [f"Passage: river {n} is long.\nQuestion: is it?\nAnswer:" for n in (1, 2, 2)]
    lines = {
        "boolq": [{"query": text, "choices": ["no", "yes"], "gold": "0"} for text in boolq],
        "lambada_openai": [{"context": "she took the", "continuation": "lamp"}],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_passages_come_whole_and_once_without_question(data):
    text = other_texts.passages(data, 10_000, seed=0)
    assert sorted(text.split("\n\n")) == ["river 1 is long.", "river 2 is long.", "she took the lamp"]
    assert other_texts.passages(data, 10_000, seed=0) == text != other_texts.passages(data, 10_000, seed=2)
    assert other_texts.passages(data, 1, seed=0) == text.split("\n\n")[0]


def test_both_texts_are_written(data):
    places = ("--model", "random:llama", "--task-data", data, "--output", data / "texts")
    printed = started(other_texts, *places, "--samples", 2, "--length", 16)
    texts = {name: (data / "texts" / f"{name}.txt").read_text() for name in ("passages", "self")}
    assert "river 1" in texts["passages"] and texts["self"].strip()
    assert {path.name for path in (data / "texts").iterdir()} == {"passages.txt", "self.txt"}
    assert printed.count("sha256") == 2


def test_a_text_that_is_there_is_kept(data):
    (data / "texts").mkdir()
    (data / "texts" / "self.txt").write_text("of another machine")
    printed = started(other_texts, "--model", "random:llama", "--task-data", data, "--output", data / "texts")
    assert (data / "texts" / "self.txt").read_text() == "of another machine" and "self.txt: kept as it was" in printed
    assert "passages.txt: written" in printed


def test_data_of_another_shape_is_refused(data):
    (data / "boolq.jsonl").write_text('{"query": "no passage here"}')
    _, stopped = start(other_texts, "--model", "random:llama", "--task-data", data, "--output", data / "texts")
    assert stopped is not None and "boolq.jsonl: not the passages of boolq" in stopped
    (data / "boolq.jsonl").unlink()
    _, stopped = start(other_texts, "--model", "random:llama", "--task-data", data, "--output", data / "texts")
    assert stopped is not None and "boolq.jsonl" in stopped
