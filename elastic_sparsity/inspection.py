"""What a checkpoint offers, from its elastic_config.json alone."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.hub import checkpoint_folder
from elastic_sparsity.ladder import AnyLevel, StructuredLevel
from elastic_sparsity.shells import LinearSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelInfo:
    """What `levels` tells of one level.

    Attributes:
        name: what to ask for.
        title: the same for people.
        sparsity: fraction of zeros over all sparsified weights, from the recorded counts; of N:M the 1 - N/M that is
            promised (there are more zeros if the recipe puts patterns within the densest level); of a structured
            level the share of these weights that is gone.
        bytes: tensor files it reads.
        available: whether they are all in this folder.
        perplexity, kl: as measured when the checkpoint was made (text in its record), None if not measured.
        structured: whether it is a smaller model, and no mask.
        key_value_heads, channels: what each of its blocks keeps, one number if all are alike; None with a mask.
        tuning_steps: of a structured level, as recorded; 0 if it was only cut and refitted.
    """

    name: str
    title: str
    sparsity: float
    bytes: int
    available: bool
    perplexity: float | None
    kl: float | None
    structured: bool = False
    key_value_heads: int | tuple[int, ...] | None = None
    channels: int | tuple[int, ...] | None = None
    tuning_steps: int = 0


def levels(path: str | Path, **hub: Any) -> list[LevelInfo]:
    """The levels of a checkpoint, densest first, with bytes and quality; structured ones last.

    Reads elastic_config.json only.

    Raises: CheckpointError.
    """
    checkpoint = ElasticCheckpoint(checkpoint_folder(path, None, **hub))
    return [level_info(checkpoint, level) for level in checkpoint.manifest.levels()]


def level_info(checkpoint: ElasticCheckpoint, level: AnyLevel) -> LevelInfo:
    """One level's row."""
    quality = checkpoint.config.get("quality")
    rows = quality.get("rows") if isinstance(quality, dict) else None
    mine = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    row: Any = next((r for r in mine if r.get("level") == level.name and r.get("method") == "elastic"), {})
    return LevelInfo(
        name=level.name,
        title=level.title,
        sparsity=_sparsity(checkpoint.linears.values(), level),
        bytes=checkpoint.bytes_of(level),
        available=checkpoint.is_complete(level),
        perplexity=_number(row.get("perplexity")),
        kl=_number(row.get("kl")),
        structured=isinstance(level, StructuredLevel),
        key_value_heads=level.key_value_heads if isinstance(level, StructuredLevel) else None,
        channels=level.channels if isinstance(level, StructuredLevel) else None,
        tuning_steps=_tuning_steps(checkpoint.config, level.name),
    )


def is_number(value: Any) -> bool:
    """Whether what anybody may have written is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _number(value: Any) -> float | None:
    """A recorded number (infinite of weights that are broken enough); None for what else a record may hold."""
    return float(value) if is_number(value) or value == math.inf else None


def _tuning_steps(config: dict[str, Any], level: str) -> int:
    """From the record of a structured level, which need not be there."""
    found: Any = config
    for key in ("structured", level, "tuning", "steps"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerType:
    """Linears of one name over all blocks, e.g. `down_proj`, or all of one block.

    Attributes:
        count: how many linears.
        weights: of all of them.
        sparsity: fraction of zeros at every level with masks, in the ladder's order.
    """

    name: str
    count: int
    weights: int
    sparsity: tuple[float, ...]


def layer_types(path: str | Path, **hub: Any) -> list[LayerType]:
    """Zeros by layer type and level.

    Raises: CheckpointError.
    """
    return _grouped(ElasticCheckpoint(checkpoint_folder(path, None, **hub)), lambda name: name.rpartition(".")[2])


def block_sparsities(path: str | Path, **hub: Any) -> list[LayerType]:
    """Zeros by block and level: what an allocation made of it. Named by the block's path, e.g. "model.layers.0".

    Raises: CheckpointError.
    """
    return _grouped(ElasticCheckpoint(checkpoint_folder(path, None, **hub)), _block_of)


def _block_of(linear: str) -> str:
    parts = linear.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _grouped(checkpoint: ElasticCheckpoint, group_of: Callable[[str], str]) -> list[LayerType]:
    types: dict[str, list[LinearSpec]] = {}
    for name, spec in checkpoint.linears.items():
        types.setdefault(group_of(name), []).append(spec)
    return [
        LayerType(
            name=name,
            count=len(specs),
            weights=sum(spec.size for spec in specs),
            sparsity=tuple(_sparsity(specs, level) for level in checkpoint.ladder.levels),
        )
        for name, specs in types.items()
    ]


def _sparsity(specs: Iterable[LinearSpec], level: AnyLevel) -> float:
    specs = list(specs)
    if isinstance(level, StructuredLevel):
        return 1 - level.weights / sum(spec.size for spec in specs)
    if level.pattern is not None:
        return level.sparsity
    return 1 - sum(spec.shape[0] * spec.kept[level.index] for spec in specs) / sum(spec.size for spec in specs)
