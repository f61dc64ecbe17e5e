"""Which range is innermost: against a scan over all of them, for ranges of any shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opkit.nsys_parsers.ranges import STILL_OPEN
from opkit.nsys_parsers.stacks import NOWHERE, Int64, Stacks, depths

LEAST, MOST = -(2**63) + 1, 2**63 - 1  # the least has no negative, and no export holds it
Range = tuple[int, int, int]  # key, start, end
Asked = tuple[int, int]  # key, moment


def column(values: list[int]) -> Int64:
    return np.array(values, np.int64)


def stacks(ranges: list[Range]) -> Stacks:
    return Stacks(*(column([each[i] for each in ranges]) for i in range(3)))


def ask(built: Stacks, asked: list[Asked]) -> list[int]:
    keys, moments = (column([each[i] for each in asked]) for i in range(2))
    return list(map(int, built.innermost(keys, moments)))


def stands_in(ranges: list[Range], i: int) -> tuple[int, int, int]:
    """Later in this order is further in: begun later, else ended earlier, else given later."""
    _, start, end = ranges[i]
    return start, -end, i


def slow_innermost(ranges: list[Range], key: int, moment: int) -> int:
    """The last of all ranges that contain the moment."""
    holding = [
        i for i, (own, start, end) in enumerate(ranges) if own == key and start <= moment <= end
    ]
    return max(holding, key=lambda i: stands_in(ranges, i), default=NOWHERE)


def slow_parent(ranges: list[Range], child: int) -> int:
    """The last of all ranges before the child that end no earlier."""
    key, _, end = ranges[child]
    holding = [
        i
        for i, (own, _, until) in enumerate(ranges)
        if own == key and until >= end and stands_in(ranges, i) < stands_in(ranges, child)
    ]
    return max(holding, key=lambda i: stands_in(ranges, i), default=NOWHERE)


def slow_depth(parent: list[int], child: int) -> int:
    count = 0
    while parent[child] >= 0:
        child, count = parent[child], count + 1
    return count


def check(ranges: list[Range], asked: list[Asked]) -> None:
    built = stacks(ranges)
    assert ask(built, asked) == [slow_innermost(ranges, *each) for each in asked]
    parent = [slow_parent(ranges, i) for i in range(len(ranges))]
    assert built.parent.tolist() == parent
    assert depths(built.parent).tolist() == [slow_depth(parent, i) for i in range(len(ranges))]


# Few different times, so that ranges touch, cross, nest and are equal; ends before starts too.
FEW = st.integers(0, 12)
WIDE = st.one_of(
    st.sampled_from([LEAST, LEAST + 1, -1, 0, 1, STILL_OPEN - 1, STILL_OPEN, MOST - 1, MOST]),
    st.integers(LEAST, MOST),
)


def cases(times: st.SearchStrategy[int], keys: st.SearchStrategy[int]) -> st.SearchStrategy:
    ranges = st.lists(st.tuples(keys, times, times), max_size=25)
    return st.tuples(ranges, st.lists(st.tuples(keys, times), max_size=25))


@settings(max_examples=250, deadline=None)
@given(cases(FEW, st.integers(0, 2)))
def test_ranges_of_any_shape(case: tuple[list[Range], list[Asked]]) -> None:
    check(*case)


@settings(max_examples=120, deadline=None)
@given(cases(WIDE, st.sampled_from([LEAST, -1, 0, MOST])))
def test_times_and_threads_of_any_size(case: tuple[list[Range], list[Asked]]) -> None:
    check(*case)


@st.composite
def nested(draw: st.DrawFn) -> list[Range]:
    """Push/pop ranges of one thread: each pop ends the latest push; time may stand still."""
    ranges: list[list[int]] = []
    pushed: list[int] = []
    now = 0
    for push, wait in draw(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=40)):
        now += wait
        if push:
            pushed.append(len(ranges))
            ranges.append([7, now, STILL_OPEN])
        elif pushed:
            ranges[pushed.pop()][2] = now
    return [(key, start, end) for key, start, end in ranges]


@settings(max_examples=120, deadline=None)
@given(nested(), st.randoms(use_true_random=False))
def test_pushed_and_popped_ranges_in_any_order(ranges: list[Range], random: object) -> None:
    random.shuffle(ranges)  # type: ignore[attr-defined]
    check(ranges, [(7, moment) for moment in range(-1, 85)])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), FEW, FEW), min_size=200, max_size=300))
def test_hundreds_of_threads(ranges: list[Range]) -> None:
    check(ranges, [(key, 6) for key in range(301)])


def test_no_ranges_and_no_questions() -> None:
    none = stacks([])
    assert ask(none, [(1, 5)]) == [NOWHERE]
    assert ask(none, []) == []
    assert none.has(column([1, 2])).tolist() == [False, False]
    assert depths(none.parent).tolist() == []
    assert ask(stacks([(1, 0, 9)]), []) == []


def test_ends_belong_to_a_range() -> None:
    touching = stacks([(1, 0, 10), (1, 10, 20)])
    assert ask(touching, [(1, -1), (1, 0), (1, 9), (1, 10), (1, 20), (1, 21)]) == [
        NOWHERE, 0, 0, 1, 1, NOWHERE,
    ]  # fmt: skip


def test_a_key_without_ranges_has_none_and_no_other_keys() -> None:
    built = stacks([(1, 0, 10), (3, 0, 10)])
    assert ask(built, [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5)]) == [-1, 0, -1, 1, -1]
    assert built.has(column([0, 1, 2, 3, 4])).tolist() == [False, True, False, True, False]


def test_of_crossing_ranges_the_one_begun_last_is_innermost() -> None:
    crossing = stacks([(1, 0, 10), (1, 5, 20)])
    assert ask(crossing, [(1, 4), (1, 7), (1, 15)]) == [0, 1, 1]
    assert crossing.parent.tolist() == [NOWHERE, NOWHERE]


def test_an_open_range_holds_all_that_follows() -> None:
    built = stacks([(1, 5, STILL_OPEN), (1, 10, 20), (1, 30, STILL_OPEN)])
    assert ask(built, [(1, 4), (1, 15), (1, 25), (1, 31), (1, STILL_OPEN)]) == [-1, 1, 0, 2, 2]
    assert built.parent.tolist() == [NOWHERE, 0, 0]


@pytest.mark.parametrize("followers", [0, 5_000])
def test_a_deep_stack_ends(followers: int) -> None:
    """Each range in the one before, all closed; then others beside them, and moments between."""
    deep = 5_000
    ranges = [(1, i, 3 * deep - i) for i in range(deep)]
    ranges += [(1, 4 * deep + 2 * i, 4 * deep + 2 * i + 1) for i in range(followers)]
    built = stacks(ranges)
    assert built.parent.tolist() == [*range(-1, deep - 1), *[NOWHERE] * followers]
    assert depths(built.parent).tolist() == [*range(deep), *[0] * followers]
    moments = [(1, deep), (1, 2 * deep + 1), (1, 2 * deep + 2), (1, 3 * deep), (1, 3 * deep + 1)]
    assert ask(built, moments) == [deep - 1, deep - 1, deep - 2, 0, NOWHERE]


def test_a_long_row_of_ranges_ends() -> None:
    many = 200_000
    built = stacks([(1, 0, 20 * many), *((1, 10 * i + 1, 10 * i + 8) for i in range(many))])
    assert np.array_equal(built.parent, np.append(NOWHERE, np.zeros(many, np.int64)))
    asked = column([10 * i + 5 for i in range(many)] + [10 * i for i in range(many)])
    found = built.innermost(np.ones(2 * many, np.int64), asked)
    assert np.array_equal(found[:many], np.arange(1, many + 1))
    assert not found[many:].any()


def test_ranges_that_never_close_end() -> None:
    """Started and never ended, as a leak in a long run leaves them: a stack without bottom."""
    many = 200_000
    built = stacks([(1, i, STILL_OPEN) for i in range(many)])
    assert np.array_equal(depths(built.parent), np.arange(many))
    assert ask(built, [(1, many), (1, 17)]) == [many - 1, 17]
