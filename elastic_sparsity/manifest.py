"""elastic_config.json: its fields, checked before anything is believed or allocated. Plain data only."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elastic_sparsity.errors import CheckpointError, ElasticSparsityError, LevelError, brief
from elastic_sparsity.ladder import (
    MAX_SPARSITIES,
    STRUCTURED,
    AnyLevel,
    Ladder,
    Level,
    StructuredLevel,
    find_structured,
)
from elastic_sparsity.shells import LinearSpec, num_shells, shell_names

FORMAT = "elastic_sparsity"
FORMAT_VERSION = 2
CONFIG_NAME = "elastic_config.json"
RUN_NAME = "run.json"  # beside it: what differs between equal runs, so no part of the checkpoint
OVERLAY_NAME = "elastic_overlay.json"  # see overlay.py
KNOWN_FEATURES: frozenset[str] = frozenset()  # what a writer may list under "requires": nothing yet
MAX_CONFIG_BYTES = 256_000_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class FileEntry(_Strict):
    """One file: its name in the folder, size, and sha256 in hexadecimal."""

    file: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _safe(self) -> "FileEntry":
        if not _FILE_NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not a plain file name")
        return self


_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Counts = _Count | Annotated[tuple[_Count, ...], Field(strict=False, min_length=1, max_length=2**16)]


class StructuredEntry(_Strict):
    fraction: float = Field(gt=0.0, lt=1.0)
    key_value_heads: _Counts
    channels: _Counts
    biases: bool
    weights: int = Field(ge=1)


class LadderEntry(_Strict):
    # No defaults here and below: a field whose key rotted must not silently become another value. (Of `structured`,
    # which the first checkpoints of this version have not, the digest tells.)
    sparsities: list[float] = Field(max_length=MAX_SPARSITIES)
    patterns: list[Annotated[str, Field(max_length=5)]] = Field(max_length=500)  # "31:32"
    group_ends: Annotated[list[float], Field(max_length=MAX_SPARSITIES)] | None
    pattern_parent: str
    structured: list[StructuredEntry] = Field(default=[], max_length=MAX_SPARSITIES)


class LinearEntry(_Strict):
    shape: tuple[int, int] = Field(strict=False)
    transposed: bool
    kept: list[int]
    pattern_values: list[int]


class Manifest(_Strict):
    """All that a reader needs. Other top-level fields (recipe, quality, ...) are records and kept as they are."""

    format: Literal["elastic_sparsity"]
    format_version: int
    requires: list[str]
    checkpoint_id: str = Field(min_length=8, max_length=128)
    ladder: LadderEntry
    ranks: list[int]
    inheritance: Literal["shared", "detached", "none"]
    dtype: Literal["float32", "bfloat16", "float16"]
    adapter_dtype: Literal["float32", "bfloat16", "float16"]
    linears: dict[str, LinearEntry] = Field(min_length=1)
    files: dict[str, Annotated[list[FileEntry], Field(min_length=1)]]
    extras: list[FileEntry]
    digest: str

    def build_ladder(self) -> Ladder:
        """Raises: ConfigError."""
        ends = self.ladder.group_ends
        return Ladder(
            sparsities=tuple(self.ladder.sparsities),
            patterns=tuple(self.ladder.patterns),
            group_ends=None if ends is None else tuple(ends),
            pattern_parent=self.ladder.pattern_parent,
        )

    def build_specs(self) -> dict[str, LinearSpec]:
        """Raises: ShapeError."""
        return {
            name: LinearSpec(
                shape=x.shape, transposed=x.transposed, kept=tuple(x.kept), pattern_values=tuple(x.pattern_values)
            )
            for name, x in self.linears.items()
        }

    def structured_levels(self) -> list[StructuredLevel]:
        """Least removed first."""
        return [StructuredLevel(**entry.model_dump()) for entry in self.ladder.structured]

    def levels(self) -> list[AnyLevel]:
        """Every level, those with masks first, in the ladder's order."""
        return [*self.build_ladder().levels, *self.structured_levels()]

    def find(self, wanted: str | float | AnyLevel) -> AnyLevel:
        """The level a user means by 0.6, "60%", "2:4" or "structured-0.5".

        Raises: LevelError: listing the levels there are.
        """
        text = wanted.name if isinstance(wanted, StructuredLevel) else wanted
        names = ", ".join(level.name for level in self.levels())
        if isinstance(text, str) and text.strip().startswith(STRUCTURED):
            found = find_structured(text, self.structured_levels())
            if found is None:
                hint = "`elastic-sparsity add-structured` adds a structured one"
                raise LevelError(f"level {brief(text)} is not in this checkpoint; it has: {names}. {hint}.")
            return found
        try:
            return self.build_ladder().find(text)
        except LevelError:
            if not self.ladder.structured:
                raise
            raise LevelError(f"level {brief(text)} is not in this checkpoint; it has: {names}.") from None

    def sections_of(self, level: AnyLevel) -> list[str]:
        """Sections a level reads: its prefix of shells, its groups' adapters, and what all levels share.

        A structured level has one section of its own instead of shells and adapters.
        """
        if isinstance(level, StructuredLevel):
            return [level.name, "shared"]
        ladder = self.build_ladder()
        shells = [f"shell-{name}" for name in shell_names(ladder)[: num_shells(ladder, level)]]
        return [*shells, *(f"adapters-{group}" for group in self.active_groups(level)), "shared"]

    def active_groups(self, level: Level) -> list[int]:
        """Adapter groups a level adds up, its own last; none of rank zero."""
        return [g for g in self.build_ladder().active_groups(level, self.inheritance) if self.ranks[g]]

    def files_of(self, level: AnyLevel) -> list[FileEntry]:
        """Every tensor file a level reads."""
        return [entry for section in self.sections_of(level) for entry in self.files[section]]


