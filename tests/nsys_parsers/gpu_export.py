"""Exports for tests, said in kernels, calls, graph nodes and ranges; the schema of nsys 2024.2.3.

Like ``nsys export`` it writes a table only if it has rows. Times are ns.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from made_export import OTHER_PID, PID, SCHEMA, TID

KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
NODES = "CUDA_GRAPH_NODE_EVENTS"
NVTX = "NVTX_EVENTS"
OTHER_TID = OTHER_PID + 5
Dim = tuple[int, int, int]


class Export:
    """Collects rows; ``write`` makes the file."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._strings: dict[str, int] = {}
        self._correlation = 0
        self.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.11.1")
        self.add("TARGET_INFO_GPU", name="NVIDIA H100 80GB HBM3")

    def add(self, table: str, **cells: Any) -> None:
        """A row of any table; columns that must not be null and are not given become 0."""
        self.rows[table].append(cells)

    def string(self, text: str) -> int:
        """The id of ``text`` in ``StringIds``."""
        return self._strings.setdefault(text, len(self._strings) + 1)

    def correlation(self) -> int:
        """A correlation id not given before."""
        self._correlation += 1
        return self._correlation

    def call(self, start: int, correlation: int, tid: int = TID, api: str = "cudaLaunch") -> None:
        """An API call on the CPU."""
        self.add(
            RUNTIME, start=start, end=start + 50, globalTid=tid, correlationId=correlation,
            nameId=self.string(api),
        )  # fmt: skip

    def kernel(
        self,
        name: str,
        start: int,
        correlation: int,
        *,
        ns: int = 1_000,
        pid: int = PID,
        node: int | None = None,
        stream: int = 7,
        grid: Dim = (132, 1, 1),
        block: Dim = (256, 1, 1),
    ) -> None:
        """An execution on the GPU; ``[memset]`` and ``[memcpy DtoD]`` go to their own tables."""
        cells: dict[str, Any] = {
            "start": start, "end": start + ns, "streamId": stream, "correlationId": correlation,
            "globalPid": pid, "graphNodeId": node,
        }  # fmt: skip
        if name == "[memset]":
            self.add("CUPTI_ACTIVITY_KIND_MEMSET", **cells)
        elif name == "[memcpy DtoD]":
            self.add("CUPTI_ACTIVITY_KIND_MEMCPY", copyKind=8, **cells)
        else:
            number = self.string(name)
            dims = zip(("gridX", "gridY", "gridZ"), grid, strict=True)
            blocks = zip(("blockX", "blockY", "blockZ"), block, strict=True)
            cells |= {"demangledName": number, "shortName": number}
            self.add(KERNEL, **cells, **dict(dims), **dict(blocks))

    def launch(self, name: str, called: int, start: int, tid: int = TID, **more: Any) -> None:
        """A call and the kernel that it launches, in one process."""
        correlation = self.correlation()
        self.call(called, correlation, tid)
        self.kernel(name, start, correlation, pid=tid & ~0xFFFFFF, **more)

    def node(self, node: int, start: int, origin: int | None = None, tid: int = TID) -> None:
        """The creation of a graph node, or of its clone when ``origin`` is given."""
        self.add(
            NODES, start=start, end=start + 1, globalTid=tid, graphNodeId=node,
            originalGraphNodeId=origin,
        )  # fmt: skip

    def range(
        self,
        text: str,
        start: int,
        end: int | None,
        *,
        tid: int = TID,
        registered: bool = False,
        kind: int = 59,
    ) -> None:
        """An NVTX range, its text inline or in ``StringIds``; ``end`` None: still open."""
        said = {"textId": self.string(text)} if registered else {"text": text}
        self.add(NVTX, start=start, end=end, eventType=kind, globalTid=tid, **said)

    def manifest(self, text: str) -> None:
        """opkit's own table, as the export step adds it."""
        self.add("OPKIT_MANIFEST", key="manifest", value=text)

    def write(self, path: Path, without: Iterable[str] = ()) -> Path:
        """Write the export, less tables (``NAME``) and columns (``NAME.column``) in ``without``."""
        db = sqlite3.connect(path)
        db.executescript(SCHEMA)
        if "OPKIT_MANIFEST" in self.rows:
            db.execute("CREATE TABLE OPKIT_MANIFEST (key TEXT, value TEXT)")
        for text, number in self._strings.items():
            db.execute("INSERT INTO StringIds VALUES (?, ?)", (number, text))
        for table, rows in self.rows.items():
            insert(db, table, rows)
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            if db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0:
                db.execute(f"DROP TABLE {table}")
        for what in without:
            table, _, column = what.partition(".")
            drop = f"ALTER TABLE {table} DROP COLUMN {column}" if column else f"DROP TABLE {table}"
            db.execute(drop)
        db.commit()
        db.close()
        return path


def insert(db: sqlite3.Connection, table: str, rows: list[dict[str, Any]]) -> None:
    """Insert rows that need not name the same columns."""
    info = db.execute(f"PRAGMA table_info({table})").fetchall()
    default = {row[1]: 0 if row[3] else None for row in info}
    marks = ", ".join("?" * len(default))
    values = [tuple((default | row).values()) for row in rows]
    assert all(len(value) == len(default) for value in values), f"unknown column in {table}"
    db.executemany(f"INSERT INTO {table} VALUES ({marks})", values)


def module(path: str, outputs: bool = False) -> str:
    """A layerwise marker as vLLM and TensorRT-LLM write it."""
    more = ", 'Outputs': [[4, 7168]]" if outputs else ", 'Inputs': [[4, 7168]]"
    return f"{{'Module': '{path}', 'TrainableParams': {{}}{more}}}"
