"""The ladder: levels, adapter groups, what a group inherits, and finding a level by what a user writes."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.errors import ConfigError, LevelError
from elastic_sparsity.ladder import Ladder, Level, keep_count, parse_pattern, rank_slices

PERCENTS = st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True).map(sorted)


def test_levels_of_a_small_ladder():
    ladder = Ladder(sparsities=(0.5, 0.65), patterns=("2:4", "1:8"))
    assert ladder.levels == (
        Level(index=0, name="0.5", sparsity=0.5, pattern=None, group=0),
        Level(index=1, name="0.65", sparsity=0.65, pattern=None, group=1),
        Level(index=2, name="2:4", sparsity=0.5, pattern=(2, 4), group=2),
        Level(index=3, name="1:8", sparsity=0.875, pattern=(1, 8), group=3),
    )
    assert [level.title for level in ladder.levels] == ["50 %", "65 %", "2:4", "1:8"]
    assert (ladder.num_unstructured, ladder.num_unstructured_groups, ladder.num_groups) == (2, 2, 4)


@pytest.mark.parametrize(
    ("width", "sparsity", "kept"),
    [
        (10, 0.6, 4),
        (10, 0.0, 10),
        (5, 0.5, 3),  # 2.5 rounds up
        (4096, 0.7, 1229),  # 1228.8
        (1000, 0.7, 300),  # 1 - 0.7 is a little more than 0.3 in floats
        (3, 0.99, 1),  # never an empty row
    ],
)
def test_keep_count_by_hand(width, sparsity, kept):
    assert keep_count(width, sparsity) == kept


@given(st.integers(1, 20000), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_keep_count_equals_exact_fractions(width, per_mille):
    exact = math.floor(width * (1 - Fraction(per_mille, 1000)) + Fraction(1, 2))
    assert keep_count(width, per_mille / 1000) == max(1, exact)


def test_groups_by_upper_ends():
    """EPTS: seven groups over (0, 0.7]; a level belongs to the first group whose end it does not pass."""
    ends = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    rates = tuple(k / 20 for k in range(1, 15))  # 0.05, 0.1, ..., 0.7
    ladder = Ladder(sparsities=rates, patterns=("2:4",), group_ends=ends)
    assert [level.group for level in ladder.levels] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert (ladder.num_unstructured_groups, ladder.num_groups) == (7, 8)
    assert [level.name for level in ladder.levels_of(1)] == ["0.15", "0.2"]
    assert [level.name for level in ladder.levels_of(7)] == ["2:4"]


@pytest.mark.parametrize(
    ("parent", "inherited"),
    [("densest", [(), (0,), (0, 1), (0,)]), ("all", [(), (0,), (0, 1), (0, 1, 2)]), ("none", [(), (0,), (0, 1), ()])],
)
def test_inherited_groups(parent, inherited):
    ladder = Ladder(sparsities=(0.5, 0.6, 0.7), patterns=("2:4",), pattern_parent=parent)
    assert [ladder.inherited_groups(group) for group in range(4)] == inherited


@pytest.mark.parametrize("parent", ["densest", "all", "none"])
def test_patterns_alone_inherit_nothing(parent):
    ladder = Ladder(sparsities=(), patterns=("2:4", "4:8"), pattern_parent=parent)
    assert [ladder.inherited_groups(group) for group in range(2)] == [(), ()]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("0.6", 1), ("60%", 1), (" 60 % ", 1), (0.6, 1), (".6", 1), ("0.60", 1), ("2:4", 3), (0.7, 2), ("70.0%", 2)],
)
def test_find(wanted, index):
    ladder = Ladder(sparsities=(0.5, 0.6, 0.7), patterns=("2:4",))
    assert ladder.find(wanted) is ladder.levels[index]
    assert ladder.find(ladder.levels[index]) is ladder.levels[index]


@given(PERCENTS)
@settings(max_examples=40, deadline=None)
def test_every_way_to_write_a_rate_finds_its_level(percents):
    ladder = Ladder(sparsities=tuple(p / 100 for p in percents))
    for level, percent in zip(ladder.levels, percents, strict=True):
        for wanted in (percent / 100, str(percent / 100), f"{percent}%", f"{percent} %", level.name, level.title):
            assert ladder.find(wanted) is level


def test_find_takes_the_names_it_lists():
    """Also for rates of more digits than a name shows."""
    ladder = Ladder(sparsities=(1 / 3, 2 / 3))
    for level in ladder.levels:
        assert ladder.find(level.name) is level


def test_two_levels_never_share_a_name():
    """Names become file names of shells; rates too close to tell apart must be refused or named apart."""
    try:
        names = [level.name for level in Ladder(sparsities=(0.5, 0.5000001)).levels]
    except ConfigError:
        return
    assert len(set(names)) == 2


@pytest.mark.parametrize("wanted", ["0.55", 0.0, "60", "60.5%", "4:8", "2:40", "", "nan", "half"])
def test_find_lists_the_levels_there_are(wanted):
    ladder = Ladder(sparsities=(0.5, 0.6), patterns=("2:4",))
    message = f"level {wanted!r} is not in this ladder; it has: 0.5, 0.6, 2:4."
    with pytest.raises(LevelError, match=f"^{re.escape(message)}$"):
        ladder.find(wanted)


def test_rank_slices():
    assert rank_slices([2, 0, 3]) == [slice(0, 2), slice(2, 2), slice(2, 5)]
    assert rank_slices([]) == []


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), ("1:2", (1, 2)), ("31:32", (31, 32))])
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "4:4", "0:4", "5:4", "2:33", "-2:4", "2:4:8", "a:b", "\u00b2:4"])
def test_bad_patterns(text):
    message = f"ladder.patterns: {text!r} is not an N:M pattern; write e.g. '2:4'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_pattern(text)


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsities": ()}, "ladder: no levels; name at least one sparsity (e.g. 0.5) or pattern"),
        ({"sparsities": (0.5, 0.5)}, "ladder.sparsities: [0.5, 0.5] must be strictly increasing within [0, 1)."),
        ({"sparsities": (0.6, 0.5)}, "ladder.sparsities: [0.6, 0.5] must be strictly increasing within [0, 1)."),
        ({"sparsities": (1.0,)}, "ladder.sparsities: [1.0] must be strictly increasing within [0, 1)."),
        ({"sparsities": (-0.1,)}, "ladder.sparsities: [-0.1] must be"),
        ({"sparsities": (NAN,)}, "ladder.sparsities: [nan] must be"),
        ({"sparsities": tuple(k / 300 for k in range(255))}, "ladder.sparsities: 255 levels; at most 254 fit"),
        ({"sparsities": (), "patterns": ("2:4", "2:4")}, "ladder.patterns: ['2:4', '2:4'] names a pattern twice."),
        ({"sparsities": (0.5,), "patterns": ("4:2",)}, "ladder.patterns: '4:2' is not an N:M pattern"),
        (
            {"sparsities": (0.5,), "group_ends": (0.4,)},
            "[0.4] must be strictly increasing and reach the sparsest level",
        ),
        ({"sparsities": (0.5,), "group_ends": ()}, "ladder.group_ends: [] must be strictly increasing"),
        ({"sparsities": (0.5,), "group_ends": (NAN,)}, "ladder.group_ends: [nan] must be strictly increasing"),
        ({"sparsities": (0.5,), "group_ends": (0.7, 0.6)}, "ladder.group_ends: [0.7, 0.6] must be strictly increasing"),
        ({"sparsities": (), "patterns": ("2:4",), "group_ends": (0.5,)}, "(no unstructured level)."),
        ({"sparsities": (0.5,), "group_ends": (0.3, 0.5)}, "the groups that end at [0.3] serve no level; merge them."),
        (
            {"sparsities": (0.5,), "pattern_parent": "mother"},
            "ladder.pattern_parent: 'mother' is not 'densest', 'all' or 'none'.",
        ),
    ],
)
def test_bad_ladders(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Ladder(**fields)
