"""Ways to spoil one side of a true pair: rows of its export are edited.

``Side`` knows which rows are the op's kernels: executions at every place of every region.
"""

from __future__ import annotations

import gzip
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opkit.align.engine import Search, read_engine
from opkit.align.judge import Question
from opkit.align.regions import Launch, Region, mock_regions
from opkit.layers.dsa import DSA
from opkit.layers.op import Case
from opkit.nsys_parsers.trace import open_trace

TABLES = {"[memcpy": "CUPTI_ACTIVITY_KIND_MEMCPY", "[memset": "CUPTI_ACTIVITY_KIND_MEMSET"}
KERNEL, RUNTIME = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
LOST = 0.10  # share of launches that the loss mutations lose
FOREIGN = "void another::kernel_that_nobody_knows<(int)1>(float *)"

# (mutation, verdict) → how often, for the summary that conftest prints.
COUNTS: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Execution:
    """One row of an activity table."""

    table: str
    start: int
    end: int
    name: str

    @property
    def where(self) -> str:
        return f"start = {self.start} AND end = {self.end}"


Regions = dict[Case, list[list[Execution]]]  # case → regions → executions in launch order


class Side:
    """One side of the pair: its plain SQLite file and the op's regions in it."""

    def __init__(self, path: Path, regions: Regions) -> None:
        self.path = path
        self.regions = regions

    def executions(self) -> Iterator[Execution]:
        """All of the op's kernels."""
        for regions in self.regions.values():
            for region in regions:
                yield from region


class Pair:
    """Both sides. (No dataclass: a failing test would print every kernel.)"""

    def __init__(self, mock: Side, e2e: Side) -> None:
        self.mock = mock
        self.e2e = e2e

    def question(self, mock: Path | None = None, e2e: Path | None = None) -> Question:
        """What is asked of the pair, with either file replaced."""
        return Question(DSA, mock or self.mock.path, (e2e or self.e2e.path,))


