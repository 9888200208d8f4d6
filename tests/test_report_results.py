"""Results that `eval` wrote later: shown with protocol, date and device if they are of these weights, else refused."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from reports import EVIL, Page, results, with_record
from test_cli import expect_error, run
from test_report_page import check_page

from elastic_sparsity import ElasticCheckpoint, reporting
from elastic_sparsity.cli_eval import Record
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.model_card import model_card
from elastic_sparsity.report import task_lines
from elastic_sparsity.report_facts import read_facts
from elastic_sparsity.report_words import task_rows

BASE = "b" * 64
HERE = {"date": "2026-11-28", "device": "another CPU"}


@pytest.fixture
def folder(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        reporting, "plots_of", lambda _: dict.fromkeys(("sparsity", "bytes", "totals", "zeros", "errors"))
    )
    return with_record(shutil.copytree(tiny_checkpoint, tmp_path / "c"), base_model={"id": "x", "sha256": BASE})


def saved(tmp_path, data, name="results.json"):
    path = tmp_path / name
    path.write_text(json.dumps(data))
    return path


def dense(folder, **changes):
    """The base model's results on the same protocols, made elsewhere."""
    found = results(folder, checkpoint_id=None, weights_sha256=BASE, level="dense", **HERE, **changes)
    found["rows"] = found["rows"][:1]
    found["zero_shot"]["rows"] = found["zero_shot"]["rows"][:2]
    return found


def read(folder, *paths):
    return read_facts(ElasticCheckpoint(folder), "c", paths).results


def test_files_of_one_protocol_are_one_table(folder, tmp_path):
    levels, base = saved(tmp_path, results(folder)), saved(tmp_path, dense(folder), "dense.json")
    found = read(folder, levels, base)
    (quality,), (tasks,) = found.quality, found.tasks
    assert [row.level for row in quality.rows] == ["dense", "0.5", "0.6", "0.7", "2:4"]
    assert [row.perplexity for row in quality.rows] == [40.5, 40.5, 41.5, 42.5, 43.5]
    assert [(row.level, row.task) for row in tasks.rows[:3]] == [("dense", "piqa"), ("dense", "boolq"), ("0.5", "piqa")]
    assert quality.when_and_where == "2026-11-27, 2026-11-28 on a CPU, 2 threads, another CPU"
    assert dict(quality.protocol)["windows"] == "3 windows of 256 tokens"
    other = results(folder)
    other["protocol"]["windows"] = [4, 256]
    del other["zero_shot"]
    assert len(read(folder, levels, saved(tmp_path, other, "other.json")).quality) == 2, "another protocol"
    assert read(folder).quality == () == read(folder).tasks


def test_scores_on_other_documents_are_refused(folder, tmp_path):
    base = dense(folder)
    base["zero_shot"]["rows"][0]["sha256"] = "1" * 16
    (tasks,) = read(folder, saved(tmp_path, results(folder)), saved(tmp_path, base, "dense.json")).tasks
    with pytest.raises(ConfigError, match="task 'piqa': dense answered documents of sha256 1111.*50 % those of 0000"):
        task_rows(tasks)


def test_the_page_and_the_card_show_them(capsys, folder, tmp_path):
    levels, base = saved(tmp_path, results(folder)), saved(tmp_path, dense(folder), "dense.json")
    code, stdout, stderr = run(capsys, "report", folder, "--results", levels, "--results", base)
    assert code == 0, stderr
    page, card = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for text in (check_page(page).text, card.replace("&#95;", "_")):
        for words in ("Measured later", "3 windows of 256 tokens", "2026-11-27, 2026-11-28 on a CPU", "61.2 ± 1.1",
                      "news.txt", "reference base", "43.50", "0.3750", "58.1 ± 0.8", "lm_eval 0.4.13"):  # fmt: skip
            assert words in text, words
        assert "Task accuracy" not in text and "neither perplexity nor KL" not in text
        assert "The run itself stored no quality" in text
    assert "result files of eval" in page
    assert "metrics:\n    - type: acc_norm\n      value: 0.612\n      name: acc_norm at 50 %" in card
    assert run(capsys, "report", folder, "--results", levels)[0] == 0
    assert "Task accuracy of the dense model is not among" in Page((folder / "report.html").read_text()).text
    assert run(capsys, "report", folder)[0] == 0
    assert "Task accuracy was not measured, or is not among" in (folder / "README.md").read_text()


def test_a_quick_look_says_so_on_the_hub(folder, tmp_path):
    """The Hub's tables show a name and a value; 200 documents are not the task."""
    whole, quick = results(folder), results(folder)
    quick["zero_shot"]["protocol"]["documents"] = 200
    del quick["rows"]
    for row in quick["zero_shot"]["rows"]:
        row["value"] /= 2
    again = results(folder)  # the same text in another precision: one of the two
    again["protocol"]["precision"] = "bfloat16"
    del again["zero_shot"]
    files = [saved(tmp_path, data, f"{n}.json") for n, data in enumerate((whole, quick, again))]
    facts = read_facts(ElasticCheckpoint(folder), "c", files)
    found = ModelCard(model_card(facts)).data.eval_results
    values = {(x.dataset_name, x.metric_name): x.metric_value for x in found}
    assert len(values) == len(found), "no name has two values"
    assert values["piqa", "acc_norm at 50 %"] == 2 * values["piqa, first 200 documents", "acc_norm at 50 %"] == 0.612
    assert values["news.txt, 3 windows of 256 tokens", "perplexity at 50 %"] == 40.5


