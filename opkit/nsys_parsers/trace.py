"""Open one export as DuckDB tables ``kernel`` and ``nvtx``, for alignment.

Joins follow ``kernels`` and ``ranges``; what a file must hold is checked by ``export``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from opkit.nsys_parsers import kernels, ranges
from opkit.nsys_parsers.export import Export, TraceFacts, attach, connect, open_export, unreadable


@dataclass(frozen=True)
class KernelCounts:
    """How much of the export was linked to its launch: counted, never hidden."""

    kernels: int
    copies: int
    unlinked: (
        int  # no launch row in the same process: the call began before the window, or was lost
    )
    graph: int  # replayed from a CUDA graph
    graph_unresolved: int  # replayed, but the node's creation is not in the export


@dataclass
class Trace:
    """An open export; use as a context manager. ``db`` holds tables ``kernel`` and ``nvtx``."""

    facts: TraceFacts
    counts: KernelCounts
    db: duckdb.DuckDBPyConnection
    _export: Export = field(repr=False)

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release DuckDB and the scratch folder."""
        self.db.close()
        self._export.close()

    def rows(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query over the trace's tables."""
        return self.db.execute(sql, parameters or []).fetchall()


def open_trace(path: Path) -> Trace:
    """Open an export and build its ``kernel`` and ``nvtx`` tables.

    Args:
        path: as ``export.open_export`` takes it.

    Raises:
        BadInput: as ``export.open_export``, or a table cannot be read to its end.
        ToolMissing: a report was given and nsys is not there to export it.
    """
    export = open_export(path)
    with contextlib.ExitStack() as on_error:
        on_error.callback(export.close)
        db = connect(export.scratch)
        on_error.callback(db.close)
        try:
            attach(db, export)
            kernels.build(db, export.columns)
            ranges.build(db, export.columns)
            counts = KernelCounts(*db.execute(kernels.COUNTS).fetchall()[0])
        except (duckdb.Error, UnicodeDecodeError) as error:
            raise unreadable(path, error) from error
        on_error.pop_all()
    return Trace(export.facts, counts, db, export)
