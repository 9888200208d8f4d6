"""A device profile: what `bench` measured on one device, as strict JSON, and what follows for other checkpoints.

The model of a decoded token is one line: seconds = linears * overhead_s + bytes of weights read / bytes_per_s, both
numbers for each way (see ways.py). It knows no cache, no batch and no long context. A profile of kind "estimate" holds
these numbers from published figures and no measurement; whoever shows what follows from it says so.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import LevelError, ProfileError, brief
from elastic_sparsity.files import is_file, write_json
from elastic_sparsity.ladder import AnyLevel
from elastic_sparsity.ways import Way, streamed_bytes

FORMAT = "elastic_sparsity.device_profile"
FORMAT_VERSION = 1
MAX_PROFILE_BYTES = 16_000_000
HOW = {"measured": "measured", "predicted": "predicted", "estimate": "estimate, not measured"}

Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x1f\x7f]*$")]  # it goes to terminals
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0.0, le=1e18, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class DeviceEntry(_Strict):
    """Where the profile was made, or what it stands for."""

    kind: Literal["cpu", "cuda"]
    model: Text
    architecture: Text
    features: Annotated[list[Text], Field(max_length=100)] | None
    """None = unknown."""
    threads: Positive
    memory_bytes: Positive
    torch: Text
    instruction_path: Text | None
    """Kernel of the packed runtime; None = there is none."""


class WayEntry(_Strict):
    """The line of one way."""

    runtime: Literal["dense", "packed", "semi_structured"]
    dtype: Literal["float32", "bfloat16", "float16"]
    overhead_s: Seconds
    """Seconds a linear and token that do not depend on bytes, with all the rest of the model shared out on them."""
    bytes_per_s: Above
    """Weight bytes as this way stores them, read and multiplied in a second."""
    fit_error: Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)] | None
    """Largest error of the line on the measurements, relative; None = nothing was measured."""

    @property
    def way(self) -> Way:
        return Way(runtime=self.runtime, dtype=self.dtype)


class DecodeEntry(_Strict):
    """One batch size: seconds for one token in every sequence, and how many times faster than the best dense way."""

    batch: Positive
    step_s: Seconds
    speedup: Above


class PrefillEntry(_Strict):
    """The prompt at batch 1."""

    tokens_per_s: Above
    speedup: Above


class Measurement(_Strict):
    """One way at one level, end to end."""

    checkpoint_id: Text
    level: Text
    way: Text
    disk_bytes: Count
    """Tensor files read to load it."""
    resident_bytes: Count
    """Weights in memory."""
    streamed_bytes: Positive
    """Weights read for a token."""
    linears: Positive
    prefill: PrefillEntry
    decode: list[DecodeEntry] = Field(min_length=1, max_length=64)


class ShapeEntry(_Strict):
    """One linear of a shape, on so many tokens: seconds a call, the model's linears of that shape in turn."""

    outputs: Positive
    inputs: Positive
    level: Text
    way: Text
    tokens: Positive
    seconds: Seconds


class ProtocolEntry(_Strict):
    """How it was measured; times are medians over `repeats` interleaved rounds."""

    prompt: Positive
    new_tokens: Positive
    repeats: Positive


class Profile(_Strict):
    """A whole profile."""

    format: Literal["elastic_sparsity.device_profile"]
    format_version: Literal[1]
    kind: Literal["measured", "estimate"]
    name: Text
    source: Text
    """Where the numbers come from."""
    device: DeviceEntry
    protocol: ProtocolEntry | None
    ways: dict[str, WayEntry] = Field(min_length=1, max_length=64)
    measurements: list[Measurement] = Field(max_length=100_000)
    shapes: list[ShapeEntry] = Field(max_length=100_000)

    @model_validator(mode="after")
    def _consistent(self) -> "Profile":
        for name, entry in self.ways.items():
            if name != entry.way.name:
                raise ValueError(f"ways.{name}: its runtime and dtype make it {entry.way.name}")
        named = {row.way for row in self.measurements} | {row.way for row in self.shapes}
        unknown = named - self.ways.keys()
        if unknown:
            raise ValueError(f"measurements of {min(unknown)!r}, which is not under ways")
        if (self.kind == "estimate") == bool(self.measurements):
            raise ValueError("an estimate has no measurements, and a measured profile has some")
        return self

    @property
    def is_estimate(self) -> bool:
        return self.kind == "estimate"