@pytest.mark.parametrize(
    ("metric", "value", "error", "text"),
    [("acc_norm", 0.612, 0.011, "61.2 ± 1.1"), ("exact_match", 0.273, 0.012, "27.3 ± 1.2"),
     ("f1", 0.6121, None, "61.2"), ("word_perplexity", 17.356, 0.0423, "17.36 ± 0.042"),
     ("bits_per_byte", 0.7345, None, "0.7345")],
)  # fmt: skip
def test_a_metric_is_shown_with_the_digits_that_tell_levels_apart(metric, value, error, text):
    row = {"task": "t", "metric": metric, "value": value, "error": error, "num_documents": 9, "level": "0.5",
           "method": ""}  # fmt: skip
    assert task_lines([row])[1][0][-1] == text


def test_what_eval_writes_is_what_report_reads(capsys, tiny_checkpoint, tmp_path):
    """Of the checkpoint and of the very base model that it records."""
    folder, levels, base = (tmp_path / name for name in ("c", "levels.json", "dense.json"))
    shutil.copytree(tiny_checkpoint, folder)
    text = tmp_path / "news.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    options = ("--text", text, "--window", "64", "--max-windows", "1", "-q", "--output")
    assert run(capsys, "eval", folder, *options, levels)[0] == 0
    assert run(capsys, "eval", "random:llama", *options, base)[0] == 0
    code, _, stderr = run(capsys, "report", folder, "--results", levels, "--results", base)
    assert code == 0, stderr
    assert [row.level for row in read(folder, levels, base).quality[0].rows] == ["dense", "0.5", "0.6", "0.7", "2:4"]
    base.unlink()
    assert run(capsys, "eval", "random:opt", *options, base)[0] == 0
    expect_error(capsys, "dense.json: 'dense' is about weights", "report", folder, "--results", base)


def test_other_weights_are_refused(folder, tmp_path):
    good = results(folder)
    cases = {
        "is about checkpoint 'abc', not about this one": results(folder, checkpoint_id="abc"),
        "is about weights None, neither this checkpoint nor": results(folder, checkpoint_id=None),
        "is about weights 'c', neither": dense(folder) | {"rows": [dense(folder)["rows"][0] | {"weights_sha256": "c"}]},
        "level '0.9' is not in the ladder: 0.5, 0.6, 0.7, 2:4": results(folder, level="0.9"),
        "holds no results": {"model": "c"},
        "rows.0.date": {"rows": [{**good["rows"][0], "date": "yesterday"}]},
        "rows.0.perplexity": {"rows": [{**good["rows"][0], "perplexity": float("nan")}]},
        "zero_shot.rows.0': 'Value error, acc_norm 1.5 is no share": {
            "zero_shot": {"protocol": {}, "rows": [{**good["zero_shot"]["rows"][0], "value": 1.5}]}
        },
    }
    for words, data in cases.items():
        with pytest.raises(ConfigError) as caught:
            read(folder, saved(tmp_path, data))
        assert words in str(caught.value) and "results.json" in str(caught.value), words
    with pytest.raises(ConfigError, match="'0.5' is there twice on one protocol"):
        read(folder, saved(tmp_path, good), saved(tmp_path, good, "again.json"))
    with pytest.raises(ConfigError, match=r"no\.json: results cannot be read: there is no such file"):
        read(folder, tmp_path / "no.json")
    ElasticCheckpoint(folder).update_record({"base_model": None})
    with pytest.raises(ConfigError, match="is about weights"):
        read(folder, saved(tmp_path, dense(folder)))
    with pytest.raises(ConfigError, match="is about weights None"):  # not known on both sides is no match
        read(folder, saved(tmp_path, results(folder, checkpoint_id=None, level="dense")))


def test_hostile_names_are_text(folder, tmp_path):
    data = results(folder, device=EVIL)
    data["protocol"][EVIL] = EVIL
    for number, row in enumerate(data["zero_shot"]["rows"]):
        row["task"], row["metric"] = f"{number % 2}{EVIL}", EVIL
    page = reporting.write_report(folder, results=[saved(tmp_path, data)]).read_text(encoding="utf-8")
    assert "<script" not in page and "<script>alert(1)</script>" in check_page(page).text
    _, metadata, card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert "<script" not in card
    names = [result["dataset"]["name"] for result in yaml.safe_load(metadata)["model-index"][0]["results"]]
    assert names[1:] == [f"0{EVIL}", f"1{EVIL}"], "in the metadata it is text"


def test_eval_does_not_join_tasks_of_other_weights(tmp_path):
    """The checkpoint at a path may be another one by the next call."""
    row = {"level": "0.5", "method": "elastic", "task": "piqa", "value": 0.5, "checkpoint_id": "a"}
    path = tmp_path / "r.json"
    for number, changes in enumerate(({}, {"task": "boolq"}, {"task": "arc_easy", "checkpoint_id": "b"})):
        record = Record(path, "c")
        record.start_tasks(None, "float32")
        if number < 2:
            record.add_task(row | changes)
            continue
        with pytest.raises(ConfigError, match=r"r\.json: its zero-shot rows are of other weights"):
            record.add_task(row | changes)
    rows = json.loads(path.read_text())["zero_shot"]["rows"]
    assert [x["task"] for x in rows] == ["piqa", "boolq"]
    assert all(x["date"] and "threads" in x["device"] for x in rows)
