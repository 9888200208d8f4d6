"""The search on toy losses: it finds what is known to be best, never hangs, and goes on as if it had not stopped."""

import itertools
import math

import pytest

from elastic_sparsity.allocation import Moves, Size, total, trade, uniform
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.search import Generation, SearchSettings, evolve

SIZES = [Size(name=str(i), rows=16, width=64) for i in range(4)]
START = uniform(SIZES, 0.5)
LOW, HIGH = [1] * 4, [64] * 4
WEIGHTS = (8.0, 4.0, 2.0, 1.0)  # what a kept weight is worth, with falling returns
QUICK = SearchSettings(generations=60, offspring=6, windows=(1, 3), survivors=(3,))


def moves(_number):
    return Moves(trade=trade(SIZES))


def toy(kept, windows):
    """Windows only scale the loss, so every stage ranks alike."""
    return sum(1 + w for w in windows) * sum(worth / count for worth, count in zip(WEIGHTS, kept, strict=True))


def run(settings=QUICK, start=None, judge=toy, seed="0", **changes):
    arguments = {"num_windows": 5, "moves": moves, "low": LOW, "high": HIGH, **changes}
    return evolve(start or Generation(START, []), judge, settings=settings, seed=seed, **arguments)


def test_finds_the_best_of_all_allocations():
    step = trade(SIZES).steps[0]
    choices = [range(START[0] % step or step, 65, step)] * 4
    best = min(
        (kept for kept in itertools.product(*choices) if sum(kept) == sum(START)), key=lambda kept: toy(kept, [0])
    )
    found = run(SearchSettings(generations=150, offspring=12, windows=(1, 3), survivors=(4,)))
    assert tuple(found.kept) == best
    assert total(SIZES, found.kept) == total(SIZES, START)


def test_the_parent_stays_until_something_is_better():
    """On the same text: windows weigh alike when all are taken."""
    found = run(SearchSettings(generations=40, offspring=6, windows=(1, 5), survivors=(3,)))
    assert found.losses == sorted(found.losses, reverse=True)
    assert found.losses[-1] < toy(START, range(5))
    flat = run(judge=lambda kept, windows: 1.0)
    assert flat.kept == START
    assert flat.losses == [1.0] * 60


def test_goes_on_from_any_generation_as_if_it_had_not_stopped():
    kept: list[Generation] = []
    whole = run(on_generation=kept.append)
    assert len(kept) == 60
    for number in (0, 1, 17, 59):
        assert run(start=kept[number]) == whole
    assert run(seed="1") != whole


def test_stages_see_more_text_and_fewer_candidates():
    seen: list[int] = []

    def judge(kept, windows):
        seen.append(len(windows))
        assert len(set(windows)) == len(windows)
        return toy(kept, windows)

    run(SearchSettings(generations=1, offspring=9, windows=(1, 2, 4), survivors=(5, 2)), judge=judge)
    assert seen == [1] * 9 + [2] * 5 + [4] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_models_with_hardly_any_moves_do_not_hang(count):
    sizes = SIZES[:count]
    start = Generation(uniform(sizes, 0.5), [])
    coarse = Moves(trade=trade(sizes, coarse=4))
    found = evolve(
        start, lambda kept, windows: float(kept[0]), 5, lambda n: coarse, LOW[:count], HIGH[:count],
        SearchSettings(generations=5, offspring=128, windows=(1, 3), survivors=(3,)), "0",
    )  # fmt: skip
    assert total(sizes, found.kept) == total(sizes, start.kept)
    assert len(found.losses) == 5


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"windows \[1, 2\] need one number of survivors"):
        SearchSettings(generations=1, windows=(1, 2), survivors=(1, 1))
    with pytest.raises(ConfigError, match="generations must be >= 0"):
        SearchSettings(generations=-1)
    with pytest.raises(ConfigError, match="2 windows of held-out text, but a stage takes 3"):
        run(num_windows=2)
    with pytest.raises(NumericsError, match="loss is NaN"):
        run(judge=lambda kept, windows: math.nan)
