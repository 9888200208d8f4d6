"""From names to tasks of lm-evaluation-harness: local task files with their data, or the harness's own through a hub.

A local task file is one of the harness's (*.yaml) with `dataset_path: json` and, in `dataset_kwargs.data_files`, names
of .jsonl files, which lie in a data folder that the user names. They are read here and not by `datasets`: no cache, an
error names file and line, and what the harness would count as a wrong answer (a right answer that is none of the
choices) is refused. Knows no model.
"""

import difflib
import itertools
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_sparsity.errors import ConfigError, DataError, ElasticSparsityError, brief
from elastic_sparsity.files import is_file, is_folder, strange_file

OFFLINE = "without a hub, give local task files (--task-folder) and their data (--task-data)"


def check_harness() -> None:
    """Raises: ConfigError: if lm-evaluation-harness is missing."""
    try:
        import lm_eval.tasks  # noqa: F401  slow import, only here
    except ImportError as error:
        raise ConfigError(f"zero-shot tasks: {error}; pip install 'elastic-sparsity[tasks]'.") from None


def load_tasks(
    names: Sequence[str],
    *,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The harness's tasks by name, in the order asked, with their documents read and checked.

    Args:
        names: of task files in `folder`; without one the harness's own, of whose groups and tags come all the tasks.
        folder: holds task files (*.yaml).
        data: folder of the files that the task files name; None = the task files' folder.
        limit: how many documents of each will be scored and are looked through; None = all.
        seed: of what a task draws when it is made, if it does.
    Raises: ConfigError: lm-eval is missing, no names, an unknown name, no such folder, a task file that does not work.
        DataError: a data file that is missing, damaged, empty or not what its task file expects, or no hub.
    """
    check_harness()
    for option, path in (("task folder", folder), ("task data", data)):
        if path is not None and not is_folder(path):
            raise ConfigError(f"{option}: {str(path)!r} is no folder.")
    if folder is not None and (strange := strange_file(Path(folder))):  # the harness would wait for a pipe for ever
        raise ConfigError(f"task folder: {strange} is neither file nor folder; move it away.")
    wanted = list(dict.fromkeys(names))
    if not wanted or not all(isinstance(name, str) and name.strip() for name in wanted):
        raise ConfigError(f"tasks: {brief(list(names))} names none; expected e.g. piqa,arc_easy.")
    with quiet_harness(), seeded(seed):
        return _load(wanted, folder, data, limit)


def _load(
    names: Sequence[str], folder: str | Path | None, data: str | Path | None, limit: int | None
) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager  # slow import, only here

    found: dict[str, Any] = {}
    if folder is None:
        manager = TaskManager()  # a quarter of a minute: 14,000 names
        _check_names(names, manager.all_tasks, "lm-eval itself")
        for name in names:
            found |= _harness_tasks(manager, name)
        return found
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    _check_names(names, manager.all_subtasks, str(folder))
    for name in names:
        entry = manager.task_index[name]
        where = Path(entry.yaml_path)
        files = _data_files(entry.cfg, where, Path(folder if data is None else data))
        found[name] = _local_task(name, where, files)
        if files:
            split = found[name].config.test_split or found[name].config.validation_split
            _check_documents(found[name], name, files.get(split, where), limit)
    return found


def _check_names(names: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises: ConfigError: naming all that are not known."""
    facts = []
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if is_file(Path(where) / f"{name}.yaml"):
            hint = ": its file is there, but lm-eval cannot read it as a task file"
        facts.append(f"{name!r} is unknown{hint}")
    if facts:
        held = ", ".join(known) or "no task file"
        raise ConfigError(f"tasks: {'; '.join(facts)}. {where} has {held if len(known) < 40 else len(known)}.")


def _harness_tasks(manager: Any, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # datasets and huggingface_hub raise many types
        reason = f"its data cannot be loaded from the hub: {_reason(error)}; {OFFLINE}"
        raise DataError(f"task {name!r}: {reason}.") from error


def _local_task(name: str, where: Path, files: Mapping[str, Path]) -> Any:
    """A task file as a task. Its data files are read here; a task file without any is left to the harness."""
    from lm_eval.tasks import TaskManager  # slow import, only here

    documents = {split: read_documents(path) for split, path in files.items()}
    splits = {split: _as_dataset(files[split], found) for split, found in documents.items()}
    change = {"task": name, "custom_dataset": lambda **_: splits} if files else {"task": name}
    manager = TaskManager(include_path=str(where.parent), include_defaults=False)
    try:  # the harness's way to change fields of a task is to name it in a group
        return manager.load([{"group": "changed", "task": [change]}])["tasks"][name]
    except Exception as error:  # whatever the fields of a task file and its templates lead to
        seen = [f"the first document of {files[split]} is {brief(x[0], 300)}" for split, x in documents.items()]
        hint = ", ".join(seen) or OFFLINE
        raise ConfigError(f"task {name!r}: {where} does not work: {_reason(error)}; {hint}.") from error


def _data_files(config: Mapping[str, Any], where: Path, data: Path) -> dict[str, Path]:
    """Split to file, for a task file that names local ones; else nothing."""
    if config.get("dataset_path") != "json":
        return {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    files = {"train": files} if isinstance(files, str) else files  # as `datasets` has it
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(
            f"{where}: dataset_kwargs.data_files is {brief(files)}; expected a .jsonl file a split, as test: a.jsonl."
        )
    return {str(split): data / file for split, file in files.items()}


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line, all with the first one's fields: texts, numbers, or lists of texts.

    Raises: DataError: naming file and line.
    """
    if not is_file(path):
        raise DataError(f"{path}: no such file; --task-data names the folder with the tasks' data.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; copy it again.") from error
    documents: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number}: is no JSON: {error}; the file is damaged, copy it again."
            ) from None
        _check_document(path, number, document, documents[0] if documents else document)
        documents.append(document)
    if not documents:
        raise DataError(f"{path}: holds no document; copy it again.")
    return documents


def _check_document(path: Path, number: int, document: Any, first: Any) -> None:
    if not isinstance(document, dict) or not document:
        raise DataError(f"{path}: line {number}: is {brief(document)}; expected an object with fields.")
    for field in first.keys() | document.keys():
        kind = _kind(document.get(field))
        expected = _kind(first.get(field))
        if kind != expected or kind is None:
            found = brief(document[field]) if field in document else "missing"
            wanted = f"{expected} as in the first line" if expected else "a text, a number or texts"
            if field not in first:
                wanted = "the fields of the first line, which has none of this name"
            raise DataError(f"{path}: line {number}: {field!r} is {found}; expected {wanted}.")


def _kind(value: Any) -> str | None:
    """What a field holds, in words; None for what no task file can use (it may crash pyarrow)."""
    if isinstance(value, str):
        return "a text" if _encodes(value) else None
    if isinstance(value, list):
        return "a list of texts" if value and all(isinstance(x, str) and _encodes(x) for x in value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return "a number" if abs(value) < 1 << 53 else None


def _encodes(text: str) -> bool:
    """JSON may hold half a character, which no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= x <= "\udfff" for x in text)


def _as_dataset(path: Path, documents: list[dict[str, Any]]) -> Any:
    from datasets import Dataset  # slow import, only here

    try:
        return Dataset.from_list(documents)
    except Exception as error:  # pyarrow raises many types
        raise DataError(f"{path}: cannot be read: {_reason(error)}.") from error


def _check_documents(task: Any, name: str, path: Path, limit: int | None) -> None:
    """That every document has choices and a right one, or a continuation; the harness would only count it as wrong."""
    kind = task.OUTPUT_TYPE
    if kind not in ("multiple_choice", "loglikelihood"):
        return
    number, count = 1, len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    try:
        for number, document in enumerate(itertools.islice(task.eval_docs, count), start=1):
            where = f"{path}: document {number}"
            if kind == "loglikelihood" or task.multiple_input:
                continuation = task.doc_to_target(document)
                if not isinstance(continuation, str) or not continuation.strip():
                    raise DataError(f"{where}: the continuation is {brief(continuation)}; expected a text.")
            if kind == "multiple_choice":
                right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
                _check_choices(where, task.doc_to_choice(document), right)
    except ElasticSparsityError:
        raise
    except Exception as error:  # whatever a template meets in a document
        raise DataError(f"task {name!r}: {path}: document {number}: {_reason(error)}.") from error


def _check_choices(where: str, choices: Any, right: Any) -> None:
    if not isinstance(choices, list) or not all(isinstance(x, str) and x.strip() for x in choices):
        raise DataError(f"{where}: the choices are {brief(choices)}; expected texts, none empty.")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"{where}: the right choice is {brief(right)}; expected a number from 0 to {len(choices) - 1}.")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Inside, the harness and what it uses say only errors and draw no bars."""
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging  # slow import, only here

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    before, draw, verbosity = [x.level for x in loggers], tqdm.__init__, transformers_logging.get_verbosity()

    def hidden(self: Any, *arguments: Any, **options: Any) -> None:
        draw(self, *arguments, **{**options, "disable": True})

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    tqdm.__init__ = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = draw  # type: ignore[method-assign]
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators that tasks draw from start at `seed`; outside, nothing has changed."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
