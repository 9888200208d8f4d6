"""Zero-shot accuracy: the harness's answers against a slow loop of our own, and what is refused."""

import importlib.util
import json
import os
import random
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from test_cli import expect_error, run

from elastic_sparsity.errors import ConfigError, DataError, NumericsError
from elastic_sparsity.report import mean_score, task_lines, task_means, tasks_table
from elastic_sparsity.task_files import load_tasks, read_documents
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.zero_shot import _linears_to_cast, score_task, zero_shot

TASKS = Path(__file__).parents[1] / "benchmarks" / "tasks"
DATA = Path(__file__).parents[2] / "shared" / "data" / "zero_shot"
SEVEN = ["piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq", "lambada_openai"]
WORDS = ["stone", "river", "lamp", "seven", "quiet", "under", "green", "wolf", "paper", "music", "door", "salt"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(folder, name, documents):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def phrase(draw, least, most):
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def choice_documents(count=24, num_choices=3):
    """Choices of very different lengths, so that acc and acc_norm differ; one document is not ASCII."""
    draw = random.Random(0)
    rows = [
        {
            "query": f"Question: {phrase(draw, 1, 6)}?\n",
            "choices": [phrase(draw, 1, 9) for _ in range(num_choices)],
            "gold": draw.randrange(num_choices),
        }
        for _ in range(count)
    ]
    rows[3]["choices"][1] = "naïve Größe"
    return rows


def winogrande_documents(count=24):
    draw = random.Random(1)
    return [
        {
            "context_options": [f"{text} {draw.choice(WORDS)}", f"{text} {draw.choice(WORDS)} {draw.choice(WORDS)}"],
            "continuation": phrase(draw, 1, 4),
            "gold": draw.randrange(2),
        }
        for text in (phrase(draw, 2, 8) for _ in range(count))
    ]


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """(log p(continuation | context), whether greedy decoding would say it), from one unpadded forward pass."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation)["input_ids"]
    log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for at in range(start, len(ids)):
        total += float(log_p[at - 1, ids[at]])
        greedy = greedy and int(log_p[at - 1].argmax()) == ids[at]
    return total, greedy


def accuracy(answers):
    """Share of (guess, right) pairs that agree."""
    return sum(guess == right for guess, right in answers) / len(answers)


def best(values):
    return max(range(len(values)), key=lambda k: values[k])


def test_multiple_choice_equals_a_loop(model, tokenizer, tmp_path):
    rows = choice_documents()
    write(tmp_path, "piqa", rows)
    plain, by_length = [], []
    for row in rows:
        prompt = f"{row['query'].strip()}\nAnswer:"
        sums = [log_likelihood(model, tokenizer, prompt, f" {choice}")[0] for choice in row["choices"]]
        plain.append((best(sums), row["gold"]))
        lengths = map(len, row["choices"])
        by_length.append((best([s / n for s, n in zip(sums, lengths, strict=True)]), row["gold"]))
    (score,) = zero_shot(model, tokenizer, ["piqa"], folder=TASKS, data=tmp_path).scores
    assert score.metrics == {"acc": accuracy(plain), "acc_norm": accuracy(by_length)}
    assert 0 < score.metrics["acc"] < 1 and score.metrics["acc"] != score.metrics["acc_norm"]
    assert (score.metric, score.value, score.num_documents) == ("acc_norm", accuracy(by_length), 24)
    assert score.error == pytest.approx((score.value * (1 - score.value) / 23) ** 0.5)  # of 0s and 1s


def test_winogrande_equals_a_loop(model, tokenizer, tmp_path):
    """Two contexts, one continuation: the likelier the continuation, the better the context."""
    rows = winogrande_documents()
    write(tmp_path, "winogrande", rows)
    answers = [
        (
            best([log_likelihood(model, tokenizer, x, f" {row['continuation']}")[0] for x in row["context_options"]]),
            row["gold"],
        )
        for row in rows
    ]
    (score,) = zero_shot(model, tokenizer, ["winogrande"], folder=TASKS, data=tmp_path).scores
    assert (score.metric, score.value) == ("acc", accuracy(answers)) and 0 < score.value < 1


def says_space_and_e(tokenizer, contexts):
    """A tiny model whose head is rearranged so that after the first context it says " e"."""
    model = tiny_model("llama")
    for text, wanted in ((contexts[0], " "), (f"{contexts[0]} ", "e")):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        (token,) = tokenizer(wanted)["input_ids"]
        said = int(model(ids).logits[0, -1].argmax())
        rows = model.lm_head.weight.data
        rows[[said, token]] = rows[[token, said]].clone()
    return model


def test_lambada_equals_a_loop(tokenizer, tmp_path):
    draw = random.Random(2)
    contexts = [phrase(draw, 2, 8) for _ in range(16)]
    rows = [{"context": x, "continuation": "e" if k % 3 else "stone"} for k, x in enumerate(contexts)]
    rows[0]["continuation"] = "e"
    write(tmp_path, "lambada_openai", rows)
    model = says_space_and_e(tokenizer, contexts)
    found = [log_likelihood(model, tokenizer, row["context"], f" {row['continuation']}") for row in rows]
    (score,) = zero_shot(model, tokenizer, ["lambada_openai"], folder=TASKS, data=tmp_path).scores
    assert (score.metric, score.value) == ("acc", sum(greedy for _, greedy in found) / 16) and 0 < score.value < 1
    mean = torch.tensor([total for total, _ in found], dtype=torch.float64).mean()
    assert score.metrics["perplexity"] == pytest.approx(float(torch.exp(-mean)), rel=1e-5)


def test_bfloat16_products_are_those_of_autocast_without_casting_at_every_call(model, tokenizer, tmp_path, monkeypatch):
    draw, seen = random.Random(2), []
    rows = [{"context": phrase(draw, 2, 8), "continuation": "stone"} for _ in range(8)]
    write(tmp_path, "lambada_openai", rows)
    measure = partial(zero_shot, model, tokenizer, ["lambada_openai"], folder=TASKS, data=tmp_path, batch_size=3)
    head, shared = model.get_output_embeddings(), model.get_output_embeddings().weight
    hook = head.register_forward_pre_hook(lambda head, inputs: seen.append(head.weight.dtype))
    found = measure(precision="bfloat16")
    assert set(seen) == {torch.bfloat16} and head.weight is shared
    hook.remove()
    monkeypatch.setattr("elastic_sparsity.zero_shot.weights_in", lambda linears, precision: nullcontext())
    assert measure(precision="bfloat16") == found != measure(precision="float32")


def test_weights_of_packed_integers_are_not_cast():
    plain, quantised = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    quantised.weight = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.uint8), requires_grad=False)
    assert _linears_to_cast(torch.nn.Sequential(plain, quantised, torch.nn.Embedding(3, 4))) == [plain]


@pytest.fixture
def three(tmp_path):
    """A folder with data of three tasks."""
    write(tmp_path, "piqa", choice_documents(9))
    write(tmp_path, "boolq", [{**row, "query": f"Passage: {row['query'].strip()}"} for row in choice_documents(7, 2)])
    write(tmp_path, "winogrande", winogrande_documents(8))
    return tmp_path


def test_batch_size_and_seed_change_nothing(model, tokenizer, three):
    measure = partial(zero_shot, model, tokenizer, ["winogrande", "piqa", "boolq"], folder=TASKS, data=three)
    torch.manual_seed(5)
    state, python = torch.get_rng_state(), random.getstate()
    first = measure(batch_size=1)
    assert [score.task for score in first.scores] == ["winogrande", "piqa", "boolq"]
    assert measure(batch_size=4) == measure(batch_size=64, seed=3) == measure(batch_size=1) == first
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    pairs = [(score.value, score.error) for score in first.scores]
    assert (first.mean, first.error) == mean_score(pairs)


def test_mean_by_hand():
    """Mean of 0.5 and 0.7; root of (0.03² + 0.04²) is 0.05, half of it 0.025."""
    mean, error = mean_score([(0.5, 0.03), (0.7, 0.04)])
    assert (mean, error) == (pytest.approx(0.6), pytest.approx(0.025))
    assert mean_score([(0.5, 0.03), (1.0, None)]) == (0.75, None)


def test_progress_counts_every_request_and_nothing_is_said(model, tokenizer, three, capfd, caplog):
    seen = []
    options = {"folder": TASKS, "data": three, "on_progress": lambda *step: seen.append(step)}
    zero_shot(model, tokenizer, ["piqa", "winogrande"], **options)
    assert seen == [("piqa", k, 27) for k in range(1, 28)] + [("winogrande", k, 16) for k in range(1, 17)]
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_limit(model, tokenizer, three):
    measure = partial(zero_shot, model, tokenizer, ["piqa"], folder=TASKS, data=three)
    (score,) = measure(limit=1).scores
    assert (score.num_documents, score.error) == (1, None)
    whole = measure()
    assert measure(limit=100) == measure(limit=10**30) == whole
    assert len(score.sha256) == 16 and score.sha256 != whole.scores[0].sha256
    for bad in (0, -1, 0.5, True):
        with pytest.raises(ConfigError, match="task limit: .*; expected a whole number from 1 on"):
            measure(limit=bad)
    with pytest.raises(ConfigError, match="batch size: 0"):
        measure(batch_size=0)


def test_unknown_names(three, monkeypatch):
    with pytest.raises(ConfigError, match="'piqqa' is unknown; did you mean piqa.*'nothing' is unknown.*arc_easy, b"):
        load_tasks(["piqqa", "nothing", "boolq"], folder=TASKS, data=three)
    for none in ([], [" "], ["piqa", ""]):
        with pytest.raises(ConfigError, match="names none; expected e.g. piqa,arc_easy"):
            load_tasks(none, folder=TASKS, data=three)
    with pytest.raises(ConfigError, match="task folder: .* is no folder"):
        load_tasks(["piqa"], folder=three / "no")
    os.mkfifo(three / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml is neither file nor folder"):
        load_tasks(["piqa"], folder=three)
    with pytest.raises(ConfigError, match="task data: .* is no folder"):
        load_tasks(["piqa"], folder=TASKS, data=three / "no")
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_path=str(TASKS), include_defaults=False)  # the real index is slow
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    with pytest.raises(ConfigError, match="'pica' is unknown; did you mean piqa.* lm-eval itself has"):
        load_tasks(["pica"])


def test_without_a_hub(monkeypatch):
    import lm_eval.tasks

    class Manager:
        all_tasks = ("piqa",)

        def load(self, names):
            raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nmore")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    with pytest.raises(
        DataError, match="'piqa': its data cannot be loaded from the hub: ConnectionError: .* Hub; with"
    ):
        load_tasks(["piqa"])


ROW = {"query": "q", "choices": ["a", "b"], "gold": 0}
DAMAGED = {
    "empty": ("", "holds no document"),
    "blank": ("\n \n", "holds no document"),
    "cut": (json.dumps(ROW) + '\n{"query": "q", "cho', "line 2: is no JSON"),
    "nested": (json.dumps(ROW) + "\n" + "[" * 100_000, "line 2: is no JSON"),
    "list": ("[1]", r"line 1: is \[1\]; expected an object"),
    "field": (
        json.dumps(ROW) + '\n{"query": "q", "gold": 0}',
        "line 2: 'choices' is missing; expected a list of t",
    ),
    "type": (
        json.dumps(ROW) + "\n" + json.dumps(ROW | {"gold": "0"}),
        "line 2: 'gold' is '0'; expected a number as",
    ),
    "null": (json.dumps(ROW | {"gold": None}), "line 1: 'gold' is None; expected a text, a number or texts"),
    "huge": (json.dumps(ROW | {"gold": 10**30}), "line 1: 'gold' is 1000"),
    "half character": (json.dumps(ROW | {"query": "\ud800"}), "line 1: 'query' is"),
    "right": (
        json.dumps(ROW) + "\n" + json.dumps(ROW | {"gold": 2}),
        "document 2: the right choice is 2; expected a num",
    ),
    "negative": (json.dumps(ROW | {"gold": -1}), "the right choice is -1"),
    "fraction": (json.dumps(ROW | {"gold": 0.5}), "the right choice is 0.5"),
    "empty choice": (json.dumps(ROW) + "\n" + json.dumps(ROW | {"choices": ["a", ""]}), "document 2: the choices are"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_data(name, tmp_path):
    text, message = DAMAGED[name]
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"piqa\.jsonl: .*{message}"):
        load_tasks(["piqa"], folder=TASKS, data=tmp_path)


def test_missing_and_binary_data(tmp_path):
    with pytest.raises(DataError, match=r"piqa\.jsonl: no such file; --task-data"):
        load_tasks(["piqa"], folder=TASKS, data=tmp_path)
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"piqa\.jsonl: cannot be read"):
        read_documents(tmp_path / "piqa.jsonl")
    write(tmp_path, "lambada_openai", [{"context": "a b", "continuation": " "}])
    with pytest.raises(DataError, match="document 1: the continuation is '  '; expected a text"):
        load_tasks(["lambada_openai"], folder=TASKS, data=tmp_path)


def test_task_files_that_do_not_work(tmp_path):
    text = (TASKS / "piqa.yaml").read_text()
    write(tmp_path, "piqa", [ROW])
    for name, old, new in (
        ("field", "query.rstrip()", "question"),
        ("split", "test_split: test", "test_split: dev"),
        ("kind", "multiple_choice", "many"),
        ("file", "test: piqa.jsonl", "test: [piqa.jsonl]"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text.replace("task: piqa", f"task: {name}").replace(old, new))
    (tmp_path / "damaged.yaml").write_text("task: [")
    for name in ("field", "split", "kind"):
        with pytest.raises(
            ConfigError, match=rf"'{name}': .*{name}\.yaml does not work: .*piqa\.jsonl is {{'query': 'q'"
        ):
            load_tasks([name], folder=tmp_path)
    with pytest.raises(ConfigError, match="expected a .jsonl file a split"):
        load_tasks(["file"], folder=tmp_path)
    with pytest.raises(ConfigError, match="'damaged' is unknown: its file is there, but lm-eval cannot read it"):
        load_tasks(["damaged"], folder=tmp_path)


def test_numbers_that_are_none_are_refused(tokenizer, three):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="task 'piqa': the model's log-likelihood of .* is nan"):
        zero_shot(model, tokenizer, ["piqa"], folder=TASKS, data=three)


def test_a_document_that_is_too_long_and_a_wrong_tokenizer(model, tokenizer, tmp_path):
    write(tmp_path, "piqa", [ROW, ROW | {"choices": ["a", "b" * 300]}])
    (task,) = load_tasks(["piqa"], folder=TASKS, data=tmp_path).values()
    with pytest.raises(DataError, match="'piqa': lm-eval stopped with AssertionError.*too long for the model"):
        score_task(model, tokenizer, "piqa", task)
    small = tiny_model("llama", vocab_size=60)
    with pytest.raises(DataError, match="'piqa': lm-eval stopped with IndexError.*tokenizer is the model's"):
        score_task(small, tokenizer, "piqa", task, limit=1)


def test_missing_harness(monkeypatch, capsys, three):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'elastic-sparsity\[tasks\]'"):
        load_tasks(["piqa"], folder=TASKS, data=three)


def test_table_and_means():
    rows = [
        {"level": level, "method": "elastic", "task": task, "metric": "acc", "value": value, "error": 0.03,
         "num_documents": 9}
        for level, task, value in (("0.5", "a", 0.5), ("0.5", "b", 0.7), ("2:4", "a", 0.4))
    ]  # fmt: skip
    (mean,) = task_means(rows)
    assert (mean["level"], mean["num_tasks"], mean["value"]) == ("0.5", 2, pytest.approx(0.6))
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(tasks_table(rows, "title"))
    text = console.export_text()
    assert "50.0 ± 3.0" in text and "60.0 ± 2.1" in text and "50 %" in text and "2:4" in text


def test_scores_on_other_documents_are_not_put_into_one_table():
    row = {"method": "elastic", "task": "piqa", "metric": "acc", "value": 0.5, "error": 0.03, "num_documents": 9}
    rows = [
        {**row, "level": level, "sha256": sha256} for level, sha256 in (("0.5", "ab"), ("2:4", "ab"), ("0.7", None))
    ]
    task_lines(rows)
    message = "task 'piqa': 50 % elastic answered documents of sha256 ab, 60 % elastic those of cd; the data changed"
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_lines([*rows, {**row, "level": "0.6", "sha256": "cd"}])
    task_lines([*rows, {**row, "level": "0.6", "task": "boolq", "sha256": "cd"}])  # another task's


def tasks_command(checkpoint, three, *more):
    return ("eval", checkpoint, "--task-folder", TASKS, "--task-data", three, "--precision", "float32", *more)


def test_command_line(capsys, tiny_checkpoint, three, tmp_path):
    result, text = tmp_path / "result.json", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = partial(tasks_command, tiny_checkpoint, three, "--output", result)
    code, stdout, stderr = run(
        capsys, *command("--tasks", "piqa, winogrande", "--level", "0.5", "--text", text, "--window", "64")
    )
    assert code == 0 and "perplexity" in stdout and "winogrande" in stdout and "±" in stdout, stdout + stderr
    before = json.loads(result.read_text())
    assert [row["task"] for row in before["zero_shot"]["rows"]] == ["piqa", "winogrande"]
    assert before["zero_shot"]["protocol"]["documents"] == "all" and before["rows"][0]["perplexity"] > 1
    # A second run adds its rows; what fails afterwards loses none.
    code, stdout, stderr = run(capsys, *command("--tasks", "piqa", "-q"))
    after = json.loads(result.read_text())
    assert code == 0 and after["rows"] == before["rows"], stderr
    cells = [(row["level"], row["task"]) for row in after["zero_shot"]["rows"]]
    assert sorted(cells) == sorted([("0.5", "winogrande"), *((x, "piqa") for x in ("0.5", "0.6", "0.7", "2:4"))])
    (three / "boolq.jsonl").write_text("")
    expect_error(capsys, "boolq.jsonl: holds no document", *command("--tasks", "winogrande,boolq"))
    expect_error(capsys, "its zero-shot rows have the protocol", *command("--tasks", "piqa", "--task-limit", "2"))
    assert json.loads(result.read_text()) == after


def test_rows_of_tasks_before_the_failing_one_are_kept(capsys, tiny_checkpoint, three, tmp_path):
    write(three, "boolq", [ROW | {"choices": ["a", "b" * 300]}])  # too long for the model: shows only when it runs
    command = tasks_command(tiny_checkpoint, three, "--level", "2:4", "--output", tmp_path / "r.json")
    expect_error(capsys, "task 'boolq': lm-eval stopped", *command, "--tasks", "piqa,boolq,winogrande")
    assert [row["task"] for row in json.loads((tmp_path / "r.json").read_text())["zero_shot"]["rows"]] == ["piqa"]
    expect_error(
        capsys, "holds results of", "eval", "random:llama", "--tasks", "piqa", "--task-folder", TASKS,
        "--task-data", three, "--output", tmp_path / "r.json",
    )  # fmt: skip


def test_rows_on_other_documents_are_not_mixed(capsys, tiny_checkpoint, three, tmp_path):
    result = tmp_path / "r.json"
    command = tasks_command(tiny_checkpoint, three, "--tasks", "piqa", "--output", result, "--level")
    assert run(capsys, *command, "0.5")[0] == 0
    before = result.read_bytes()
    write(three, "piqa", choice_documents(10))
    expect_error(capsys, "r.json: task 'piqa': 50 % elastic answered documents of sha256", *command, "0.6")
    assert result.read_bytes() == before
    assert run(capsys, *command, "0.5")[0] == 0, "the only row is replaced"


def test_mistakes_on_the_command_line(capsys, three):
    expect_error(capsys, "nothing to measure; give --text, --tasks or both", "eval", "random:llama")
    expect_error(capsys, "--task-data: is for tasks", "eval", "random:llama", "--text", "t", "--task-data", three)
    expect_error(capsys, "task limit: 0; expected", *tasks_command("random:llama", three, "--tasks", "piqa",
                 "--task-limit", "0"))  # fmt: skip
    expect_error(capsys, "batch size: -1", *tasks_command("random:llama", three, "--tasks", "piqa", "--task-batch",
                 "-1"))  # fmt: skip
    expect_error(capsys, "'piqua' is unknown; did you mean piqa?", *tasks_command("random:llama", three, "--tasks",
                 "piqua"))  # fmt: skip


def test_the_benchmark_goes_on_where_it_was_stopped(capsys, monkeypatch, tiny_checkpoint, three, tmp_path):
    monkeypatch.syspath_prepend(TASKS.parent)  # as a script has it
    spec = importlib.util.spec_from_file_location("zero_shot_benchmark", TASKS.parent / "zero_shot.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    arguments = [
        "--task-data",
        three,
        "--tasks",
        "piqa,winogrande",
        "--limit",
        "3",
        "--levels",
        "0.5",
        "2:4",
        "--dense",
    ]
    arguments += ["--baselines", "magnitude", "--precision", "float32", "--results", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", *map(str, [tiny_checkpoint, *arguments])])
    scored = []

    def stops_after_three(*args, **options):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(args[2])
        return score_task(*args, **options)

    monkeypatch.setattr(benchmark, "score_task", stops_after_three)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    cells = json.loads((tmp_path / "results" / "zero_shot.json").read_text())["rows"]
    assert [(row["level"], row["method"], row["task"]) for row in cells] == [
        ("dense", "dense", "piqa"), ("dense", "dense", "winogrande"), ("0.5", "elastic", "piqa"),
    ]  # fmt: skip
    monkeypatch.setattr(benchmark, "score_task", score_task)
    benchmark.main()
    result = json.loads((tmp_path / "results" / "zero_shot.json").read_text())
    assert result["rows"][:3] == cells and len(result["rows"]) == 10  # dense, and two methods at two levels
    assert {"date", "device", "commit", "seed", "versions", "protocol"} <= result.keys()
    assert (tmp_path / "results" / "zero_shot.png").stat().st_size > 1000
    assert "goes on after 3 cells" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--limit", "2"])
    with pytest.raises(ConfigError, match="has the protocol .* give another --name"):
        benchmark.main()


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/zero_shot is absent")
def test_the_seven_tasks_fit_their_data(model, tokenizer):
    """Prompts as the harness's own task files make them, from the first document of each."""
    tasks = load_tasks(SEVEN, folder=TASKS, data=DATA, limit=100)
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == {
        "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "winogrande": 1267, "boolq": 3270,
        "lambada_openai": 5153,
    }  # fmt: skip
    seen = {}
    for name, task in tasks.items():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=1)
        seen[name] = [request.args for request in task.instances]
    question = "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    assert [context for context, _ in seen["piqa"]] == [question] * 2
    assert seen["arc_easy"][1][1] == " Most ecosystems are found on land instead of in water."
    assert seen["boolq"][0][0].startswith("All biomass") and seen["boolq"][0][0].endswith("that produces?\nAnswer:")
    assert [answer for _, answer in seen["boolq"]] == [" no", " yes"]
    assert seen["winogrande"][1] == (
        "Sarah was a much better surgeon than Maria so Maria", " always got the easier cases.",
    )  # fmt: skip
    assert seen["lambada_openai"][0][0].endswith("I don't care about") and seen["lambada_openai"][0][1] == " signs"
    assert seen["openbookqa"][0][0].endswith("save money is to")


def test_text_for_gemma_begins_with_its_token(three, monkeypatch):
    """As all other text that is measured; the harness leaves it to the tokenizer."""
    seen, tokenizer = [], byte_tokenizer()
    gemma = tiny_model("gemma2")
    monkeypatch.setattr(type(gemma), "forward", recorded(type(gemma).forward, seen))
    zero_shot(gemma, tokenizer, ["piqa"], folder=TASKS, data=three, limit=2)
    assert seen and all((ids[:, 0] == tokenizer.bos_token_id).all() for ids in seen)
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id, "the user's own stays"
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="has no bos_token"):
        zero_shot(gemma, tokenizer, ["piqa"], folder=TASKS, data=three, limit=2)


def recorded(forward, seen):
    def call(self, input_ids, *args, **options):
        seen.append(input_ids)
        return forward(self, input_ids, *args, **options)

    return call
