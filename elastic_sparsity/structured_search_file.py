"""Where a search of heads and channels stands: a JSON file beside the output, which goes when the output is there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from elastic_sparsity.errors import OutputError, brief
from elastic_sparsity.files import write_json

MAX_BYTES = 16 << 20


class SearchState(BaseModel):
    """What is known after a step.

    Attributes:
        made: of which model, text and settings; alike for every step of one search.
        equal: loss of equal counts, by the key/value heads that every block keeps.
        kept: units of every branch, of the best counts so far.
        losses, curvature, stalled: of the descent, see `descent.Descended`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal["elastic-sparsity-structured-search"] = "elastic-sparsity-structured-search"
    format_version: Literal[1] = 1
    made: dict[str, Any]
    equal: dict[str, FiniteFloat]
    kept: list[int]
    losses: list[FiniteFloat] = Field(min_length=1)
    curvature: FiniteFloat = 0.0
    stalled: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class SearchFile:
    """The file of one search, and what the search is."""

    path: Path
    made: dict[str, Any]

    def load(self) -> SearchState | None:
        """What an interrupted search left; None if there is no file.

        Raises: OutputError: of another search, no such file, or damaged.
        """
        if not self.path.exists():
            return None
        try:
            if not self.path.is_file() or self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"no file of at most {MAX_BYTES} bytes")
            state = SearchState.model_validate(json.loads(self.path.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise self.damaged(brief(error.errors(include_url=False)[0]["msg"])) from None
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged(brief(error)) from None
        made = json.loads(json.dumps(self.made))
        other = sorted(key for key in made.keys() | state.made.keys() if made.get(key) != state.made.get(key))
        if other:
            raise OutputError(
                f"{self.path}: holds an unfinished search of other settings ({brief(', '.join(other))}); delete it, "
                "which loses that search alone, or name another output."
            )
        return state

    def damaged(self, why: str) -> OutputError:
        """The error of a file that cannot be gone on from."""
        return OutputError(f"{self.path}: holds no search that can go on: {why}; delete it or name another output.")

    def save(self, state: SearchState) -> None:
        """Raises: OutputError: it cannot be written."""
        write_json(self.path, state.model_dump())
