"""Evolutionary search of one level's allocation: (1 + lambda), survivors judged on more and more text. Knows no model.

After EvoPress (arXiv 2410.14649) and Tyr-the-Pruner (arXiv 2503.09657): one parent, offspring by a few random moves,
selection in stages; here moves are legal by construction, and every generation draws from its own seed, so that a
search goes on from any generation exactly as if it had never stopped.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_sparsity.allocation import Kept, Moves, shifted
from elastic_sparsity.errors import ConfigError, NumericsError

Judge = Callable[[Sequence[int], Sequence[int]], float]  # (kept a row by linear, numbers of windows) -> loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How long and how wide.

    Attributes:
        generations: of one level.
        offspring: of every generation.
        most_moves: an offspring takes min of two draws from 1 to this (EvoPress: 3).
        windows: of text in every stage, growing.
        survivors: of every stage but the last, in which the parent joins and one is left.
    """

    generations: int
    offspring: int = 16
    most_moves: int = 3
    windows: tuple[int, ...] = (1, 4, 8)
    survivors: tuple[int, ...] = (4, 1)

    def __post_init__(self) -> None:
        if len(self.survivors) != len(self.windows) - 1 or any(n < 1 for n in (*self.survivors, *self.windows)):
            raise ConfigError(
                f"search: windows {list(self.windows)} need one number of survivors >= 1 fewer, "
                f"found {list(self.survivors)}."
            )
        if self.generations < 0 or self.offspring < 1 or self.most_moves < 1:
            raise ConfigError("search: generations must be >= 0, offspring and moves >= 1.")


@dataclass(frozen=True, slots=True)
class Generation:
    """Where a search stands: the parent, and its loss in each generation's last stage."""

    kept: Kept
    losses: list[float]


def evolve(
    start: Generation,
    judge: Judge,
    num_windows: int,
    moves: Callable[[int], Moves],
    low: Sequence[int],
    high: Sequence[int],
    settings: SearchSettings,
    seed: str,
    on_generation: Callable[[Generation], None] = lambda now: None,
) -> Generation:
    """Goes on from `start` to the last generation.

    Args:
        judge: loss of an allocation on some of the windows; lower is better.
        moves: of a generation, coarse and wide ones first.
        on_generation: called with every finished generation, to keep it.
    Raises: ConfigError: fewer windows than a stage needs. NumericsError: a loss is NaN.
    """
    if num_windows < max(settings.windows):
        raise ConfigError(f"search: {num_windows} windows of held-out text, but a stage takes {max(settings.windows)}.")
    now = start
    for number in range(len(now.losses), settings.generations):
        chance = random.Random(f"{seed} {number}")
        offspring = _offspring(now.kept, moves(number), low, high, settings, chance)
        kept, loss = _selected(now.kept, offspring, judge, num_windows, settings, chance)
        now = Generation(kept, [*now.losses, loss])
        on_generation(now)
    return now


def _offspring(
    parent: Kept, moves: Moves, low: Sequence[int], high: Sequence[int], settings: SearchSettings, chance: random.Random
) -> list[Kept]:
    """Different ones, none like the parent; fewer than wanted where there are not as many."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(4 * settings.offspring):
        times = min(chance.randint(1, settings.most_moves), chance.randint(1, settings.most_moves))
        child = tuple(shifted(parent, moves, low, high, times, chance))
        if child != tuple(parent):
            found[child] = None
        if len(found) == settings.offspring:
            break
    return [list(child) for child in found]


def _selected(
    parent: Kept,
    offspring: list[Kept],
    judge: Judge,
    num_windows: int,
    settings: SearchSettings,
    chance: random.Random,
) -> tuple[Kept, float]:
    """The best of the last stage, and its loss there; of equals the parent, then the earlier one."""
    candidates = offspring
    for stage, count in enumerate(settings.windows):
        windows = chance.sample(range(num_windows), count)
        is_last = stage == len(settings.windows) - 1
        if is_last:
            candidates = [parent, *candidates]
        elif len(candidates) <= settings.survivors[stage]:
            continue  # all of them survive
        losses = [judge(kept, windows) for kept in candidates]
        if any(math.isnan(loss) for loss in losses):
            raise NumericsError("search: a candidate's loss is NaN; check the model and the calibration text.")
        ranked = sorted(range(len(candidates)), key=lambda i: (losses[i], i))
        if is_last:
            return candidates[ranked[0]], losses[ranked[0]]
        candidates = [candidates[i] for i in ranked[: settings.survivors[stage]]]
    raise AssertionError("a search has a last stage")
