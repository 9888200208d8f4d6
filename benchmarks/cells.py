"""A benchmark's JSON that is filled cell by cell: an interrupted run goes on, another question is refused."""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.data import read_text
from elastic_sparsity.doctor import read_facts
from elastic_sparsity.errors import DataError, ElasticSparsityError, OutputError
from elastic_sparsity.files import file_sha256, is_file
from elastic_sparsity.precision import default_device, resolve_precision
from elastic_sparsity.preparing import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TEXTS = ("calibration", "evaluation")  # the arguments that name a text
KNOWN_BYTES = {"abc-news.txt": 4_054_843, "wikitext2-test.raw.txt": 1_290_547}  # of the texts of quoted figures
NOTHING = "not recorded"


def question_of(args: argparse.Namespace, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that a figure depends on; of the texts the names, and what they hold."""
    places = ("name", "restart", "results")
    question = {name: value for name, value in vars(args).items() if name not in (*left_out, *places)}
    return question | {name: Path(question[name]).name for name in TEXTS if name in question} | text_hashes(args)


def text_hashes(args: argparse.Namespace) -> dict[str, str | None]:
    """16 digits of each text file's sha256; None for the name of a data set, or "self": there is no file."""
    sources = {name: getattr(args, name) for name in TEXTS if hasattr(args, name)}
    return {
        f"{name}_text_sha256": file_sha256(Path(source))[:16] if is_file(source) else None
        for name, source in sources.items()
    }


def differences(asked: dict[str, Any], question: dict[str, Any]) -> str:
    """In words, what two questions do not agree in; empty if they are one. A key that is missing counts as None."""
    differing = [key for key in {**asked, **question} if asked.get(key) != question.get(key)]
    return "; ".join(f"{key}: {asked.get(key, NOTHING)}, now {question.get(key, NOTHING)}" for key in differing)


def begin(args: argparse.Namespace, file: Path, question: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The result so far, if it is of the same question and `--restart` was not given; else `new` with the question."""
    if file.is_file() and not args.restart:
        found = read_result(file, ("question",))
        both = differences(found["question"], question)
        if both:
            raise SystemExit(f"{file}: is of another question: {both}. Give --restart or another --name.")
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    return {**new, "question": question}


def read_result(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """What an earlier run wrote. Raises: OutputError: if it cannot be read, or lacks one of `keys`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file}: cannot be read: {error}; move it away.") from error
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise OutputError(f"{file}: is no result of this benchmark, it has no {' or '.join(keys)}; move it away.")
    return found


def precision_of(args: argparse.Namespace, result: dict[str, Any], device_type: str, file: Path) -> str:
    """What `--precision` means here, once for all cells of a result: it is kept there."""
    precision = resolve_precision(args.precision, device_type)
    if result.setdefault("precision", precision) != precision:
        raise SystemExit(
            f"{file}: was measured with products in {result['precision']}, now {precision}. Give --precision "
            f"{result['precision']}, --restart or another --name."
        )
    return precision


def check_texts(*sources: str | None) -> None:
    """Opens every text before anything is computed; None and "self" are none.

    Raises: DataError: missing, empty or unreadable; two files that hold the same (calibration and evaluation); or one
        with the name of a text of `KNOWN_BYTES`, but another size.
    """
    seen: dict[str, str] = {}
    for source in sources:
        if source is None or source == "self":
            continue
        read_text(source, max_chars=1)  # of a data set the first row
        if not is_file(source):
            continue
        size, known = Path(source).stat().st_size, KNOWN_BYTES.get(Path(source).name)
        if known not in (None, size):
            raise DataError(
                f"{source}: {size:,} bytes, but the text of that name that benchmarks/README.md quotes has {known:,}: "
                "it is cut off or changed. Give the whole one, or rename what is another text."
            )
        content = file_sha256(Path(source))
        if content in seen:
            raise DataError(
                f"{source}: holds the same as {seen[content]}; measure on text that calibration does not see."
            )
        seen[content] = source


def ladder_section(levels: list[str]) -> dict[str, Any]:
    """A recipe's ladder from a command line's levels, e.g. 0.5 2:4."""
    return {
        "sparsities": [float(level) for level in levels if ":" not in level],
        "patterns": [level for level in levels if ":" in level],
    }


def add_place(parser: argparse.ArgumentParser, name: str) -> None:
    """Where a result goes."""
    parser.add_argument("--name", default=name)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and the plots")


def stamp(seed: int | None = None, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """When, where and by what code a figure was made."""
    found = {"date": datetime.date.today().isoformat(), "device": device(), "commit": commit()}
    if seed is not None:
        found["seed"] = seed
    return found | {"versions": versions(("elastic-sparsity", "torch", "transformers", "safetensors", *packages))}


def device() -> str:
    """The machine in words; cores are those that this process may use, not those that were free."""
    facts = read_facts()
    if default_device() == "cuda":
        return f"{torch.cuda.get_device_name()}, {facts.cpu}"
    return f"{facts.cpu}, {platform.machine()}, {facts.cores} cores, {facts.threads} threads, no GPU"


def commit() -> str:
    """Of the code; "-dirty" if any file but a result differs from it; empty outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", HERE.parent, *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def log(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def exit_on_error(main: Callable[[], None]) -> None:
    """Runs a script's `main`: what a user can mend becomes one line on stderr and exit code 2, as in the command."""
    try:
        main()
    except ElasticSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
