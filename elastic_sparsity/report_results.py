"""What `eval` measured of a checkpoint and of its base model after the run, for the report: read strictly, or refused.

A record that a checkpoint carries may be strange, and then counts as not recorded. These files are named by the user:
whatever is wrong with one is an error, so that no figure is left out in silence and none of other weights is shown.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from elastic_sparsity.errors import ConfigError, brief
from elastic_sparsity.files import is_file
from elastic_sparsity.records import MAX_JSON_BYTES, clean, protocol_texts

DENSE = "dense"  # the level that `eval` writes for a plain model
MAX_ROWS = 5000

Text = Annotated[str, Field(min_length=1), AfterValidator(clean)]
Rows = Field(max_length=MAX_ROWS)


class Row(BaseModel):
    """What every row tells besides its figures: of which level and weights, when and where."""

    model_config = ConfigDict(frozen=True, strict=True)
    level: Text
    date: date
    device: Text
    checkpoint_id: str | None = None
    weights_sha256: str | None = None


class QualityRow(Row):
    """Perplexity (infinite of weights that are broken enough), and KL to a reference if there was one."""

    perplexity: Annotated[float, Field(ge=0)]
    kl: FiniteFloat | None


class TaskRow(Row):
    """The score on one task, as `zero_shot.TaskScore` has it."""

    task: Text
    metric: Text
    value: FiniteFloat
    error: Annotated[FiniteFloat, Field(ge=0)] | None
    num_documents: Annotated[int, Field(ge=1, le=10**12)]
    sha256: Text | None = None  # of the documents; older files lack it

    @model_validator(mode="after")
    def _accuracy_is_a_share(self) -> "TaskRow":
        if self.metric.startswith("acc") and not 0 <= self.value <= 1:
            raise ValueError(f"{self.metric} {self.value} is no share")
        return self


class _ZeroShot(BaseModel):
    protocol: dict[str, Any]
    rows: Annotated[list[TaskRow], Rows]


class _File(BaseModel):
    protocol: dict[str, Any] = {}
    rows: Annotated[list[QualityRow], Rows] = []
    zero_shot: _ZeroShot | None = None


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Measured(Generic[R]):
    """Rows of one protocol, which are comparable; in the order dense, then the ladder's.

    Attributes:
        protocol: what they were measured on: (what, value).
    """

    protocol: tuple[tuple[str, str], ...]
    rows: tuple[R, ...]

    @property
    def when_and_where(self) -> str:
        """The dates and devices of all rows."""
        dates, devices = ({row.date.isoformat() for row in self.rows}, {row.device for row in self.rows})
        return f"{', '.join(sorted(dates))} on {', '.join(sorted(devices))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All that was measured later."""

    quality: tuple[Measured[QualityRow], ...] = ()
    tasks: tuple[Measured[TaskRow], ...] = ()


def read_results(
    paths: Sequence[str | Path], levels: Sequence[str], checkpoint_id: str, base_sha256: str | None
) -> Results:
    """The results in files that `elastic-sparsity eval --output` wrote about a checkpoint or its base model.

    Args:
        levels: names, in the ladder's order.
        base_sha256: of the base model's weights; None = not known, rows of a plain model are refused.
    Raises: ConfigError: missing or unreadable; a row of other weights or of a level that the ladder lacks, or without
        date or device; no rows at all; or two results of one level on one protocol.
    """
    found = [(path, _read(Path(path))) for path in paths]
    for path, file in found:
        rows: list[Row] = [*file.rows, *(file.zero_shot.rows if file.zero_shot else [])]
        if not rows:
            raise ConfigError(
                f"{path}: holds no results; `elastic-sparsity eval CHECKPOINT --output FILE` writes some."
            )
        for row in rows:
            _check_origin(path, row, levels, checkpoint_id, base_sha256)
    quality = [(file.protocol, file.rows) for _, file in found if file.rows]
    tasks = [(file.zero_shot.protocol, file.zero_shot.rows) for _, file in found if file.zero_shot]
    order = [DENSE, *levels]
    return Results(
        quality=_by_protocol(quality, order, lambda row: row.level),
        tasks=_by_protocol(tasks, order, lambda row: (row.level, row.task)),
    )


def _read(path: Path) -> _File:
    try:
        if not is_file(path):
            raise OSError("there is no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise OSError(f"{path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{path}: not what `elastic-sparsity eval --output` of this release writes: {brief(place)}: "
            f"{brief(first['msg'])}; measure again, or leave it out."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: results cannot be read: {error}.") from None


def _check_origin(
    path: str | Path, row: Row, levels: Sequence[str], checkpoint_id: str, base_sha256: str | None
) -> None:
    """Raises: ConfigError: unless the row is of a level of this checkpoint, or of the very weights it was made from."""
    if row.checkpoint_id is not None:
        if row.checkpoint_id != checkpoint_id:
            found, wanted = brief(row.checkpoint_id), brief(checkpoint_id)
            raise ConfigError(f"{path}: is about checkpoint {found}, not about this one, {wanted}; leave it out.")
        if row.level not in levels:
            raise ConfigError(f"{path}: level {brief(row.level)} is not in the ladder: {', '.join(levels)}.")
    elif row.weights_sha256 is None or row.weights_sha256 != base_sha256 or row.level != DENSE:
        raise ConfigError(
            f"{path}: {brief(row.level)} is about weights {brief(row.weights_sha256)}, neither this checkpoint nor its "
            f"base model ({brief(base_sha256)}); leave it out."
        )


def _by_protocol(
    found: Iterable[tuple[dict[str, Any], list[R]]], order: Sequence[str], key: Callable[[R], Hashable]
) -> tuple[Measured[R], ...]:
    """Rows of all files together, if they share a protocol. Raises: ConfigError: one result twice."""
    groups: dict[tuple[tuple[str, str], ...], list[R]] = {}
    for protocol, rows in found:
        groups.setdefault(tuple(protocol_texts(protocol)), []).extend(rows)
    for rows in groups.values():
        seen: set[Hashable] = set()
        for row in rows:
            if key(row) in seen:
                raise ConfigError(f"results: {brief(key(row))} is there twice on one protocol; leave a file out.")
            seen.add(key(row))
    ordered = {protocol: sorted(rows, key=lambda row: order.index(row.level)) for protocol, rows in groups.items()}
    return tuple(Measured(protocol, tuple(rows)) for protocol, rows in ordered.items() if rows)
