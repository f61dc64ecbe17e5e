"""Open one nsys SQLite export as a set of DuckDB tables: ``kernel``, ``nvtx``, and what nsys says
of itself.

An export may lack any table and any column (``nsys export`` writes a table only if it has rows),
so columns are asked for by name. Joins follow ``kernels``; this file checks that the input is what
it claims to be.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from opkit.errors import BadInput
from opkit.nsys_parsers import kernels, ranges
from opkit.nsys_parsers.tool import export_sqlite

SQLITE_MAGIC = b"SQLite format 3\x00"
GZIP_MAGIC = b"\x1f\x8b"
MANIFEST_TABLE = "OPKIT_MANIFEST"
# DuckDB's share of memory before it spills to disk; an export of some million kernels needs far
# less.
MEMORY_LIMIT = "4GB"


@dataclass(frozen=True)
class TraceFacts:
    """What an export says about itself.

    Attributes:
        path: the file given by the user.
        gpus: GPU names.
        nsys: version of the nsys that recorded it, when the export says so.
        schema: export schema version, when the export says so.
        graph_mode: ``node``, ``graph`` or empty when unknown.
        warnings: diagnostics that a reader should know, as nsys words them.
        losses: those of them that report lost events.
        manifest: opkit's own description of the run (JSON text), or empty.
        tables: tables present.
        duration_ns: from the first to the last GPU activity.
    """

    path: Path
    gpus: tuple[str, ...] = ()
    nsys: str = ""
    schema: str = ""
    graph_mode: str = ""
    warnings: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    manifest: str = ""
    tables: frozenset[str] = frozenset()
    duration_ns: int = 0


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
    _scratch: tempfile.TemporaryDirectory[str] = field(repr=False)

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
        self._scratch.cleanup()

    def rows(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query over the trace's tables."""
        return self.db.execute(sql, parameters or []).fetchall()