def profile_path(name: str | Path) -> Path:
    """A profile's file, or one of the package by name ("phone").

    Raises: ProfileError: listing the package's profiles.
    """
    if isinstance(name, str | Path) and is_file(name):
        return Path(name)
    shipped = {path.stem: path for path in sorted((Path(__file__).parent / "profiles").glob("*.json"))}
    if not isinstance(name, str | Path) or str(name) not in shipped:
        raise ProfileError(
            f"device profile {brief(name, 300)}: no such file; profiles of the package: {', '.join(shipped)}. "
            "`elastic-sparsity bench` makes one of this device."
        )
    return shipped[str(name)]


def read_profile(name: str | Path) -> Profile:
    """A profile, checked before anything in it is believed.

    Args:
        name: a file, or a name of the package's profiles.
    Raises: ProfileError: naming file and field.
    """
    path = profile_path(name)
    try:
        size = path.stat().st_size
        if size > MAX_PROFILE_BYTES:
            raise ProfileError(f"{path}: {size} bytes; at most {MAX_PROFILE_BYTES} are read.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ProfileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}; make it again with `elastic-sparsity bench`.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ProfileError(f"{path}: not a device profile; `elastic-sparsity bench` makes one.")
    if raw.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"{path}: format version {raw.get('format_version')!r:.40}; this release reads {FORMAT_VERSION}. "
            "Upgrade elastic-sparsity or make the profile again."
        )
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "profile"
        raise ProfileError(f"{path}: missing or malformed field {where}: {first['msg']}.") from None


def write_profile(profile: Profile, path: Path) -> None:
    """Raises: OutputError."""
    write_json(path, profile.model_dump())


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one token costs at batch 1.

    Attributes:
        how: "measured" on this checkpoint and level, "predicted" from other measurements, or "estimate".
    """

    way: Way
    ms_per_token: float
    how: Literal["measured", "predicted", "estimate"]

    @property
    def how_text(self) -> str:
        return HOW[self.how]


def predict(profile: Profile, checkpoint: ElasticCheckpoint, level: AnyLevel, way: str) -> Prediction:
    """Milliseconds a token of one way; a measurement of the same checkpoint and level is taken as it is."""
    entry = profile.ways[way]
    for row in profile.measurements:
        if (row.checkpoint_id, row.level, row.way) == (checkpoint.manifest.checkpoint_id, level.name, way):
            for decode in row.decode:
                if decode.batch == 1:
                    return Prediction(way=entry.way, ms_per_token=1000 * decode.step_s, how="measured")
    seconds = line_seconds(entry, len(checkpoint.linears), streamed_bytes(checkpoint, level, entry.way))
    return Prediction(
        way=entry.way, ms_per_token=1000 * seconds, how="estimate" if profile.is_estimate else "predicted"
    )


def predict_fastest(profile: Profile, checkpoint: ElasticCheckpoint, level: AnyLevel) -> Prediction:
    """The way that decodes a level fastest.

    Raises: LevelError: if the profile has no way that can hold the level.
    """
    ways = [name for name, entry in profile.ways.items() if entry.way.serves(level)]
    if not ways:
        raise LevelError(f"profile {profile.name!r}: none of its ways ({', '.join(profile.ways)}) runs {level.title}.")
    return min((predict(profile, checkpoint, level, name) for name in ways), key=lambda found: found.ms_per_token)


def line_seconds(entry: WayEntry, linears: int, num_bytes: int) -> float:
    """The stated model: overhead of every linear, and bytes by bandwidth."""
    return linears * entry.overhead_s + num_bytes / entry.bytes_per_s


def fit_way(way: Way, whole: Sequence[tuple[int, int, float]], shapes: Sequence[tuple[float, float]]) -> WayEntry:
    """The line of one way from its measurements.

    The slope is that of single linears (bytes, seconds a call); what whole models need beyond it is overhead. If single
    linears give no slope, or one so steep that nothing is left, all time is put on the bytes.

    Args:
        whole: (linears, bytes read a token, seconds a token) of whole models at batch 1; at least one.
        shapes: (bytes, seconds) of single linears on one token.
    """
    seconds_per_byte = _slope(shapes)
    rest = [(seconds - num_bytes * seconds_per_byte) / linears for linears, num_bytes, seconds in whole]
    overhead = statistics.median(rest)
    if seconds_per_byte <= 0 or overhead < 0:
        seconds_per_byte = statistics.median(seconds / num_bytes for _, num_bytes, seconds in whole)
        overhead = 0.0
    line = [linears * overhead + num_bytes * seconds_per_byte for linears, num_bytes, _ in whole]
    error = max(abs(found / seconds - 1) for found, (_, _, seconds) in zip(line, whole, strict=True))
    return WayEntry.model_validate(
        {
            "runtime": way.runtime,
            "dtype": way.dtype,
            "overhead_s": overhead,
            "bytes_per_s": 1 / seconds_per_byte,
            "fit_error": error,
        }
    )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares; 0 if the points do not tell."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope
