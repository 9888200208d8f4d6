"""What a checkpoint tells of itself, as plain data for the page and the model card. Opens no tensor.

elastic_config.json's manifest is checked when it is opened; all else in it, run.json and config.json are records that
anybody may have written: whatever is not of the expected kind counts as not recorded.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.hub import is_hub_id
from elastic_sparsity.inspection import level_info
from elastic_sparsity.ladder import Level, StructuredLevel
from elastic_sparsity.manifest import RUN_NAME
from elastic_sparsity.models import PACKAGED_MODELS
from elastic_sparsity.records import (
    as_json,
    as_number,
    as_text,
    clean,
    numbers,
    protocol_texts,
    read_json,
    texts,
    value_at,
)
from elastic_sparsity.report_results import Results, read_results
from elastic_sparsity.shells import LinearSpec

MODEL_CONFIG_NAME = "config.json"  # beside elastic_config.json
_BLOCK = re.compile(r"(?:.*?\.)??(\d{1,6})\.(.+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelFacts:
    """One level, from the manifest.

    Attributes:
        sparsity: share of zeros; of N:M the promised one, a lower bound.
        bytes: of the tensor files it reads.
        alone_bytes: of one file with this level only, merged, as a bitmask and kept values; computed, not measured.
        available: whether its files are in this folder.
        is_structured: whether it is a smaller model; `sparsity` is then the share that is gone.
    """

    name: str
    title: str
    sparsity: float
    is_pattern: bool
    bytes: int
    alone_bytes: int
    available: bool
    is_structured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured row: any method at any level. None = not measured; may be infinite or NaN, as it was found."""

    level: str
    method: str
    perplexity: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What run.json tells; None = not recorded."""

    seconds: float | None
    peak_bytes: float | None
    workers: float | None
    traffic_bytes: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A checkpoint for people. All texts are free of control characters, but not escaped for any format.

    Attributes:
        name: of the folder or repository.
        base_hub_id: the base model on the Hub, if it is known to be there.
        license: of the base model, as the Hub spells it; None = not recorded.
        total_bytes: of all levels with masks.
        dense_bytes: of one dense copy in the checkpoint's dtype; computed.
        structured: levels that are smaller models, least removed first.
        figures: in the order of the record.
        protocol: what the figures were measured on: (what, value).
        types, blocks: of the linears: names within a block, and numbers of the blocks.
        zeros: share of zeros by level (ladder's order), type and block; None where there is no such linear.
        block_losses: by level (`loss_levels`' order) and block, at the end of the block's training; empty = none.
        end_to_end_kl: by level, at the end of training; empty = none.
        recipe: every setting, "section.field" and value.
        run: None if there is no run.json that can be read.
        results: measured later, from files beside the checkpoint.
    """

    name: str
    checkpoint_id: str
    base_id: str | None
    base_sha256: str | None
    base_hub_id: str | None
    license: str | None
    model_type: str | None
    dtype: str
    adapter_dtype: str
    ranks: tuple[int, ...]
    inheritance: str
    num_linears: int
    num_weights: int
    total_bytes: int
    dense_bytes: int
    levels: tuple[LevelFacts, ...]
    structured: tuple[LevelFacts, ...]
    figures: tuple[Figure, ...]
    protocol: tuple[tuple[str, str], ...]
    types: tuple[str, ...]
    blocks: tuple[int, ...]
    zeros: tuple[tuple[tuple[float | None, ...], ...], ...]
    loss_levels: tuple[str, ...]
    block_losses: tuple[tuple[float | None, ...], ...]
    end_to_end_kl: tuple[tuple[str, float], ...]
    calibration: tuple[tuple[str, str], ...]
    seed: str | None
    precision: str | None
    trainable: str | None
    versions: tuple[tuple[str, str], ...]
    recipe: tuple[tuple[str, str], ...]
    run: Run | None
    results: Results

    @property
    def methods(self) -> list[str]:
        """Methods with a figure, "elastic" first; the dense model is none."""
        found = list(dict.fromkeys(row.method for row in self.figures if row.method != "dense"))
        return sorted(found, key=lambda method: method != "elastic")

    def figure(self, level: str, method: str) -> Figure | None:
        """The first row of a level and method, None if it was not measured."""
        return next((row for row in self.figures if (row.level, row.method) == (level, method)), None)


