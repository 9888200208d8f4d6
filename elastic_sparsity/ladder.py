"""The ladder: which sparsity levels one checkpoint serves, and which adapter groups serve them. Plain numbers only.

A *level* is a mask: an unstructured sparsity (fraction of zeros a row) or an N:M pattern (N kept of every M along
the input dimension). A *group* is the low-rank adapters that serve an interval of levels (arXiv 2606.25285: groups
ordered by sparsity, each inheriting the denser ones). By default every level has a group of its own; with
`group_ends` many levels share one, e.g. EPTS's seven groups over (0, 0.7]. A *structured level* is a smaller model
and no mask, so no `Ladder` holds it: it lies beside one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from elastic_sparsity.errors import ConfigError, LevelError, brief

STRUCTURED = "structured-"  # how the name of a structured level begins
MAX_SPARSITIES = 254  # drop levels are stored as uint8 and need one value more than there are levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One row of the ladder.

    Attributes:
        index: position in the ladder; 0 is the densest, N:M patterns come last.
        name: what the user writes: "0.6" or "2:4".
        sparsity: fraction of zeros in every row (for N:M within a ladder level: a lower bound).
        pattern: (N, M) for N kept of every M along the input dimension, None for an unstructured level.
        group: the adapter group that serves this level.
    """

    index: int
    name: str
    sparsity: float
    pattern: tuple[int, int] | None
    group: int

    @property
    def title(self) -> str:
        return self.name if self.pattern else f"{100 * self.sparsity:g} %"


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredLevel:
    """A physically smaller model: whole heads and MLP channels are gone.

    Attributes:
        fraction: of the parameters of the blocks' linears that was asked to go; what went differs by whole units.
        key_value_heads, channels: what every block keeps, or what each does if they differ; a key/value head stays with
            all its query heads.
        biases: whether the branches' linears were given biases that the base model does not have (FLAP).
        weights: of all linears together, without biases, that stay.
    """

    fraction: float
    key_value_heads: int | tuple[int, ...]
    channels: int | tuple[int, ...]
    biases: bool
    weights: int

    @property
    def name(self) -> str:
        return structured_name(self.fraction)

    @property
    def title(self) -> str:
        return f"structured {100 * self.fraction:g} %"

    def counts(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Key/value heads and channels of every block.

        Raises: LevelError: it has counts of another number of blocks.
        """
        both = tuple(
            (found,) * num_blocks if isinstance(found, int) else found
            for found in (self.key_value_heads, self.channels)
        )
        if any(len(found) != num_blocks for found in both):
            raise LevelError(
                f"level {self.name}: found counts of {max(map(len, both))} blocks, but the model has {num_blocks}."
            )
        return both[0], both[1]


AnyLevel = Level | StructuredLevel


def structured_name(fraction: float) -> str:
    """Of the structured level of a fraction."""
    return f"{STRUCTURED}{float(fraction)!r}"


def find_structured(wanted: str, levels: Sequence[StructuredLevel]) -> StructuredLevel | None:
    """The structured level a user means by "structured-0.5" or "structured-50%"; None = there is none."""
    text = wanted.strip().replace(" ", "").removeprefix(STRUCTURED)
    return next((level for level in levels if _same_rate(text, level.fraction)), None)


def parse_pattern(text: str) -> tuple[int, int]:
    """(N, M) from "N:M".

    Raises: ConfigError: unless 1 <= N < M <= 32.
    """
    kept, _, group_size = text.partition(":")
    plain = len(text) < 10 and text.isascii() and kept.isdecimal() and group_size.isdecimal()
    if not (plain and 1 <= int(kept) < int(group_size) <= 32):
        raise ConfigError(f"ladder.patterns: {text!r} is not an N:M pattern; write e.g. '2:4' (1 <= N < M <= 32).")
    return int(kept), int(group_size)


def keep_count(width: int, sparsity: float) -> int:
    """Weights kept in a row of `width` inputs: round-half-up of width * (1 - sparsity), at least one."""
    return max(1, int(width * (1.0 - sparsity) + 0.5 + 1e-9))


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Increasing unstructured sparsities, then N:M patterns.

    Args:
        sparsities: strictly increasing, each in [0, 1).
        patterns: "N:M" strings.
        group_ends: upper sparsity bound of each adapter group (inclusive); None = one group a level.
        pattern_parent: which unstructured group an N:M level's group inherits: "densest", "all" or "none".

    Raises: ConfigError: naming the field.
    """

    sparsities: tuple[float, ...]
    patterns: tuple[str, ...] = ()
    group_ends: tuple[float, ...] | None = None
    pattern_parent: str = "densest"

    def __post_init__(self) -> None:
        rates = self.sparsities
        if not rates and not self.patterns:
            raise ConfigError("ladder: no levels; name at least one sparsity (e.g. 0.5) or pattern (e.g. '2:4').")
        if any(not 0.0 <= s < 1.0 for s in rates) or not _increasing(rates, gap=1e-6):
            raise ConfigError(f"ladder.sparsities: {list(rates)} must be strictly increasing within [0, 1).")
        if len(rates) > MAX_SPARSITIES:
            raise ConfigError(f"ladder.sparsities: {len(rates)} levels; at most {MAX_SPARSITIES} fit in one ladder.")
        if len(set(self.patterns)) < len(self.patterns):
            raise ConfigError(f"ladder.patterns: {list(self.patterns)} names a pattern twice.")
        for pattern in self.patterns:
            parse_pattern(pattern)
        ends = self.group_ends
        if ends is not None and (not rates or not ends or not _increasing(ends) or not ends[-1] >= rates[-1]):
            raise ConfigError(
                f"ladder.group_ends: {list(ends)} must be strictly increasing and reach the sparsest level "
                f"({rates[-1] if rates else 'no unstructured level'})."
            )
        empty = [end for group, end in enumerate(ends or ()) if not self.levels_of(group)]
        if empty:
            raise ConfigError(f"ladder.group_ends: the groups that end at {empty} serve no level; merge them.")
        if self.pattern_parent not in ("densest", "all", "none"):
            raise ConfigError(f"ladder.pattern_parent: {self.pattern_parent!r} is not 'densest', 'all' or 'none'.")

    @property
    def num_unstructured(self) -> int:
        return len(self.sparsities)

    @property
    def num_unstructured_groups(self) -> int:
        return len(self.sparsities) if self.group_ends is None else len(self.group_ends)

    @property
    def num_groups(self) -> int:
        return self.num_unstructured_groups + len(self.patterns)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        rows = []
        for index, sparsity in enumerate(self.sparsities):
            ends = self.group_ends
            group = index if ends is None else next(g for g, end in enumerate(ends) if sparsity <= end)
            rows.append(Level(index=index, name=repr(float(sparsity)), sparsity=sparsity, pattern=None, group=group))
        for number, text in enumerate(self.patterns):
            kept, size = parse_pattern(text)
            group = self.num_unstructured_groups + number
            rows.append(Level(index=len(rows), name=text, sparsity=1 - kept / size, pattern=(kept, size), group=group))
        return tuple(rows)

    def inherited_groups(self, group: int) -> tuple[int, ...]:
        """Groups whose adapters `group` adds to its own, densest first (arXiv 2606.25285: sum over i <= k)."""
        if group < self.num_unstructured_groups:
            return tuple(range(group))
        if self.pattern_parent == "none" or not self.num_unstructured_groups:
            return ()
        return (0,) if self.pattern_parent == "densest" else tuple(range(self.num_unstructured_groups))

    def active_groups(self, level: Level, inheritance: str) -> list[int]:
        """Groups a level adds up, its own last; `inheritance` "none" makes groups independent."""
        inherited = () if inheritance == "none" else self.inherited_groups(level.group)
        return [*inherited, level.group]

    def levels_of(self, group: int) -> tuple[Level, ...]:
        return tuple(level for level in self.levels if level.group == group)

    def find(self, wanted: "str | float | Level") -> Level:
        """The level a user means by 0.6, "0.6", "60%" or "2:4".

        Raises: LevelError: listing the levels there are.
        """
        if isinstance(wanted, Level):
            wanted = wanted.name
        text = brief(wanted) if isinstance(wanted, int) else str(wanted).strip().replace(" ", "")
        for level in self.levels:
            if level.pattern and text == level.name:
                return level
            if level.pattern is None and _same_rate(text, level.sparsity):
                return level
        names = ", ".join(level.name for level in self.levels)
        raise LevelError(f"level {brief(wanted)} is not in this ladder; it has: {names}.")


def _increasing(numbers: Sequence[float], gap: float = 0.0) -> bool:
    return all(b - a > gap for a, b in itertools.pairwise(numbers))


def _same_rate(text: str, sparsity: float) -> bool:
    try:
        rate = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return False
    return abs(rate - sparsity) < 1e-9


def rank_slices(ranks: Sequence[int]) -> list[slice]:
    """Column range of each group in the stacked adapter: group g owns `slice(sum(ranks[:g]), sum(ranks[:g + 1]))`."""
    ends = [0]
    for rank in ranks:
        ends.append(ends[-1] + rank)
    return [slice(a, b) for a, b in itertools.pairwise(ends)]
