"""Which range was open when: nested ranges of many threads, answered for millions of moments.

Columns in, columns out; no loop over ranges or moments. The method rests on one fact: of the ranges
sorted by start, those that contain a moment are found by going from the last one begun before it to
the nearest earlier one that ends later, and so on. ("Previous greater element", found here by
pointer jumping: JáJá, An Introduction to Parallel Algorithms, 1992, 2.2.) It needs no proper
nesting, so start/end ranges that cross others are no special case.
"""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
NOWHERE = -1
STEPS = 64  # that a climb takes one by one


class Stacks:
    """Ranges grouped by a key (a thread, or a process), to be asked which one is innermost.

    Attributes:
        parent: for each range, as given, the nearest range of its key that contains it; -1 if none.
    """

    def __init__(self, keys: Int64, start: Int64, end: Int64) -> None:
        """Ranges in any order; all arrays of shape (ranges,), times in ns, ends included."""
        self._order = np.lexsort((-end, start, keys))
        self._start, self._end = start[self._order], end[self._order]
        sorted_keys = keys[self._order]
        self._keys, self._first = np.unique(sorted_keys, return_index=True)
        self._last = np.append(self._first, len(keys))[1:]
        self._up = self._containing(sorted_keys)
        self.parent = np.full(len(keys), NOWHERE, np.int64)
        has = self._up >= 0
        self.parent[self._order[has]] = self._order[self._up[has]]

    def _containing(self, keys: Int64) -> Int64:
        """For each sorted range the nearest earlier one of its key that ends no earlier."""
        up = np.arange(-1, len(keys) - 1)
        up[self._first] = NOWHERE
        pending = np.flatnonzero(up >= 0)
        for _ in range(STEPS):
            pending = pending[self._end[up[pending]] < self._end[pending]]
            if not len(pending):
                return up
            # All between a range and its pointer end before it, so the pointer's own is next.
            up[pending] = up[up[pending]]
            pending = pending[up[pending] >= 0]
        # Deeper than programs nest: one stack, range by range, is linear whatever they do.
        return _stacked(keys, self._end)

    def innermost(self, keys: Int64, moments: Int64) -> Int64:
        """The innermost range of ``keys[i]`` that is open at ``moments[i]``; -1 where none is."""
        found = np.full(len(moments), NOWHERE, np.int64)
        if not len(self._keys):
            return found
        which = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        which[self._keys[which] != keys] = len(self._keys)  # asked about, but without ranges
        # Most traces have few threads that launch, however many have ranges.
        for number in np.flatnonzero(np.bincount(which, minlength=1)[: len(self._keys)]):
            first, last = self._first[number], self._last[number]
            asked = np.flatnonzero(which == number)
            at = moments[asked]
            place = np.searchsorted(self._start[first:last], at, side="right") - 1 + first
            place[place < first] = NOWHERE
            self._climb(place, at)
            inside = place >= 0
            found[asked[inside]] = self._order[place[inside]]
        return found

    def _climb(self, place: Int64, moments: Int64) -> None:
        """Move each place up to the first range that reaches its moment, or to ``NOWHERE``."""
        short = np.flatnonzero(place >= 0)
        for _ in range(STEPS):
            short = short[self._end[place[short]] < moments[short]]
            if not len(short):
                return
            place[short] = self._up[place[short]]
            short = short[place[short] >= 0]
        # Deeper than programs nest. Ends grow on the way up, so jumps of 2^k ranges are tried from
        # the longest down, as long as they lead to a range that is still too short.
        jumps = [self._up]
        while (jumps[-1] >= 0).any():
            last = jumps[-1]
            jumps.append(np.where(last >= 0, last[last], NOWHERE))
        short = short[self._end[place[short]] < moments[short]]
        for jump in reversed(jumps):
            there = jump[place[short]]
            going = (there >= 0) & (self._end[there] < moments[short])
            place[short[going]] = there[going]
        place[short] = self._up[place[short]]

    def has(self, keys: Int64) -> npt.NDArray[np.bool_]:
        """Whether each key owns any range."""
        return np.isin(keys, self._keys)


def _stacked(keys: Int64, end: Int64) -> Int64:
    """As ``Stacks._containing``: ranges sorted by key and start."""
    up: list[int] = []
    ends = end.tolist()
    stack: list[int] = []
    last = None
    for number, key in enumerate(keys.tolist()):
        if key != last:
            last, stack = key, []
        while stack and ends[stack[-1]] < ends[number]:
            stack.pop()
        up.append(stack[-1] if stack else NOWHERE)
        stack.append(number)
    return np.array(up, np.int64)


def depths(parent: Int64) -> Int64:
    """How many ranges contain each one; 0 for the outermost."""
    depth = (parent >= 0).astype(np.int64)
    above = parent.copy()
    while True:
        climbing = np.flatnonzero(above >= 0)
        if not len(climbing):
            return depth
        # Read before written: both halves of a step look at the state before it.
        reached = above[climbing]
        depth[climbing] += depth[reached]
        above[climbing] = above[reached]


def write(
    db: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Array], into: bool = False
) -> None:
    """Create ``table`` from columns of whole numbers of one length, or append to it.

    Types follow the arrays: 64, 32 or 8 bits.
    """
    names = ", ".join(
        f'"{name}"::{_SQL_TYPES[column.dtype.itemsize]} AS "{name}"'
        for name, column in columns.items()
    )
    db.register("given_columns", {k: np.ascontiguousarray(v) for k, v in columns.items()})
    db.execute(
        f"{f'INSERT INTO {table} BY NAME' if into else f'CREATE TABLE {table} AS'} "
        f"SELECT {names} FROM given_columns"
    )
    db.unregister("given_columns")


_SQL_TYPES = {8: "BIGINT", 4: "INTEGER", 1: "TINYINT"}
