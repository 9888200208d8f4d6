"""What induction learned, kept in a work folder: an hour of learning is not repeated because a script was stopped.

One safetensors file a piece. Its name holds a fingerprint of its question (everything that the tensors depend on), its
metadata the question itself, the facts that belong to it, and a hash of all three; a file that does not agree is made
anew, with a line that says so.
"""

import ast
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import log, stamp
from spent import spent
from torch import Tensor

import elastic_sparsity
from elastic_sparsity.errors import CheckpointError, OutputError
from elastic_sparsity.files import atomic_file, is_file
from elastic_sparsity.tensor_file import TensorFile
from elastic_sparsity.tensor_file_writer import write_tensors

VERSION = 1  # of what a file holds
RECORD = "record"
Piece = tuple[dict[str, Tensor], dict[str, Any]]


@contextmanager
def work_folder(folder: Path | None) -> Iterator["WorkFolder"]:
    """The folder that keeps pieces; None = one that lasts as long as this run, so that rows still share them.

    Raises: OutputError: if it cannot be made.
    """
    if folder is None:
        log("no --work: what is learned serves this run only, a restart learns it again")
        with tempfile.TemporaryDirectory(prefix="induction-") as passing:
            yield WorkFolder(Path(passing))
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error}; name another --work folder.") from error
    yield WorkFolder(folder)


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Pieces by question."""

    folder: Path

    def piece(self, name: str, question: dict[str, Any], make: Callable[[], Piece]) -> Piece:
        """The tensors and facts that `make` gives, from the disk if they are there.

        Args:
            name: for people; the question decides.
            question: JSON of all that they depend on.
            make: tensors of float32, and facts, as JSON.
        Returns: tensors on the CPU; the facts, with what making them took (`spent`) and when and by what code.
        Raises: OutputError: the disk is full.
        """
        question = json.loads(json.dumps({"version": VERSION, **question}))
        path = self.folder / f"{name}-{_sha256(question)[:16]}.safetensors"
        found = _read(path, question)
        if found is not None:
            log(f"{path.name}: kept since {found[1]['date']}")
            return found
        log(f"{path.name}: made now")
        with spent() as cost:
            tensors, facts = make()
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        facts = json.loads(json.dumps({**facts, **cost, **stamp()}))
        record = {"question": question, "facts": facts, "sha256": _hash_of(tensors, question, facts)}
        with atomic_file(path) as scratch:
            write_tensors(scratch, tensors, {RECORD: json.dumps(record)})
        return tensors, facts


def _read(path: Path, question: dict[str, Any]) -> Piece | None:
    """None if there is no such file, or it does not hold what it should."""
    if not is_file(path):
        return None
    try:
        file = TensorFile(path)
        record = json.loads(file.metadata[RECORD])
        tensors, facts = {name: file.read(name) for name in file.specs}, record["facts"]
        asked, recorded = record["question"], record["sha256"]
    except (CheckpointError, KeyError, TypeError, ValueError, RecursionError) as error:
        log(f"{path}: cannot be used ({type(error).__name__}: {error}); made anew")
        return None
    if asked != question:
        log(f"{path}: answers another question; made anew")
        return None
    if recorded != _hash_of(tensors, question, facts):
        log(f"{path}: is damaged, its hash differs from the recorded one; made anew")
        return None
    return tensors, facts


def code_sha256(modules: tuple[str, ...]) -> str:
    """Of what modules of the package do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in modules:
        tree = ast.parse((Path(elastic_sparsity.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        digest.update(f"{name} {code_of(tree)}".encode())
    return digest.hexdigest()


def code_of(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    return ast.dump(tree)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _hash_of(tensors: dict[str, Tensor], question: dict[str, Any], facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(_sha256([question, facts]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
