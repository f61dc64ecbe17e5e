"""Make a big export by replicating a real one in its own schema.

    python benchmarks/big_export.py SMALL.sqlite[.gz] BIG.sqlite --kernels 5000000 [--eager]

Every copy is the real recording again, later: times, correlation ids and graph nodes are shifted, so
that each kernel keeps its own launch, range and node. All else (names, threads, machine, metadata) is
taken over once. ``--eager`` leaves out what was replayed from graphs: then nearly every kernel has an
API call of its own, the mix that is most work to join.
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
# Tables whose rows are events of the run; by how much each column moves a copy.
EVENTS = (
    KERNEL,
    "CUPTI_ACTIVITY_KIND_MEMCPY",
    "CUPTI_ACTIVITY_KIND_MEMSET",
    "CUPTI_ACTIVITY_KIND_RUNTIME",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION",
    "CUDA_GRAPH_NODE_EVENTS",
    "NVTX_EVENTS",
)
NODE_BITS = 32  # graphNodeId = graphId << 32 | index
GAP_NS = 1_000_000


def replicate(small: Path, big: Path, kernels: int, eager: bool = False) -> int:
    """Write ``big`` with at least ``kernels`` kernel rows; returns how many it holds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.sqlite"
        opened = gzip.open if small.suffix == ".gz" else open
        with opened(small, "rb") as packed, source.open("wb") as plain:  # type: ignore[operator]
            shutil.copyfileobj(packed, plain)
        big.unlink(missing_ok=True)
        with closing(sqlite3.connect(big)) as db:
            db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
            db.execute("ATTACH ? AS src", (str(source),))
            if eager:
                _drop_replayed(db)
            _copy(db, kernels)
            db.commit()
            return int(db.execute(f"SELECT count(*) FROM {KERNEL}").fetchone()[0])


def _drop_replayed(db: sqlite3.Connection) -> None:
    for table in EVENTS[:3]:
        db.execute(f"DELETE FROM src.{table} WHERE graphNodeId IS NOT NULL")
    db.execute("DELETE FROM src.CUDA_GRAPH_NODE_EVENTS")


def _copy(db: sqlite3.Connection, kernels: int) -> None:
    one = int(db.execute(f"SELECT count(*) FROM src.{KERNEL}").fetchone()[0])
    copies = -(-kernels // one)
    moves = _moves(db)
    schema = db.execute("SELECT name, sql FROM src.sqlite_master WHERE type = 'table'").fetchall()
    for table, sql in schema:
        db.execute(sql)
        columns = [row[1] for row in db.execute(f'PRAGMA src.table_info("{table}")')]
        if table not in EVENTS:
            db.execute(f'INSERT INTO main."{table}" SELECT * FROM src."{table}"')
            continue
        moved = ", ".join(
            f'"{c}" + ({moves[c]} * ?)' if c in moves else f'"{c}"' for c in columns
        )
        count = sum(c in moves for c in columns)
        for copy in range(copies):
            db.execute(
                f'INSERT INTO main."{table}" SELECT {moved} FROM src."{table}"', (copy,) * count
            )


def _moves(db: sqlite3.Connection) -> dict[str, int]:
    """By how much a column grows from one copy to the next."""
    first, last, correlation = db.execute(
        f"SELECT min(start), max(end), max(correlationId) FROM src.{KERNEL}"
    ).fetchone()
    for table in ("NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_RUNTIME", "CUDA_GRAPH_NODE_EVENTS"):
        begin, end = db.execute(f"SELECT min(start), max(end) FROM src.{table}").fetchone()
        if begin is not None:
            first, last = min(first, begin), max(last, end or begin)
    graphs = db.execute("SELECT max(graphNodeId) FROM src.CUDA_GRAPH_NODE_EVENTS").fetchone()[0] or 0
    span = last - first + GAP_NS
    nodes = ((graphs >> NODE_BITS) + 1) << NODE_BITS
    return {
        "start": span, "end": span, "correlationId": correlation + 1,
        "graphNodeId": nodes, "originalGraphNodeId": nodes, "graphId": nodes >> NODE_BITS,
    }  # fmt: skip


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