def read_facts(checkpoint: ElasticCheckpoint, name: str, results: Sequence[str | Path] = ()) -> Facts:
    """Everything a report shows of a checkpoint.

    Args:
        name: what to call it.
        results: files that `eval --output` wrote about it or its base model.
    Raises: ConfigError: as `read_results`.
    """
    config, manifest = checkpoint.config, checkpoint.manifest
    base_id, base_sha256 = (as_text(value_at(config, "base_model", key)) for key in ("id", "sha256"))
    model_config = read_json(checkpoint.folder / MODEL_CONFIG_NAME)
    packaged = PACKAGED_MODELS.get(base_id or "")
    model_license = value_at(model_config, "license")
    if not (isinstance(model_license, str) and _LICENSE.fullmatch(model_license)):
        model_license = packaged.license if packaged else None
    types, blocks, zeros = _zeros(checkpoint)
    loss_levels, block_losses = _block_losses(value_at(config, "training", "block_losses"))
    sizes = [spec.size for spec in checkpoint.linears.values()]
    shared_bytes = sum(entry.bytes for entry in manifest.files["shared"])
    structured = tuple(_structured_level(checkpoint, level) for level in checkpoint.structured)
    return Facts(
        name=clean(name) or "checkpoint",
        checkpoint_id=clean(manifest.checkpoint_id),
        base_id=base_id,
        base_sha256=base_sha256,
        base_hub_id=packaged.hub_id if packaged else _hub_id(base_id),
        license=model_license,
        model_type=as_text(value_at(model_config, "model_type")),
        dtype=manifest.dtype,
        adapter_dtype=manifest.adapter_dtype,
        ranks=tuple(manifest.ranks),
        inheritance=manifest.inheritance,
        num_linears=len(sizes),
        num_weights=sum(sizes),
        total_bytes=checkpoint.total_bytes() - sum(level.bytes - shared_bytes for level in structured),
        dense_bytes=sum(sizes) * checkpoint.dtype.itemsize + shared_bytes,
        levels=tuple(_level(checkpoint, level, shared_bytes) for level in checkpoint.ladder.levels),
        structured=structured,
        figures=tuple(_figures(value_at(config, "quality", "rows"))),
        protocol=tuple(protocol_texts(value_at(config, "quality", "protocol"))),
        types=types,
        blocks=blocks,
        zeros=zeros,
        loss_levels=loss_levels,
        block_losses=block_losses,
        end_to_end_kl=tuple(numbers(value_at(config, "training", "end_to_end_kl"))),
        calibration=tuple(_calibration(config)),
        seed=as_text(value_at(config, "recipe", "seed")),
        precision=as_text(value_at(config, "resolved", "precision")),
        trainable=as_text(value_at(config, "resolved", "trainable")),
        versions=tuple(texts(config.get("versions"))),
        recipe=tuple(_settings(config.get("recipe"))),
        run=_run(read_json(checkpoint.folder / RUN_NAME)),
        results=read_results(
            results,
            [level.name for level in manifest.levels()],
            manifest.checkpoint_id,
            value_at(config, "base_model", "sha256"),
        ),
    )


