"""What is wrong with a recipe, field by field."""

import difflib
from typing import Any

from pydantic import BaseModel

from elastic_sparsity.errors import brief


def _section_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    section = root
    for part in location:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(section.model_fields)


def explain(problem: dict[str, Any], root: type[BaseModel]) -> str:
    """One of pydantic's problems in the words of a recipe; for an unknown key the nearest of the section in `root`."""
    location = tuple(problem["loc"])
    field = ".".join(str(part) for part in location if not str(part).startswith(("tuple[", "constrained-", "int")))
    if problem["type"] == "extra_forbidden":
        known = _section_keys(location[:-1], root)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
        return f"{field}: unknown key; {hint}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"{field}: missing; every recipe must say it."
    return f"{field}: {problem['msg']}, found {brief(problem['input'])}."
