"""The quality that a run measured of its checkpoint, as elastic_config.json records it, and what of it is missing.

Each level's rows are recorded when they are there, so that whatever ends a run later loses none of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.config import Recipe
from elastic_sparsity.errors import CheckpointError, OutputError, brief
from elastic_sparsity.files import is_file
from elastic_sparsity.ladder import AnyLevel, StructuredLevel
from elastic_sparsity.manifest import CONFIG_NAME
from elastic_sparsity.run_folder import is_unfinished

DENSE, ELASTIC = "dense", "elastic"
Row = dict[str, Any]
Cell = tuple[str, str]
"""A row's level and method."""


@dataclass(frozen=True, slots=True)
class QualityRecord:
    """A checkpoint's measured quality: what on, the rows, and why baselines have none."""

    protocol: Any
    rows: dict[Cell, Row]
    left_out: dict[Cell, str]

    def has(self, cell: Cell) -> bool:
        """Whether nothing is left to measure there."""
        return cell in self.rows or cell in self.left_out

    def in_order(self, cells: Sequence[Cell]) -> list[Row]:
        """The rows that there are of some cells."""
        return [self.rows[cell] for cell in cells if cell in self.rows]

    def as_json(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """The record's field "quality". Args: cells: whose rows, in their order."""
        plain: dict[str, Any] = {"protocol": self.protocol, "rows": self.in_order(cells)}
        if self.left_out:
            plain["left_out"] = [
                {"level": level, "method": method, "error": error} for (level, method), error in self.left_out.items()
            ]
        return plain


def recorded_quality(checkpoint: ElasticCheckpoint) -> QualityRecord:
    """What a checkpoint says of its quality, as far as it can be understood: anybody may have written it."""
    quality = checkpoint.config.get("quality")
    quality = quality if isinstance(quality, dict) else {}

    def by_cell(key: str, is_whole: Callable[[Row], bool]) -> dict[Cell, Row]:
        rows = quality.get(key)
        rows = [x for x in rows if isinstance(x, dict)] if isinstance(rows, list) else []
        named = [x for x in rows if isinstance(x.get("level"), str) and isinstance(x.get("method"), str)]
        return {(x["level"], x["method"]): x for x in named if is_whole(x)}

    def is_measured(row: Row) -> bool:
        kl = row.get("kl", "")
        return (
            isinstance(row.get("perplexity"), float)
            and (kl is None or isinstance(kl, float))
            and type(row.get("bytes")) is int
        )

    left_out = by_cell("left_out", lambda row: isinstance(row.get("error"), str))
    return QualityRecord(
        quality.get("protocol"), by_cell("rows", is_measured), {cell: x["error"] for cell, x in left_out.items()}
    )


def cells_of(recipe: Recipe, levels: Sequence[AnyLevel]) -> list[Cell]:
    """What a recipe wants measured, in the order of the table. The dense model is asked for with every level."""
    cells = [(DENSE, DENSE)]
    for level in levels:
        baselines = () if isinstance(level, StructuredLevel) else recipe.evaluation.baselines  # which make masks
        cells += [(level.name, method) for method in (ELASTIC, *baselines)]
    return list(dict.fromkeys(cells))


def measures_quality(recipe: Recipe) -> bool:
    """Whether a run of the recipe has a text to measure on."""
    return recipe.evaluation.source is not None or recipe.calibration.source == "self"


def unmeasured(recipe: Recipe, output: Path) -> ElasticCheckpoint | None:
    """The finished checkpoint of this very recipe at `output`, if quality that the recipe asks for is not recorded.

    None if there is nothing to go on with: no such checkpoint, an unfinished run, or all is recorded.
    """
    if not is_file(output / CONFIG_NAME) or is_unfinished(output) or not measures_quality(recipe):
        return None
    try:
        checkpoint = ElasticCheckpoint(output)
    except CheckpointError:
        return None
    own = recipe.model_dump(mode="json", exclude={"memory"})  # as a run records it; memory changes no result
    if checkpoint.config.get("recipe") != json.loads(json.dumps(own)):
        return None
    levels, record = checkpoint.manifest.levels(), recorded_quality(checkpoint)
    is_open = any(not record.has(cell) for cell in cells_of(recipe, levels))
    return checkpoint if is_open and all(map(checkpoint.is_complete, levels)) else None


def check_same(checkpoint: ElasticCheckpoint, base_sha256: str, calibration_sha256: str) -> None:
    """Raises: OutputError: unless a checkpoint was made of this model and of these samples."""
    for section, key, found in (
        ("base_model", "sha256", base_sha256),
        ("data", "calibration_sha256", calibration_sha256),
    ):
        recorded = checkpoint.config.get(section)
        known = recorded.get(key) if isinstance(recorded, dict) else None
        if known != found:
            raise OutputError(
                f"{checkpoint.folder}: holds this recipe's checkpoint without all its quality, but {section}.{key} is "
                f"{found[:12]}... now and was {brief(known)}: put model and text back as they were to have it "
                "measured, or name another output."
            )
