"""The command that measures: perplexity and KL on a text, zero-shot accuracy on tasks."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from elastic_sparsity.errors import ConfigError, OutputError
from elastic_sparsity.files import check_output_file, folder_lock, is_file, is_folder, write_json

PRECISIONS = ("auto", "float32", "bfloat16")
DTYPES = (*PRECISIONS, "float16")
WINDOW, TASK_BATCH = 2048, 8
CELL = ("level", "method", "task")  # what a zero-shot row is the result of
ORIGIN = ("checkpoint_id", "weights_sha256")  # of which weights


def register(app: typer.Typer, progress_bars: Callable[[bool], Any]) -> None:
    """Adds the command to an app; `progress_bars(quiet)` is a context that yields a progress function."""

    @app.command("eval")
    def eval_command(
        path: Annotated[
            str, typer.Argument(help="Elastic checkpoint or Hugging Face model (folder or hub id), or .gguf file.")
        ],
        text: Annotated[str | None, typer.Option(help="Text file to measure perplexity on.")] = None,
        level: Annotated[str | None, typer.Option(help="One level of an elastic checkpoint; default: all.")] = None,
        dtype: Annotated[
            str, typer.Option(help="Of a plain model's weights: auto (as stored), float32, bfloat16 or float16.")
        ] = "auto",
        reference: Annotated[str | None, typer.Option(help="Dense model, for KL.")] = None,
        window: Annotated[int | None, typer.Option(help=f"Tokens a window; default: {WINDOW}.", min=8)] = None,
        max_windows: Annotated[int | None, typer.Option(help="Only the first windows.", min=1)] = None,
        tasks: Annotated[
            str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness, as piqa,arc_easy.")
        ] = None,
        task_folder: Annotated[
            Path | None, typer.Option(help="Folder of task files (*.yaml) that read local data; needs no hub.")
        ] = None,
        task_data: Annotated[Path | None, typer.Option(help="Folder of the .jsonl files that task files name.")] = None,
        task_limit: Annotated[int | None, typer.Option(help="Only the first documents of every task.")] = None,
        task_batch: Annotated[
            int | None, typer.Option(help=f"Sequences in one forward pass of a task; default: {TASK_BATCH}.")
        ] = None,
        precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
        output: Annotated[
            Path | None, typer.Option(help="Also write the rows as JSON; other results of this path there are kept.")
        ] = None,
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Perplexity, KL to a reference and zero-shot accuracy, for dense, sliced and elastic models alike."""
        _check(text, tasks, precision, dtype)
        of_text = {"--reference": reference, "--window": window, "--max-windows": max_windows}
        of_tasks = {"--task-folder": task_folder, "--task-data": task_data, "--task-limit": task_limit}
        if text is None:
            _refuse(of_text, "perplexity; give the text with --text")
        if tasks is None:
            _refuse(of_tasks | {"--task-batch": task_batch}, "tasks; name some with --tasks, as piqa,arc_easy")
        window, task_batch = window or WINDOW, TASK_BATCH if task_batch is None else task_batch
        shared = {"level": level, "dtype": dtype, "precision": precision}
        record = Record(output, path)
        with progress_bars(quiet) as progress:
            found = {}
            if tasks is not None:  # whatever is wrong with them shows before an hour of perplexity
                found = _tasks(tasks, task_folder, task_data, task_limit, task_batch)
                record.start_tasks(task_limit, precision)
            if text is not None:
                sizes = {"window": window, "max_windows": max_windows, "reference": reference}
                _perplexity(path, text, record, progress=progress, **sizes, **shared)
            if tasks is not None:
                _zero_shot(path, found, record, progress=progress, limit=task_limit, batch_size=task_batch, **shared)


def _check(text: str | None, tasks: str | None, precision: str, dtype: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: {precision!r} is not auto, float32 or bfloat16.")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    if text is None and tasks is None:
        raise ConfigError("eval: nothing to measure; give --text, --tasks or both.")


def _refuse(options: dict[str, Any], what_for: str) -> None:
    """Raises: ConfigError: if one is given, that would change nothing."""
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option}: is for {what_for}.")


def _tasks(tasks: str, folder: Path | None, data: Path | None, limit: int | None, batch: int) -> dict[str, Any]:
    from elastic_sparsity.task_files import load_tasks
    from elastic_sparsity.zero_shot import check_amounts

    check_amounts(limit, batch)
    return load_tasks([name.strip() for name in tasks.split(",")], folder=folder, data=data, limit=limit)


