"""Ways to run a level: runtime x dtype, and the bytes each one reads a token. Counts from the manifest; no model.

A *way* is what a user chooses when loading: "dense" (zeros stored), "packed" (one bit a position and the kept values)
or "semi_structured" (the 2:4 layout of torch on a GPU), each in one dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.ladder import AnyLevel, Level, StructuredLevel
from elastic_sparsity.packed_weight import SLACK
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.semi_structured import TILES, fits_kernel
from elastic_sparsity.shells import LinearSpec

RUNTIMES = DENSE, PACKED, SEMI_STRUCTURED = ("dense", "packed", "semi_structured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a level runs.

    Attributes:
        runtime: one of RUNTIMES.
        dtype: of the model, by name.
    """

    runtime: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.dtype}"

    def serves(self, level: AnyLevel) -> bool:
        """Whether this way can hold the level's zeros at all (a structured one has none and is dense). See `misfit`."""
        if isinstance(level, StructuredLevel):
            return self.runtime == DENSE
        return self.runtime != SEMI_STRUCTURED or level.pattern == (2, 4)


def misfit(linears: Mapping[str, LinearSpec], way: Way) -> str | None:
    """Why a way cannot run a checkpoint's linears, at whatever level; None if it can."""
    if way.runtime == PACKED and way.dtype == "float16":
        return "packed has no float16"
    if way.runtime != SEMI_STRUCTURED:
        return None
    dtype = DTYPES[way.dtype]
    for name, spec in linears.items():
        if spec.transposed:
            return f"{name} is stored transposed, as GPT-2's are, which 2:4 products do not take"
        if not fits_kernel(spec.shape, dtype):
            return f"{name} is {spec.shape} in {way.dtype}; 2:4 products take multiples of {TILES.get(dtype, 'none')}"
    return None


def streamed_bytes(checkpoint: ElasticCheckpoint, level: AnyLevel, way: Way) -> int:
    """Bytes of weights that one decoded token reads: the sparsified linears as the way stores them, all else dense.

    Everything outside the linears is counted, so also the rows of an untied embedding table that no token asks for.
    """
    shared = sum(entry.bytes for entry in checkpoint.manifest.files["shared"]) // checkpoint.dtype.itemsize
    if isinstance(level, StructuredLevel):
        return (shared + level.weights) * DTYPES[way.dtype].itemsize
    linears = sum(linear_bytes(spec, level, way) for spec in checkpoint.linears.values())
    return shared * DTYPES[way.dtype].itemsize + linears


def linear_bytes(spec: LinearSpec, level: Level, way: Way) -> int:
    """Bytes of one linear's weight at a level, as the way stores it."""
    item = DTYPES[way.dtype].itemsize
    if way.runtime == DENSE:
        return spec.size * item
    if way.runtime == SEMI_STRUCTURED:  # half of the values, and two bits for the place of each
        return spec.size * item // 2 + spec.size // 8
    if level.pattern is None:
        kept = spec.shape[0] * spec.kept[level.index]
    else:
        kept = spec.size * level.pattern[0] // level.pattern[1]
    rows, width = spec.shape
    return rows * -(-width // 64) * 8 + (rows + 1) * 8 + (kept + SLACK) * item  # as PackedWeight holds it
