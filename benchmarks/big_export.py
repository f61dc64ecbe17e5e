"""Make a big export by replicating a real one in its own schema.

    python benchmarks/big_export.py SMALL.sqlite[.gz] BIG.sqlite --kernels 5000000 [--eager]

Every copy is the real recording again, later: times, correlation ids, grid ids and graph nodes are
moved beyond the copy before, so that each kernel keeps its own launch, ranges and node. All else
(names, threads, machine, metadata, NVTX domains) is taken over once. ``--eager`` leaves out what
was replayed from graphs: then nearly every kernel has an API call of its own, the mix that is most
work to join.

SQLite copies row by row through its page cache of 2 MB: memory does not grow with the size.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
NVTX = "NVTX_EVENTS"
GRAPH_NODES = "CUDA_GRAPH_NODE_EVENTS"
# Pushed and started ranges and marks, inline and of the older nvtxt; every other type (domains,
# categories, names of threads and streams) is bookkeeping, said once (ENUM_NSYS_EVENT_TYPE).
NVTX_HAPPENINGS = (34, 59, 60, 65, 70, 71)
# Columns that identify within one recording.
IDS = ("correlationId", "gridId", "rangeId")
NODES = ("graphNodeId", "originalGraphNodeId")
GRAPHS = ("graphId", "originalGraphId", "graphExecId")
NODE_BITS = 32  # graphNodeId = graphId << 32 | index
GAP_NS = 1_000_000  # between the end of a copy and the start of the next

Tables = dict[str, list[str]]  # the columns of each table


def replicate(small: Path, big: Path, kernels: int, eager: bool = False) -> int:
    """Write ``big``, whole copies of ``small`` with at least ``kernels`` kernel rows.

    Returns:
        How many kernel rows it holds.

    Raises:
        ValueError: ``small`` holds no kernel (of the kind asked for) to replicate.
        OSError, sqlite3.Error: a file cannot be read or written. ``big`` is removed then.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.sqlite"
        _unpack(small, source)
        big.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(big, isolation_level=None)) as db:
                # Nothing is worth saving of a file that is not finished.
                db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
                db.execute("ATTACH ? AS src", (str(source),))
                tables = _tables(db)
                if eager:
                    _drop_replayed(db, tables)
                db.execute("BEGIN")
                made = _copy(db, tables, kernels, small)
                db.execute("COMMIT")
        except BaseException:
            big.unlink(missing_ok=True)
            raise
    return made


def _unpack(small: Path, to: Path) -> None:
    if small.suffix != ".gz":
        shutil.copyfile(small, to)
        return
    with gzip.open(small, "rb") as packed, to.open("wb") as plain:
        shutil.copyfileobj(packed, plain)


def _tables(db: sqlite3.Connection) -> Tables:
    names = db.execute(
        "SELECT name FROM src.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    return {
        name: [row[1] for row in db.execute(f'PRAGMA src.table_info("{name}")')]
        for (name,) in names
    }


def _events(tables: Tables) -> Tables:
    """The tables whose rows happened at a time; all others describe the recording."""
    return {name: columns for name, columns in tables.items() if {"start", "end"} <= set(columns)}


def _drop_replayed(db: sqlite3.Connection, tables: Tables) -> None:
    """Take out of the source what was launched by a graph, and the graphs' nodes."""
    for table, columns in tables.items():
        if table == GRAPH_NODES:
            db.execute(f"DELETE FROM src.{GRAPH_NODES}")
        elif "graphNodeId" in columns:
            db.execute(f'DELETE FROM src."{table}" WHERE graphNodeId IS NOT NULL')


def _copy(db: sqlite3.Connection, tables: Tables, kernels: int, small: Path) -> int:
    one = 0
    if KERNEL in tables:
        one = int(db.execute(f"SELECT count(*) FROM src.{KERNEL}").fetchone()[0])
    if one == 0:
        raise ValueError(f"{small}: no kernel to replicate")
    copies = max(1, -(-kernels // one))
    events = _events(tables)
    moves = _moves(db, events)
    for table, columns in tables.items():
        schema = "SELECT sql FROM src.sqlite_master WHERE type = 'table' AND name = ?"
        db.execute(db.execute(schema, (table,)).fetchone()[0])
        db.execute(f'INSERT INTO main."{table}" SELECT * FROM src."{table}"')
        if table not in events:
            continue
        moved = ", ".join(
            f'"{c}" + {moves[c]} * :copy' if c in moves else f'"{c}"' for c in columns
        )
        only = f" WHERE eventType IN {NVTX_HAPPENINGS}" if table == NVTX else ""
        statement = f'INSERT INTO main."{table}" SELECT {moved} FROM src."{table}"{only}'
        for copy in range(1, copies):
            db.execute(statement, {"copy": copy})
    return one * copies


def _moves(db: sqlite3.Connection, events: Tables) -> dict[str, int]:
    """By how much each column grows from one copy to the next: more than it spans in one."""
    # A push that was never popped has no end: it lies where it starts.
    spans = [
        db.execute(f'SELECT min(start), max(coalesce("end", start)) FROM src."{t}"').fetchone()
        for t in events
    ]
    first = min(begin for begin, _ in spans if begin is not None)
    last = max(end for _, end in spans if end is not None)
    moves = dict.fromkeys(("start", "end"), last - first + GAP_NS)
    moves |= {name: _largest(db, events, (name,)) + 1 for name in IDS}
    of_nodes = _largest(db, events, NODES) >> NODE_BITS
    graphs = max(of_nodes, _largest(db, events, GRAPHS)) + 1
    return moves | dict.fromkeys(NODES, graphs << NODE_BITS) | dict.fromkeys(GRAPHS, graphs)


def _largest(db: sqlite3.Connection, events: Tables, names: tuple[str, ...]) -> int:
    """The largest number in any of these columns of any table; 0 where there is none."""
    largest = 0
    for table, columns in events.items():
        for name in set(names) & set(columns):
            found = db.execute(f'SELECT max("{name}") FROM src."{table}"').fetchone()[0]
            largest = max(largest, found or 0)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("small", type=Path)
    parser.add_argument("big", type=Path)
    parser.add_argument("--kernels", type=int, default=5_000_000)
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    made = replicate(given.small, given.big, given.kernels, given.eager)
    print(f"{given.big}: {made:,} kernels, {given.big.stat().st_size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
