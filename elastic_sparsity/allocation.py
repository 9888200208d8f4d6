"""How many weights a row each linear keeps: uniform, by depth, by outliers, or after moves that keep the total.

Numbers only. An allocation of one level is a list with one number a linear. What moves between linears is a *quantum*:
one number of weights for all of them, so that every allocation of a level keeps exactly as many weights as the uniform
one (the code of Tyr-the-Pruner, arXiv 2503.09657, rounds instead, and misses its budget for most numbers of heads).
Bounds make levels nested: a denser level keeps at least what a sparser one keeps, in every linear.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.ladder import keep_count

Kept = list[int]
TOP = 512  # of the dense model's tokens, by which allocations are judged: EvoPress finds more of them no better
SLOPES = (0.05, 0.1, 0.15, 0.2, 0.25)  # that a search tries of the arithmetic progression
COARSEST = 1 / 8  # of a row: where a common quantum would take more of some linear, only linears of equal rows trade


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One linear: its name in the model, output rows, inputs."""

    name: str
    rows: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trade:
    """Which linears trade with each other, and in which steps.

    Attributes:
        steps: weights a row of one quantum, by linear.
        market: number of the market of every linear; quanta move within one only.
    """

    steps: tuple[int, ...]
    market: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """What a search may do to an allocation in one move.

    Attributes:
        trade: quanta between two linears.
        families: groupings of all linears, e.g. by type and by block; a wide move takes two groups of one family, and
            moves a quantum between each pair of their members, in order, where that is legal.
        wide: share of wide moves.
    """

    trade: Trade
    families: tuple[tuple[tuple[int, ...], ...], ...] = ()
    wide: float = 0.0


def uniform(sizes: Sequence[Size], sparsity: float) -> Kept:
    """The same sparsity everywhere."""
    return [keep_count(size.width, sparsity) for size in sizes]


def total(sizes: Sequence[Size], kept: Sequence[int]) -> int:
    """Weights kept in all."""
    return sum(size.rows * count for size, count in zip(sizes, kept, strict=True))


