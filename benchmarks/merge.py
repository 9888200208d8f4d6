"""Joins results of one benchmark that were measured side by side, in processes or on machines of their own.

    python benchmarks/allocation.py search.json ... --methods wanda --name allocation-a
    python benchmarks/allocation.py search.json ... --methods sparsegpt --name allocation-b
    python benchmarks/merge.py allocation-a allocation-b --name allocation

Only results of the same question are joined. What stands in two of them must be the same figure there: the first one's
stamp stays. Tables are left out; the benchmark's own script, started again under the new name, finds all cells there,
and prints and draws.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from cells import add_place, differences, exit_on_error, log, read_result

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.files import write_json

DERIVED = ("table", "summary")
STAMPS = ("date", "device", "commit", "versions", "dense_stamp")  # of the first that has it
FIGURES = ("perplexity", "kl", "value", "sha256")  # what has to agree in a cell, or a task's score, that two hold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", help="names in --results, or files")
    add_place(parser, "merged")
    args = parser.parse_args()
    target = args.results / f"{args.name}.json"
    files = [Path(part) if part.endswith(".json") else args.results / f"{part}.json" for part in args.parts]
    if target.is_file() and target.resolve() not in {file.resolve() for file in files}:
        raise ConfigError(f"{target}: is there already and none of the parts; name it among them, or move it away.")
    merged: dict[str, Any] = {}
    for file in files:
        merged = joined(merged, read_result(file, ("question",)), file)
    write_json(target, merged)
    log(f"{target}: {len(merged.get('cells', {}))} cells of {len(files)} results")


def joined(first: dict[str, Any], second: dict[str, Any], file: Path) -> dict[str, Any]:
    """`first` with what `second` adds.

    Raises: ConfigError: if they are of different questions, or disagree in a figure.
    """
    both = differences(first.get("question", second["question"]), second["question"])
    if both:
        raise ConfigError(f"{file}: is of another question: {both}. Only results of one question can be joined.")
    found = {key: value for key, value in first.items() if key not in DERIVED}
    for key, value in second.items():
        there = found.get(key)
        if key in DERIVED or value is None:
            continue
        if there is None:
            found[key] = value
        elif key in STAMPS or same(there, value):
            continue
        elif isinstance(there, dict) and isinstance(value, dict):
            found[key] = there | {name: entry_of(there.get(name), value[name], f"{file}: {key}: {name}")
                                  for name in value}  # fmt: skip
        else:
            raise ConfigError(
                f"{file}: {key}: is {brief(value)}, before it was {brief(there)}; measure one of them anew."
            )
    return found


def entry_of(there: Any, new: Any, where: str) -> Any:
    """One of two entries of the same name, if they agree; what one has more (tasks, say) stays.

    Raises: ConfigError: if they do not agree.
    """
    if there is None or same(there, new):
        return new if there is None else there
    if not (isinstance(there, dict) and isinstance(new, dict)):
        raise ConfigError(f"{where}: is {brief(new)}, before it was {brief(there)}; measure one of them anew.")
    for figure in FIGURES:
        if figure in there and figure in new and not same(there[figure], new[figure]):
            raise ConfigError(
                f"{where}: {figure} is {new[figure]}, before it was {there[figure]}; measure one of them anew."
            )
    check_failures(there, new, where)
    deeper = {key: new[key] | there[key] for key in there
              if isinstance(there[key], dict) and isinstance(new.get(key), dict) and key not in STAMPS}  # fmt: skip
    if "tasks" in deeper:
        old = there["tasks"]
        deeper["tasks"] = old | {name: entry_of(old.get(name), score, f"{where}: {name}")
                                 for name, score in new["tasks"].items()}  # fmt: skip
    return new | there | deeper


def check_failures(there: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises: ConfigError: if one of two cells has a figure where the other failed."""
    failed = [where] if ("failure" in there) != ("failure" in new) else []
    for one, other in ((there, new), (new, there)):
        failed += [f"{where}: {name}" for name in one.get("tasks", {}) if name in other.get("task_failures", {})]
    if failed:
        raise ConfigError(f"{failed[0]}: failed in one result and has a figure in another; measure one of them anew.")


def same(a: Any, b: Any) -> bool:
    """Equal; numbers up to what a sum in another order makes."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":
    exit_on_error(main)