def open_trace(path: Path) -> Trace:
    """Open an export and build its ``kernel`` and ``nvtx`` tables.

    Args:
        path: a ``.sqlite`` file, the same gzipped, or a ``.nsys-rep`` / ``.qdrep`` report, which is
            exported first (needs nsys).

    Raises:
        BadInput: missing, empty, not an nsys export, truncated, without GPU kernels, or recorded
            with ``--cuda-graph-trace=graph`` so that the kernels inside graphs are not in it.
        ToolMissing: a report was given and nsys is not there to export it.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    scratch = tempfile.TemporaryDirectory(prefix="opkit-")
    with contextlib.ExitStack() as on_error:
        on_error.callback(scratch.cleanup)
        source = _as_sqlite(path, Path(scratch.name))
        facts = _read_facts(path, source)
        _refuse_unusable(facts)
        db = _connect(source, Path(scratch.name))
        on_error.callback(db.close)
        try:
            kernels.build(db, _columns(source))
            ranges.build(db, _columns(source))
            counts = KernelCounts(*db.execute(kernels.COUNTS).fetchall()[0])
        except duckdb.Error as error:
            raise BadInput(
                f"{path}: the export cannot be read to its end ({_first_line(error)})",
                "export the report again; a truncated copy or a full disk looks like this",
            ) from error
        if counts.kernels == 0:
            raise BadInput(f"{path}: the kernel table is empty; nothing ran on a GPU")
        on_error.pop_all()
    return Trace(facts, counts, db, scratch)


def _as_sqlite(path: Path, scratch: Path) -> Path:
    """The export itself: unpacked or exported into ``scratch`` when needed."""
    with path.open("rb") as file:
        magic = file.read(16)
    if not magic:
        raise BadInput(f"{path}: the file is empty")
    if path.suffix in (".nsys-rep", ".qdrep"):
        return export_sqlite(path, scratch / (path.stem + ".sqlite"))
    if magic.startswith(GZIP_MAGIC):
        target = scratch / "export.sqlite"
        try:
            with gzip.open(path, "rb") as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise BadInput(f"{path}: the gzip file is damaged ({error})") from error
        with target.open("rb") as file:
            magic = file.read(16)
        path_to_check = target
    else:
        path_to_check = path
    if magic != SQLITE_MAGIC:
        raise BadInput(
            f"{path}: not an SQLite file",
            "give a .sqlite made by `nsys export --type sqlite`, or the .nsys-rep itself",
        )
    _refuse_truncated(path, path_to_check)
    return path_to_check


def _refuse_truncated(path: Path, source: Path) -> None:
    """Compare the file with the size its header states (SQLite file format, bytes 16 to 31)."""
    with source.open("rb") as file:
        header = file.read(32)
    page = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    size = source.stat().st_size
    if len(header) < 32 or size < (65536 if page == 1 else page) * pages:
        raise BadInput(
            f"{path}: the SQLite file is truncated ({size:,} bytes)",
            "export the report again; a full disk or an interrupted copy looks like this",
        )


@contextlib.contextmanager
def _sqlite(source: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"file:{source}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        yield connection
    finally:
        connection.close()


def _columns(source: Path) -> dict[str, frozenset[str]]:
    """Column names of every table of the export."""
    with _sqlite(source) as connection:
        names = [
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {
            name: frozenset(row[1] for row in connection.execute(f'PRAGMA table_info("{name}")'))
            for name in names
        }


def _read_facts(path: Path, source: Path) -> TraceFacts:
    try:
        columns = _columns(source)
        with _sqlite(source) as connection:
            return TraceFacts(
                path=path,
                gpus=_gpus(connection, columns),
                nsys=_meta(connection, columns, "META_DATA_EXPORT", "EXPORT_PRODUCT_VERSION")
                or _meta(connection, columns, "META_DATA_CAPTURE", "%NSYS_VERSION%"),
                schema=_meta(connection, columns, "META_DATA_EXPORT", "EXPORT_SCHEMA_VERSION")
                or _meta(connection, columns, "EXPORT_META_DATA", "EXPORT_SCHEMA_VERSION"),
                graph_mode=_meta(
                    connection, columns, "META_DATA_CAPTURE", "%CUDA_GRAPH_TRACE_OPTIONS:MODE"
                ).lower(),
                warnings=_diagnostics(connection, columns, REMARK_WORDS),
                losses=_diagnostics(connection, columns, LOSS_WORDS),
                manifest=_manifest(connection, columns),
                tables=frozenset(columns),
            )
    except sqlite3.Error as error:
        raise BadInput(
            f"{path}: the SQLite file is damaged or truncated ({error})",
            "export the report again with `nsys export --type sqlite`",
        ) from error


def _gpus(connection: sqlite3.Connection, columns: dict[str, frozenset[str]]) -> tuple[str, ...]:
    for table in ("TARGET_INFO_GPU", "TARGET_INFO_CUDA_DEVICE"):
        if "name" in columns.get(table, frozenset()):
            rows = connection.execute(f'SELECT name FROM "{table}"').fetchall()
            return tuple(str(row[0]) for row in rows if row[0])
    return ()


def _meta(
    connection: sqlite3.Connection, columns: dict[str, frozenset[str]], table: str, name: str
) -> str:
    if not {"name", "value"} <= columns.get(table, frozenset()):
        return ""
    row = connection.execute(
        f'SELECT value FROM "{table}" WHERE name LIKE ? ORDER BY name LIMIT 1', (name,)
    ).fetchone()
    return str(row[0]) if row and row[0] is not None else ""


# Diagnostics that report a loss. "Not all CUDA events might have been collected" is none: nsys
# writes it for every window that opens in a running process; what was cut shows as unlinked
# kernels.
LOSS_WORDS = ("lost", "dropped", "buffer full", "overflow", "exceeded")
REMARK_WORDS = (*LOSS_WORDS, "not all", "not supported", "might have not")


def _diagnostics(
    connection: sqlite3.Connection, columns: dict[str, frozenset[str]], words: tuple[str, ...]
) -> tuple[str, ...]:
    if "text" not in columns.get("DIAGNOSTIC_EVENT", frozenset()):
        return ()
    texts = {str(row[0]) for row in connection.execute("SELECT text FROM DIAGNOSTIC_EVENT")}
    return tuple(sorted(t for t in texts if any(word in t.lower() for word in words)))


def _manifest(connection: sqlite3.Connection, columns: dict[str, frozenset[str]]) -> str:
    if MANIFEST_TABLE not in columns:
        return ""
    row = connection.execute(f"SELECT value FROM {MANIFEST_TABLE} WHERE key='manifest'").fetchone()
    return str(row[0]) if row else ""


def _refuse_unusable(facts: TraceFacts) -> None:
    tables = facts.tables
    if not tables & {"StringIds", "META_DATA_EXPORT", "EXPORT_META_DATA", "TARGET_INFO_SYSTEM_ENV"}:
        raise BadInput(
            f"{facts.path}: an SQLite file, but not an nsys export (no table that nsys writes)"
            if tables
            else f"{facts.path}: an SQLite file without any table"
        )
    if kernels.KERNEL_TABLE in tables:
        return
    if "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" in tables:
        raise BadInput(
            f"{facts.path}: recorded with --cuda-graph-trace=graph, so the kernels inside CUDA "
            "graphs are not in it",
            "record again with --cuda-graph-trace=node",
        )
    has = "NVTX ranges only" if "NVTX_EVENTS" in tables else "no GPU activity"
    raise BadInput(
        f"{facts.path}: no GPU kernels in this export ({has})",
        "record with `-t cuda,nvtx` and make sure that the traced process is the one using the GPU",
    )


def _connect(source: Path, scratch: Path) -> duckdb.DuckDBPyConnection:
    """DuckDB with its SQLite scanner from the wheel: nothing is downloaded at run time."""
    import duckdb_extension_sqlite_scanner as scanner

    extension = next(Path(scanner.__file__).parent.rglob("sqlite_scanner.duckdb_extension"), None)
    if extension is None:
        raise BadInput("the duckdb-extension-sqlite-scanner package holds no extension file")
    db = duckdb.connect(
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(scratch / "spill"),
        }
    )
    db.execute(f"LOAD '{extension}'")
    quoted = str(source).replace("'", "''")
    db.execute(f"ATTACH '{quoted}' AS export (TYPE sqlite, READ_ONLY)")
    return db


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def manifest_dict(facts: TraceFacts) -> dict[str, Any]:
    """The manifest as plain data, or an empty dict when the export carries none."""
    if not facts.manifest:
        return {}
    data = json.loads(facts.manifest)
    return data if isinstance(data, dict) else {}
