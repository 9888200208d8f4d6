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

from elastic_sparsity.doctor import read_facts
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.pipeline import versions
from elastic_sparsity.precision import default_device

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def question_of(args: argparse.Namespace, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that a figure depends on; of files only the names."""
    places = ("name", "restart", "results")
    question = {name: value for name, value in vars(args).items() if name not in (*left_out, *places)}
    return question | {name: Path(question[name]).name for name in ("calibration", "evaluation")}


def begin(args: argparse.Namespace, file: Path, question: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The result so far, if it is of the same question and `--restart` was not given; else `new` with the question."""
    if file.is_file() and not args.restart:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        asked = found.get("question", {})
        differing = [key for key in {**asked, **question} if asked.get(key) != question.get(key)]
        if differing:
            both = "; ".join(f"{key}: {asked.get(key)}, now {question.get(key)}" for key in differing)
            raise SystemExit(f"{file}: is of another question: {both}. Give --restart or another --name.")
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    return {**new, "question": question}


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
    if default_device() == "cuda":
        return f"{torch.cuda.get_device_name()}, {read_facts().cpu}"
    return f"{read_facts().cpu}, {platform.machine()}, {torch.get_num_threads()} threads, no GPU"


def commit() -> str:
    """Of the code; "-dirty" if any file but a result differs from it; empty outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", HERE.parent, *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def log(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an error that the user can mend is one line, not a traceback."""
    try:
        main()
    except ElasticSparsityError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
