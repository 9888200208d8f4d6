"""Reading records that anybody may have written: what is of the expected kind, and nothing of what is not.

All texts come out on one line, not too long and without control characters, but not escaped for any format.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic_sparsity.files import is_file
from elastic_sparsity.terminal import plain

MAX_JSON_BYTES = 4_000_000
MAX_TEXT = 200


def protocol_texts(protocol: Any) -> Iterable[tuple[str, str]]:
    """What figures were measured on: (what, value)."""
    windows = value_at(protocol, "windows")
    counts = [as_number(x) for x in windows] if isinstance(windows, list) else []
    for key, value in sorted(texts(protocol), key=lambda pair: pair[0] == "sha256"):  # the long one last
        if key != "windows":
            yield key, value
        elif len(counts) == 2 and all(x is not None and math.isfinite(x) for x in counts):
            yield key, f"{counts[0]:,.0f} windows of {counts[1]:,.0f} tokens"


def read_json(path: Path) -> Any:
    """The file's value; None if it cannot be read."""
    try:
        if not is_file(path) or path.stat().st_size > MAX_JSON_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a record: what cannot be read is not recorded
        return None


def value_at(record: Any, *keys: str) -> Any:
    """A value deep in a record, None if the way there is another."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def as_number(value: Any) -> float | None:
    """A number as a float, infinite if it is too large for one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def numbers(record: Any) -> Iterable[tuple[str, float]]:
    """Keys and values of all numbers."""
    for key, value in record.items() if isinstance(record, dict) else []:
        number = as_number(value)
        if number is not None:
            yield clean(key), number


def as_text(value: Any) -> str | None:
    """A text or number, fit to be shown; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return None
    return clean(str(value))


def as_json(value: Any) -> str:
    """Any parsed JSON as text again."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "nested too deeply to be shown"


def clean(text: str) -> str:
    """One line, not too long, without control characters."""
    return plain(" ".join(text[: 4 * MAX_TEXT].split()))[:MAX_TEXT]


def texts(record: Any) -> Iterable[tuple[str, str]]:
    """Keys and values of all that can be shown; lists as JSON."""
    for key, value in record.items() if isinstance(record, dict) else []:
        text = as_text(value) if not isinstance(value, Sequence) or isinstance(value, str) else as_json(value)
        if text is not None:
            yield clean(key), clean(text)