def trade(sizes: Sequence[Size], share: float = 1 / 32, coarse: int = 1) -> Trade:
    """Quanta of about `share` of the median linear, times `coarse`: whole numbers of the fine ones.

    Raises: ConfigError: no linears.
    """
    if not sizes:
        raise ConfigError("allocation: the model has no linears to share sparsity out to.")
    common = math.lcm(*{size.rows for size in sizes})
    quantum = common * max(1, round(share * median(size.rows * size.width for size in sizes) / common))
    steps = [quantum // size.rows for size in sizes]
    market = [0] * len(sizes)
    if any(step > COARSEST * size.width for step, size in zip(steps, sizes, strict=True)):
        markets = {rows: number for number, rows in enumerate(sorted({size.rows for size in sizes}))}
        widths = {rows: min(size.width for size in sizes if size.rows == rows) for rows in markets}
        steps = [max(1, round(share * widths[size.rows])) for size in sizes]
        market = [markets[size.rows] for size in sizes]
    return Trade(steps=tuple(coarse * step for step in steps), market=tuple(market))


def by_depth(sizes: Sequence[Size], depths: Sequence[int], sparsity: float, slope: float) -> list[float]:
    """Arithmetic progression over depth (arXiv 2502.14770): sparsity rises by 2 slope from first to last block.

    Args:
        depths: block of every linear, from 0.
        slope: of sparsity, half the range; negative = the first blocks are the sparsest.
    Returns: wanted weights a row, not rounded.
    """
    last = max(1, *depths)
    return [
        size.width * (1 - sparsity - slope * (2 * depth / last - 1)) for size, depth in zip(sizes, depths, strict=True)
    ]


def by_outliers(
    sizes: Sequence[Size], depths: Sequence[int], sparsity: float, outliers: Sequence[float], spread: float = 0.08
) -> list[float]:
    """OWL (arXiv 2310.05175): blocks with more outliers keep more, within 2 * `spread` between the least and the most.

    Args:
        outliers: share of scores above M times their mean, by block.
    Returns: wanted weights a row, not rounded.
    """
    low, high = min(outliers), max(outliers)
    scaled = [2 * spread * (x - low) / (high - low) if high > low else 0.0 for x in outliers]
    middle = mean(scaled[depth] for depth in depths)
    return [size.width * (1 - sparsity + scaled[depth] - middle) for size, depth in zip(sizes, depths, strict=True)]


def fitted(wanted: Sequence[float], base: Sequence[int], rules: Trade, low: Sequence[int], high: Sequence[int]) -> Kept:
    """The allocation in whole quanta from `base` that is near `wanted`, keeps base's total and lies within bounds.

    Args:
        base: an allocation with the wanted total; need not be within the bounds.
        low, high: inclusive.
    Raises: ConfigError: if no such allocation exists.
    """
    ranges = [
        (-((kept - least) // step), (most - kept) // step)
        for kept, step, least, most in zip(base, rules.steps, low, high, strict=True)
    ]
    if any(a > b for a, b in ranges):
        raise ConfigError("allocation: the bounds of a linear leave no step between them; take finer quanta.")
    exact = [(want - kept) / step for want, kept, step in zip(wanted, base, rules.steps, strict=True)]
    moved = [min(max(round(x), a), b) for x, (a, b) in zip(exact, ranges, strict=True)]
    for market in set(rules.market):
        members = [i for i, m in enumerate(rules.market) if m == market]
        while surplus := sum(moved[i] for i in members):
            direction = -1 if surplus > 0 else 1
            free = [i for i in members if ranges[i][0] <= moved[i] + direction <= ranges[i][1]]
            if not free:
                raise ConfigError("allocation: the budget cannot be met within the bounds of the neighbouring levels.")
            best = min(free, key=lambda i: abs(moved[i] + direction - exact[i]) - abs(moved[i] - exact[i]))
            moved[best] += direction
    return [kept + n * step for kept, n, step in zip(base, moved, rules.steps, strict=True)]


def shifted(
    kept: Sequence[int],
    moves: Moves,
    low: Sequence[int],
    high: Sequence[int],
    times: int,
    chance: random.Random,
) -> Kept:
    """`kept` after up to `times` random moves; legal ones only.

    Returns: fewer moves, or `kept` itself, where nothing legal is left: nothing is tried again and again.
    """
    moved, families = list(kept), [groups for groups in moves.families if len(groups) > 1]
    for _ in range(times):
        if families and chance.random() < moves.wide:
            givers, takers = chance.sample(chance.choice(families), 2)
            for giver, taker in zip(givers, takers, strict=False):
                _move_(moved, moves.trade, low, high, giver, taker)
            continue
        pairs = _legal_markets(moved, moves.trade, low, high)
        if not pairs:
            break
        who_gives, who_takes = chance.choices(pairs, [len(g) * len(t) for g, t in pairs])[0]
        giver = chance.choice([i for i in who_gives if len(who_takes) > 1 or i != who_takes[0]])
        taker = chance.choice([i for i in who_takes if i != giver])
        _move_(moved, moves.trade, low, high, giver, taker)
    return moved


def _move_(kept: Kept, rules: Trade, low: Sequence[int], high: Sequence[int], giver: int, taker: int) -> None:
    """One quantum from one linear to another, if they trade and stay within their bounds."""
    given, taken = kept[giver] - rules.steps[giver], kept[taker] + rules.steps[taker]
    if giver != taker and rules.market[giver] == rules.market[taker] and given >= low[giver] and taken <= high[taker]:
        kept[giver], kept[taker] = given, taken


def _legal_markets(
    kept: Sequence[int], rules: Trade, low: Sequence[int], high: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """(who can give, who can take) of every market in which a move is possible."""
    found = []
    for market in sorted(set(rules.market)):
        members = [i for i, m in enumerate(rules.market) if m == market]
        givers = [i for i in members if kept[i] - rules.steps[i] >= low[i]]
        takers = [i for i in members if kept[i] + rules.steps[i] <= high[i]]
        if givers and takers and len({*givers, *takers}) > 1:
            found.append((givers, takers))
    return found


def from_the_middle(count: int) -> list[int]:
    """Order in which levels are searched: the middle one first, so that each later one has a neighbour that is done."""
    return sorted(range(count), key=lambda i: (abs(2 * i - (count - 1)), -i))


def bounds(sizes: Sequence[Size], done: dict[int, Kept], level: int, sparsities: Sequence[float]) -> tuple[Kept, Kept]:
    """What a level may keep at least and at most, given the levels that are done; level 0 is the densest.

    Leaves room for the levels that are not: in whole quanta from their uniform allocations they can follow this one
    wherever it goes within its bounds, and keep their own total.
    """
    flat, steps = [uniform(sizes, sparsity) for sparsity in sparsities], trade(sizes).steps
    low, high = [1] * len(sizes), [size.width for size in sizes]
    for i, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        reach = 0  # quanta between this level's uniform allocation and that of a denser or sparser one
        for other in range(level - 1, -1, -1):
            reach += (flat[other][i] - flat[other + 1][i]) // step
            room = flat[level][i] + step * (reach + (size.width - flat[other][i]) // step)
            high[i] = min(high[i], done[other][i] if other in done else room)
        reach = 0
        for other in range(level + 1, len(sparsities)):
            reach += (flat[other - 1][i] - flat[other][i]) // step
            room = flat[level][i] - step * (reach + (flat[other][i] - 1) // step)
            low[i] = max(low[i], done[other][i] if other in done else room)
    return low, high


def progressions(
    sizes: Sequence[Size], depths: Sequence[int], sparsities: Sequence[float], slopes: Sequence[float]
) -> list[Kept]:
    """Nested levels, each in its own arithmetic progression over depth as far as the neighbouring levels let it.

    Args:
        slopes: one a level, see `by_depth`.
    Raises: ConfigError: see `fitted`.
    """
    done: dict[int, Kept] = {}
    rules = trade(sizes)
    for level in from_the_middle(len(sparsities)):
        wanted = by_depth(sizes, depths, sparsities[level], slopes[level])
        base = uniform(sizes, sparsities[level])
        done[level] = fitted(wanted, base, rules, *bounds(sizes, done, level, sparsities))
    return [done[level] for level in range(len(sparsities))]


def by_linear(sizes: Sequence[Size], levels: Sequence[Kept]) -> dict[str, tuple[int, ...]]:
    """What every level keeps, by linear's name."""
    return {size.name: tuple(kept[i] for kept in levels) for i, size in enumerate(sizes)}


def weakened(levels: Sequence[Kept], sizes: Sequence[Size], sparsities: Sequence[float], strength: float) -> list[Kept]:
    """Nested levels part of the way from uniform to what `levels` keep.

    A plan that is best for weights as they are goes too far for weights that are trained afterwards.

    Args:
        levels: kept by linear, of every level.
        strength: 0 = uniform, 1 = unchanged.
    Raises: ConfigError: see `fitted`.
    """
    if strength == 1:
        return [list(kept) for kept in levels]
    done: dict[int, Kept] = {}
    rules = trade(sizes)
    for level in from_the_middle(len(sparsities)):
        base = uniform(sizes, sparsities[level])
        wanted = [strength * kept + (1 - strength) * flat for kept, flat in zip(levels[level], base, strict=True)]
        done[level] = fitted(wanted, base, rules, *bounds(sizes, done, level, sparsities))
    return [done[level] for level in range(len(sparsities))]
