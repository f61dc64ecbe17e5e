"""What a kernel must be given, found by scanning every range of an export: sqlite3 and Python only.

Where an export leaves two answers (ranges of equal times, calls begun together, graph nodes that
are clones of each other in a circle), all of them count as right.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from read_tables import Given

from opkit.nsys_parsers.reading import Via

THREAD = 0xFFFFFF
FOREVER = 2**62
STEP = re.compile(
    r"execute_context_\d+\(\d+\)_generation_\d+\(\d+\)|_forward_step \d+: \d+ ctx"
    r"|step\[(EXTEND|DECODE) bs="
)
KERNEL, RUNTIME = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
Moment = tuple[int, int]  # thread, time


class Range(NamedTuple):
    tid: int
    start: int
    end: int
    text: str


class Wanted(NamedTuple):
    """All right answers."""

    launches: set[int | None]
    nodes: set[int | None]
    given: set[Given]


class Slow:
    """One export, asked kernel by kernel."""

    def __init__(self, path: Path, other_threads: bool = True) -> None:
        self.other_threads = other_threads
        with closing(sqlite3.connect(path)) as db:
            db.row_factory = sqlite3.Row
            db.text_factory = lambda raw: raw.decode("utf-8", "replace")
            self._tables = {
                row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
            self._names = {row["id"]: row["value"] for row in self._rows(db, "StringIds")}
            self._kernels = self._rows(db, KERNEL)
            self._read_ranges(self._rows(db, "NVTX_EVENTS"))
            self._read_calls(self._rows(db, RUNTIME))
            self._read_nodes(self._rows(db, "CUDA_GRAPH_NODE_EVENTS"))
        self._known: dict[Range, set[tuple[str, str]]] = {}

    def _rows(self, db: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
        if table not in self._tables:
            return []
        return [dict(row) for row in db.execute(f'SELECT * FROM "{table}"')]

    def _read_ranges(self, rows: list[dict[str, Any]]) -> None:
        self._steps: dict[int, list[Range]] = defaultdict(list)
        self._modules: dict[int, list[Range]] = defaultdict(list)
        for row in rows:
            text = row["text"] if row["text"] is not None else self._names.get(row.get("textId"))
            if text is None or row["eventType"] not in (59, 60, 70, 71):
                continue
            end = FOREVER if row["end"] is None else row["end"]
            found = Range(row["globalTid"], row["start"], end, text)
            twin = "'Module':" in text and "'Outputs':" in text
            if STEP.search(text):
                self._steps[found.tid].append(found)
            elif not twin and end > found.start:
                self._modules[found.tid].append(found)

    def _read_calls(self, rows: list[dict[str, Any]]) -> None:
        self._calls: dict[tuple[int, int], list[Moment]] = defaultdict(list)
        for row in rows:
            pid = row["globalTid"] & ~THREAD
            self._calls[pid, row["correlationId"]].append((row["globalTid"], row["start"]))

    def _read_nodes(self, rows: list[dict[str, Any]]) -> None:
        self._made: dict[tuple[int, int], list[Moment]] = defaultdict(list)
        self._origin: dict[tuple[int, int], int] = {}
        for row in rows:
            node = row["globalTid"] & ~THREAD, row["graphNodeId"]
            self._made[node].append((row["globalTid"], row["start"]))
            if origin := row.get("originalGraphNodeId"):
                self._origin[node] = max(origin, self._origin.get(node, 0))

    def kernel(self, name: str) -> Wanted:
        """What the one kernel of this name must be given."""
        (row,) = (row for row in self._kernels if self._names[row["demangledName"]] == name)
        return self.wanted(row["globalPid"], row["correlationId"], row.get("graphNodeId"))

    def wanted(self, pid: int, correlation: int, node: int | None) -> Wanted:
        """What a kernel, copy or fill must be given."""
        launches = _first(self._calls.get((pid, correlation), []))
        created = self._created(pid, node) if node else [None]
        given = set()
        for launch, creation in itertools.product(launches, created):
            steps = self._around(self._steps, launch)
            modules = self._around(self._modules, launch)
            of_node = self._around(self._modules, creation)
            if all(found for found, _ in of_node):
                modules = [(found, Via.NODE) for found, _ in of_node]
            for (step, step_via), (found, via) in itertools.product(steps, modules):
                for path, module in self._paths(found):
                    given.add(Given(path, module, step.text if step else None, via, step_via))
        return Wanted({m and m[1] for m in launches}, {m and m[1] for m in created}, given)

    def _created(self, pid: int, node: int) -> list[Moment | None]:
        """Creation of the node at the root of the clone chain; all of a circle of clones."""
        seen = [node]
        while (origin := self._origin.get((pid, seen[-1]))) is not None:
            if origin in seen:
                return [m for n in seen[seen.index(origin) :] for m in _first(self._made[pid, n])]
            seen.append(origin)
        return _first(self._made.get((pid, seen[-1]), []))

    def _around(
        self, ranges: dict[int, list[Range]], moment: Moment | None
    ) -> list[tuple[Range | None, Via]]:
        """The innermost ranges around a moment: one, several of equal times, or None."""
        if moment is None:
            return [(None, Via.NONE)]
        tid, time = moment
        own, via = ranges.get(tid), Via.THREAD
        if own is None:
            if not self.other_threads:
                return [(None, Via.NONE)]
            own, via = self._of_process(ranges, tid & ~THREAD), Via.TIME
        around = [each for each in own if each.start <= time <= each.end]
        if not around:
            return [(None, Via.NONE)]
        start = max(each.start for each in around)
        end = min(each.end for each in around if each.start == start)
        return [(each, via) for each in around if (each.start, each.end) == (start, end)]

    @staticmethod
    def _of_process(ranges: dict[int, list[Range]], pid: int) -> list[Range]:
        return [each for tid, own in ranges.items() if tid & ~THREAD == pid for each in own]

    def _paths(self, innermost: Range | None) -> set[tuple[str, str]]:
        """Paths and modules of a range; ranges of equal times may stand in any order."""
        if innermost is None:
            return {("", "")}
        if innermost not in self._known:
            self._known[innermost] = self._new_paths(innermost)
        return self._known[innermost]

    def _new_paths(self, innermost: Range) -> set[tuple[str, str]]:
        start, end = innermost.start, innermost.end
        own = self._modules[innermost.tid]
        equal = [each for each in own if (each.start, each.end) == (start, end)]
        others = list(equal)
        others.remove(innermost)
        before = [
            each for each in own if each.end >= end and (each.start, -each.end) < (start, -end)
        ]
        above: set[tuple[str, str]] = {("", "")}
        if before:
            latest = max((each.start, -each.end) for each in before)
            above = set()
            for each in before:
                if (each.start, -each.end) == latest:
                    above |= self._paths(each)
        orders = set(itertools.permutations(each.text for each in others))
        return {_below(base, [*order, innermost.text]) for base in above for order in orders}


def _below(base: tuple[str, str], texts: list[str]) -> tuple[str, str]:
    path, module = base
    for text in texts:
        _, marker, rest = text.partition("'Module': '")
        if marker:
            path = module = _in_its_layer(rest.split("'")[0], module)
        else:
            name = re.sub(r", (seq|op_id) = \d+.*$", "", text)
            path = f"{path}/{name}" if path else name
    return path, module


def _in_its_layer(marker: str, module: str) -> str:
    """A shared module's marker with the layer's number of the module that calls it."""
    own, outer = marker.split("."), module.split(".")
    agree = 0
    while agree < min(len(own), len(outer)):
        pair = own[agree], outer[agree]
        if pair[0] != pair[1] and not all(re.fullmatch(r"\d+", each) for each in pair):
            break
        agree += 1
    return ".".join(outer[:agree] + own[agree:])


def _first(moments: list[Moment]) -> list[Moment | None]:
    """The earliest of them; several when they are equally early."""
    if not moments:
        return [None]
    first = min(time for _, time in moments)
    return [moment for moment in moments if moment[1] == first]