def _level(checkpoint: ElasticCheckpoint, level: Level, shared_bytes: int) -> LevelFacts:
    info = level_info(checkpoint, level)
    specs = checkpoint.linears.values()
    kept = sum(round(_kept_share(spec, level) * spec.size) for spec in specs)
    masks = sum(-(-spec.size // 8) for spec in specs)
    return LevelFacts(
        name=level.name,
        title=level.title,
        sparsity=info.sparsity,
        is_pattern=level.pattern is not None,
        bytes=info.bytes,
        alone_bytes=kept * checkpoint.dtype.itemsize + masks + shared_bytes,
        available=info.available,
    )


def _structured_level(checkpoint: ElasticCheckpoint, level: StructuredLevel) -> LevelFacts:
    info = level_info(checkpoint, level)
    return LevelFacts(
        name=level.name,
        title=level.title,
        sparsity=info.sparsity,
        is_pattern=False,
        bytes=info.bytes,
        alone_bytes=info.bytes,
        available=info.available,
        is_structured=True,
    )


def _kept_share(spec: LinearSpec, level: Level) -> float:
    return 1 - level.sparsity if level.pattern else spec.kept[level.index] / spec.shape[1]


def _zeros(
    checkpoint: ElasticCheckpoint,
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[tuple[tuple[float | None, ...], ...], ...]]:
    """Types, blocks, and the zeros by level, type and block."""
    found: dict[str, dict[int, LinearSpec]] = {}
    for name, spec in checkpoint.linears.items():
        match = _BLOCK.fullmatch(name)
        kind, block = (match[2], int(match[1])) if match else (name, 0)
        found.setdefault(kind, {})[block] = spec
    blocks = tuple(sorted({block for specs in found.values() for block in specs}))

    def share(spec: LinearSpec | None, level: Level) -> float | None:
        return None if spec is None else 1 - _kept_share(spec, level)

    zeros = tuple(
        tuple(tuple(share(specs.get(block), level) for block in blocks) for specs in found.values())
        for level in checkpoint.ladder.levels
    )
    return tuple(found), blocks, zeros


def _figures(rows: Any) -> Iterable[Figure]:
    for row in rows if isinstance(rows, list) else []:
        level, method = as_text(value_at(row, "level")), as_text(value_at(row, "method"))
        if level is not None and method is not None:
            kl = None if method == "dense" else as_number(value_at(row, "kl"))  # it would be 0 by definition
            yield Figure(level=level, method=method, perplexity=as_number(value_at(row, "perplexity")), kl=kl)


def _calibration(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Where the text came from (of a path only the name: who made it needs no reader), how much, and its hash."""
    source = as_text(value_at(config, "recipe", "calibration", "source"))
    if source is not None:
        name = "sampled from the base model itself" if source == "self" else re.split(r"[\\/]", source)[-1] or source
        share = as_number(value_at(config, "recipe", "calibration", "self_share")) or 0.0
        samples = as_number(value_at(config, "recipe", "calibration", "samples")) or 0.0
        if source != "self" and 0 < share < 1 and 0 < samples < 2**31:
            name += f"; {round(share * samples):,} of {samples:,.0f} samples written by the base model"
        yield "text", name
    tokens = as_number(value_at(config, "data", "calibration_tokens"))
    if tokens is not None and math.isfinite(tokens):
        yield "tokens", f"{tokens:,.0f}"
    digest = as_text(value_at(config, "data", "calibration_sha256"))
    if digest is not None:
        yield "sha256 of the tokens", digest


def _block_losses(losses: Any) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    rows = [row for row in losses if isinstance(row, dict)] if isinstance(losses, list) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: tuple(as_number(row.get(name)) for row in rows) for name in names}
    known = {name: row for name, row in table.items() if any(x is not None and math.isfinite(x) for x in row)}
    return tuple(clean(name) for name in known), tuple(known.values())


def _settings(recipe: Any) -> Iterable[tuple[str, str]]:
    for section, fields in recipe.items() if isinstance(recipe, dict) else []:
        for field, value in fields.items() if isinstance(fields, dict) else [("", fields)]:
            text = "none" if value is None else value if isinstance(value, str) else as_json(value)
            yield clean(f"{section}.{field}".rstrip(".")), clean(text)


def _run(record: Any) -> Run | None:
    if not isinstance(record, dict):
        return None
    names = ("seconds", "peak_bytes", "workers", "traffic_bytes")
    found = {name: as_number(record.get(name)) for name in names}
    return Run(**{name: value if value is not None and math.isfinite(value) else None for name, value in found.items()})


def _hub_id(base_id: str | None) -> str | None:
    """The id, if it is written as the Hub's and is no folder or file here."""
    if base_id is None or not _HUB_ID.fullmatch(base_id) or base_id.endswith(".gguf"):
        return None
    return base_id if is_hub_id(base_id) else None