def read_pair(mock: Path, e2e: Path, folder: Path) -> Pair:
    """Unpack both files into ``folder`` and find the op's rows."""
    files = []
    for path in (mock, e2e):
        plain = folder / path.name.removesuffix(".gz")
        packed = path.suffix == ".gz"
        plain.write_bytes(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        files.append(plain)
    with open_trace(files[0]) as trace:
        found = mock_regions(trace, "dsa")
    engine = read_engine((files[1],), Search(DSA, "vllm", found))
    # A shape that the mock did not run is no part of the verdict: nothing to spoil there.
    ran = {(r.case.phase, r.case.batch, r.case.tokens) for r in found}
    e2e_found = [
        region
        for case, parts in engine.cases.items()
        if (case.phase, case.batch, case.tokens) in ran
        for part in parts
        for region in part.regions
    ]
    return Pair(Side(files[0], _by_case(found)), Side(files[1], _by_case(e2e_found)))


def _by_case(regions: list[Region]) -> Regions:
    found: Regions = {}
    for region in regions:
        found.setdefault(region.case, []).append([_execution(x) for x in region.launches])
    return found


def _execution(launch: Launch) -> Execution:
    name = launch.name.demangled
    return Execution(TABLES.get(name[:7], KERNEL), launch.start, launch.end, name)


@contextmanager
def edited(side: Side, target: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the side's file, open for editing."""
    target.write_bytes(side.path.read_bytes())
    with closing(sqlite3.connect(target)) as db:
        yield db
        db.commit()


Chosen = list[Execution]
Edit = Callable[[sqlite3.Connection, Chosen], None]


def drop(db: sqlite3.Connection, chosen: Chosen) -> None:
    """The kernel was never launched."""
    for one in chosen:
        assert db.execute(f"DELETE FROM {one.table} WHERE {one.where}").rowcount == 1


def duplicate(db: sqlite3.Connection, chosen: Chosen) -> None:
    """The kernel runs a second time, right after the first."""
    for one in chosen:
        columns = _columns(db, one.table)
        later = [{"start": "end + 1", "end": "2 * end - start + 1"}.get(c, c) for c in columns]
        db.execute(
            f"INSERT INTO {one.table} ({', '.join(columns)}) "
            f"SELECT {', '.join(later)} FROM {one.table} WHERE {one.where}"
        )


def rename(db: sqlite3.Connection, chosen: Chosen) -> None:
    """Another kernel runs in its place; a copy or fill becomes a kernel's peer of another kind."""
    number = _string(db, FOREIGN)
    for one in chosen:
        if one.table == KERNEL:
            db.execute(f"UPDATE {KERNEL} SET demangledName = {number} WHERE {one.where}")
        else:
            _as_kernel(db, one, number)


def stretch(db: sqlite3.Connection, chosen: Chosen) -> None:
    """The kernel takes three times as long."""
    for one in chosen:
        db.execute(f"UPDATE {one.table} SET end = start + 3 * (end - start) WHERE {one.where}")


def swap(db: sqlite3.Connection, one: Execution, other: Execution) -> None:
    """Two kernels of a region run in each other's place, each with its own name, grid and time."""
    kinds = ("demangledName", "shortName", "gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ")
    read = f"SELECT {', '.join(kinds)} FROM {KERNEL} WHERE "
    rows = [db.execute(read + x.where).fetchone() for x in (one, other)]
    spans = (one.end - one.start, other.end - other.start)
    # Mark first: after the first edit a row may look like the second one.
    ids = [
        db.execute(f"SELECT rowid FROM {KERNEL} WHERE {x.where}").fetchone()[0]
        for x in (one, other)
    ]
    marks = ", ".join(f"{kind} = ?" for kind in kinds)
    for rowid, row, span in zip(ids, rows[::-1], spans[::-1], strict=True):
        db.execute(f"UPDATE {KERNEL} SET {marks}, end = start + {span} WHERE rowid = {rowid}", row)


def lose_calls(
    db: sqlite3.Connection, side: Side, noise: random.Random, graphs: bool = False
) -> int:
    """One in ten calls that launched the op is not in the export; ``graphs``: of graph launches."""
    only = "AND k.graphNodeId IS NOT NULL" if graphs else ""
    db.execute("CREATE TEMP TABLE op (start, end)")
    db.executemany("INSERT INTO op VALUES (?, ?)", [(x.start, x.end) for x in side.executions()])
    calls = db.execute(
        f"SELECT DISTINCT r.rowid FROM op JOIN {KERNEL} k ON (k.start, k.end) = (op.start, op.end) "
        f"JOIN {RUNTIME} r ON r.correlationId = k.correlationId {only}"
    ).fetchall()
    lost = noise.sample(calls, max(1, round(LOST * len(calls))))
    db.executemany(f"DELETE FROM {RUNTIME} WHERE rowid = ?", lost)
    return len(lost)


def lose_kernels(db: sqlite3.Connection, noise: random.Random) -> int:
    """One in ten kernel records is not in the export."""
    rows = db.execute(f"SELECT rowid FROM {KERNEL}").fetchall()
    lost = noise.sample(rows, max(1, round(LOST * len(rows))))
    db.executemany(f"DELETE FROM {KERNEL} WHERE rowid = ?", lost)
    return len(lost)


def merge_process(db: sqlite3.Connection, noise: random.Random) -> int:
    """A second process ran the same program some time off; its rows get the first one's ids."""
    off = noise.choice((-1, 1)) * noise.randrange(1_000, 1_000_000_000)
    added = 0
    for table in (KERNEL, RUNTIME):
        columns = _columns(db, table)
        moved = [f"{c} + {off}" if c in ("start", "end") else c for c in columns]
        some = f"correlationId % 4 <> {noise.randrange(4)}"
        added += db.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) "
            f"SELECT {', '.join(moved)} FROM {table} WHERE {some}"
        ).rowcount
    return added


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def _string(db: sqlite3.Connection, text: str) -> int:
    """The id of a text, added when it is not there."""
    found = db.execute("SELECT id FROM StringIds WHERE value = ?", (text,)).fetchone()
    if found is None:
        number = db.execute("SELECT max(id) + 1 FROM StringIds").fetchone()[0]
        db.execute("INSERT INTO StringIds (id, value) VALUES (?, ?)", (number, text))
        return int(number)
    return int(found[0])


def _as_kernel(db: sqlite3.Connection, one: Execution, name: int) -> None:
    """Move a copy or fill into the kernel table under the name."""
    info = db.execute(f"PRAGMA table_info({KERNEL})").fetchall()
    have = set(_columns(db, one.table))
    cells = [
        str(name) if row[1] in ("demangledName", "shortName")
        else row[1] if row[1] in have
        else "0" if row[3] else "NULL"
        for row in info
    ]  # fmt: skip
    db.execute(f"INSERT INTO {KERNEL} SELECT {', '.join(cells)} FROM {one.table} WHERE {one.where}")
    db.execute(f"DELETE FROM {one.table} WHERE {one.where}")