def digest(raw: Mapping[str, Any]) -> str:
    """sha256 over the fields that decide what is loaded, as JSON with sorted keys and without spaces."""
    covered = {name: raw[name] for name in Manifest.model_fields if name != "digest"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """elastic_config.json as checked fields and as the JSON it was.

    Raises: CheckpointError: naming the field; for another format, a version or a required feature not known here.
    """
    path = folder / CONFIG_NAME
    try:
        if not path.is_file():  # a pipe would block
            raise FileNotFoundError
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are read.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = " It is an overlay: `elastic-sparsity restore` it." if (folder / OVERLAY_NAME).is_file() else ""
        raise CheckpointError(f"{folder}: no elastic checkpoint here ({CONFIG_NAME} is missing).{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the config of an elastic checkpoint.")
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {raw.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
            "Upgrade elastic-sparsity or make the checkpoint again."
        )
    try:
        manifest = Manifest.model_validate(raw)
        unknown = sorted(set(manifest.requires) - KNOWN_FEATURES)
        if unknown:
            raise CheckpointError(f"{path}: needs {', '.join(unknown)}, unknown to this release; upgrade it.")
        problems = list(_problems(manifest))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: missing or malformed field {where}: {first['msg']}.") from None
    except CheckpointError:
        raise
    except (ElasticSparsityError, OverflowError) as error:
        raise CheckpointError(f"{path}: missing or malformed field: {error}") from None
    if problems:
        raise CheckpointError(f"{path}: missing or malformed field: {'; '.join(problems[:3])}.")
    if manifest.digest != digest(raw):
        raise CheckpointError(f"{path}: digest differs from the fields it covers; the file is damaged, copy it again.")
    return manifest, raw


def _problems(manifest: Manifest) -> Iterator[str]:
    ladder = manifest.build_ladder()
    if len(manifest.ranks) != ladder.num_groups or min(manifest.ranks) < 0:
        yield f"ranks: {manifest.ranks} for {ladder.num_groups} groups"
        return
    sizes = [level.pattern[1] for level in ladder.levels if level.pattern]
    for name, spec in manifest.build_specs().items():
        if not _MODULE_NAME.fullmatch(name):
            yield f"linears: {name!r} is no module name"
        if len(spec.kept) != ladder.num_unstructured or len(spec.pattern_values) != len(ladder.patterns):
            yield f"linears.{name}: counts of {len(spec.kept)} + {len(spec.pattern_values)} levels"
        elif any(spec.shape[1] % size for size in sizes):
            yield f"linears.{name}: input width {spec.shape[1]} does not fit {ladder.patterns}"
        elif spec.size > 2**48:
            yield f"linears.{name}: shape {spec.shape} is beyond any model"
    yield from _structured_problems(manifest)
    needed = dict.fromkeys(section for level in manifest.levels() for section in manifest.sections_of(level))
    for section in needed:
        if section not in manifest.files:
            yield f"files: no {section}"
    seen = [entry.file for entries in manifest.files.values() for entry in entries]
    seen += [entry.file for entry in manifest.extras]
    if len(set(seen)) < len(seen) or CONFIG_NAME in seen:
        yield "files: one name is listed twice"
    for section in needed.keys() & manifest.files.keys():
        names = [entry.file for entry in manifest.files[section]]
        if names != part_names(section, len(names)):
            yield f"files.{section}: {names[:3]} are not the names of its {len(names)} parts"
    if manifest.adapter_dtype != adapter_dtype(manifest.dtype):
        yield f"adapter_dtype: {manifest.adapter_dtype} beside {manifest.dtype}"
    for entry in manifest.extras:
        if entry.file.endswith(".safetensors"):
            yield f"extras: {entry.file!r} may not hold tensors"


def _structured_problems(manifest: Manifest) -> Iterator[str]:
    levels = manifest.structured_levels()
    if any(b.fraction - a.fraction < 1e-6 for a, b in itertools.pairwise(levels)):
        yield "ladder.structured: fractions must be strictly increasing"
    total = sum(spec.size for spec in manifest.build_specs().values())
    for level in levels:
        if level.weights > total:
            yield f"ladder.structured: {level.name} keeps {level.weights} of {total} weights"
    unknown = {name for name in manifest.files if name.startswith(STRUCTURED)} - {level.name for level in levels}
    if unknown:
        yield f"files: {min(unknown)!r:.60} is of no level in ladder.structured"


def adapter_dtype(dtype: str) -> str:
    """float32 beside float32 values, else bfloat16: float16 would underflow the small B."""
    return "float32" if dtype == "float32" else "bfloat16"


def part_names(section: str, parts: int) -> list[str]:
    """File names of a section: one, or numbered shards in the manner of transformers."""
    if parts == 1:
        return [f"{section}.safetensors"]
    return [f"{section}-{number:05d}-of-{parts:05d}.safetensors" for number in range(1, parts + 1)]


def by_density(ladder: Ladder, structured: Sequence[StructuredLevel] = ()) -> list[AnyLevel]:
    """Levels from densest to sparsest; an unstructured level before an N:M one of the same sparsity.

    Structured ones come last: at equal fractions they lose far more quality, and nobody should get one unasked.
    """
    return [*sorted(ladder.levels, key=lambda level: (level.sparsity, level.pattern is not None)), *structured]