class Record:
    """The output file: the model, `protocol` and `rows` of perplexity, and the same of tasks under `zero_shot`.

    It is read and written at every result, each with its date and device; `report --results` reads it. What it holds of
    this model stays, unless it is measured anew; that may also come from other processes meanwhile.

    Raises: ConfigError: if it holds anything else. OutputError: if it cannot be made.
    """

    def __init__(self, output: Path | None, path: str) -> None:
        self.output, self.path, self.device = output, path, _device()
        self.text_protocol, self.task_protocol = dict[str, Any](), dict[str, Any]()
        if output is not None:
            check_output_file(output)
            self._read()

    def start_text(self, protocol: dict[str, Any], origin: dict[str, str]) -> None:
        """Raises: ConfigError: if the file's other perplexities are of another protocol or of other weights."""
        self.text_protocol = protocol
        self._text_rows(self._read(), origin)

    def add_text(self, row: dict[str, Any]) -> None:
        """Raises: ConfigError: as `start_text`, if another process has changed the file."""
        with self._changed() as data:
            kept = [x for x in self._text_rows(data, row) if any(x.get(key) != row[key] for key in CELL[:2])]
            data |= {"protocol": self.text_protocol, "rows": [*kept, self._stamped(row)]}

    def start_tasks(self, limit: int | None, precision: str) -> None:
        """Raises: ConfigError: if the file's other tasks were measured by another protocol."""
        from elastic_sparsity.measure import zero_shot_protocol

        self.task_protocol = zero_shot_protocol(limit, precision)
        self._task_rows(self._read())

    def add_task(self, row: dict[str, Any]) -> None:
        """Raises: ConfigError: if the file's others are of other weights that were at this path, or other documents."""
        from elastic_sparsity.report import check_documents

        with self._changed() as data:
            kept = [x for x in self._task_rows(data) if any(x[key] != row[key] for key in CELL)]
            if any(x.get(key) != row.get(key) for x in kept for key in ORIGIN):
                raise ConfigError(
                    f"{self.output}: its zero-shot rows are of other weights, or do not tell; name another --output."
                )
            try:
                check_documents([*kept, row])
            except ConfigError as error:
                raise ConfigError(f"{self.output}: {error} Or name another --output.") from None
            data["zero_shot"] = {"protocol": self.task_protocol, "rows": [*kept, self._stamped(row)]}

    def _text_rows(self, data: dict[str, Any], origin: dict[str, Any]) -> list[dict[str, Any]]:
        rows = data.get("rows") or []
        if rows:
            self._check_protocol("perplexities", data.get("protocol"), self.text_protocol)
        if any(row.get(key) != origin.get(key) for row in rows for key in ORIGIN):
            raise ConfigError(
                f"{self.output}: its perplexities are of other weights that were at this path, or do not tell; name "
                "another --output."
            )
        return rows

    def _task_rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        held = data.get("zero_shot", {"protocol": self.task_protocol, "rows": []})
        self._check_protocol("zero-shot rows", held["protocol"], self.task_protocol)
        return held["rows"]

    def _read(self) -> dict[str, Any]:
        held = {} if self.output is None else _held(self.output)
        if held and not _is_same(held.get("model"), self.path):
            raise ConfigError(f"{self.output}: holds results of {held.get('model')!r}; name another --output.")
        return held or {"model": self.path}

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        """The file's content, to change; it is written at the end. Other processes wait."""
        if self.output is None:
            yield self._read()
            return
        with ExitStack() as stack:
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(self.output.parent))
            except OSError as error:
                raise OutputError(f"{self.output}: cannot be made: {error}.") from error
            data = self._read()
            yield data
            write_json(self.output, data)

    def _check_protocol(self, what: str, held: Any, wanted: dict[str, Any]) -> None:
        if held != wanted:
            raise ConfigError(
                f"{self.output}: its {what} have the protocol {held}, these would have {wanted}; name another --output."
            )

    def _stamped(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"date": date.today().isoformat(), "device": self.device}


def _device() -> str:
    from elastic_sparsity.doctor import read_facts
    from elastic_sparsity.precision import default_device

    facts = read_facts()
    return facts.gpus[0].name if default_device() == "cuda" else f"{facts.cpu}, threads: {facts.threads}"


def _is_same(held: Any, path: str) -> bool:
    """Whether two names are of one model: of folders and files by where they are, of all else as they are written."""
    if held == path:
        return True
    are_here = isinstance(held, str) and all(is_folder(x) or is_file(x) for x in (held, path))
    return are_here and Path(held).resolve() == Path(path).resolve()


def _held(output: Path) -> dict[str, Any]:
    """What an earlier `eval` wrote there; nothing if nothing is there.

    Raises: ConfigError: if that was another program.
    """
    if not is_file(output) or output.stat().st_size == 0:
        return {}
    try:
        data = json.loads(output.read_text(encoding="utf-8"))
        is_ours = isinstance(data["model"], str)
        tasks = data.get("zero_shot", {"protocol": {}, "rows": []})
        is_ours = (
            is_ours and isinstance(tasks["protocol"], dict) and all(key in row for row in tasks["rows"] for key in CELL)
        )
        is_ours = is_ours and all(isinstance(row, dict) for row in data.get("rows", []))
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ConfigError(f"{output}: holds what no `eval` wrote, and stays as it is; name another --output.")
    return data


def _perplexity(path: str, text: str, record: Record, **options: Any) -> None:
    from elastic_sparsity.measure import evaluate_path
    from elastic_sparsity.report import results_table

    rows, protocol = evaluate_path(path, text, on_start=record.start_text, on_row=record.add_text, **options)
    counts = protocol["windows"]
    Console(emoji=False).print(results_table(rows, f"{protocol['text']}, {counts[0]} windows of {counts[1]} tokens"))


def _zero_shot(path: str, tasks: dict[str, Any], record: Record, limit: int | None, **options: Any) -> None:
    from elastic_sparsity.measure import zero_shot_path
    from elastic_sparsity.report import tasks_table

    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        record.add_task(row)

    try:
        zero_shot_path(path, tasks, limit=limit, on_row=keep, **options)
    finally:  # also after an error or Ctrl-C: what is done took long
        documents = "all documents" if limit is None else f"the first {limit} documents"
        if rows:
            Console(emoji=False).print(tasks_table(rows, f"zero-shot, shares in % ± standard error, {documents}"))
