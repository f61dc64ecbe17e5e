"""Open one nsys SQLite export: check that it is what it claims to be, read what it says of itself,
attach it to DuckDB.

An export may lack any table and any column (``nsys export`` writes a table only if it has rows),
so columns are asked for by name.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import duckdb

from opkit.errors import BadInput, ToolMissing
from opkit.nsys_parsers.reading import MEMORY_LIMIT, utf8
from opkit.nsys_parsers.tool import export_sqlite

SQLITE_MAGIC = b"SQLite format 3\x00"
GZIP_MAGIC = b"\x1f\x8b"
MANIFEST_TABLE = "OPKIT_MANIFEST"
KERNEL_TABLE = "CUPTI_ACTIVITY_KIND_KERNEL"
GRAPH_TABLE = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"

Columns = dict[str, frozenset[str]]


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
        epoch_ns: start of the session in ns since 1970, zero of all times in it; None if unknown.
        whole_graphs: launches recorded as one (``--cuda-graph-trace=graph``): the kernels inside
            are not in the export.
        whole_graphs_ns: GPU time of those.
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
    epoch_ns: int | None = None
    whole_graphs: int = 0
    whole_graphs_ns: int = 0


@dataclass
class Export:
    """An export at hand; use as a context manager.

    Attributes:
        facts: what it says of itself.
        source: the SQLite file: the user's own, or an unpacked or exported copy in ``scratch``.
        columns: column names of every table.
        scratch: a folder that goes when the export is closed.
    """

    facts: TraceFacts
    source: Path
    columns: Columns
    scratch: Path
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the scratch folder."""
        self._folder.cleanup()


def open_export(path: Path) -> Export:
    """Find, unpack or export the file, and read its facts.

    Args:
        path: a ``.sqlite`` file, the same gzipped, or a ``.nsys-rep`` / ``.qdrep`` report, which is
            exported first (needs nsys).

    Raises:
        BadInput: missing, empty, not an nsys export, truncated, without GPU kernels, or recorded
            with ``--cuda-graph-trace=graph`` so that there is no kernel in it.
        ToolMissing: a report was given and nsys is not there to export it.
    """
    utf8("the file", str(path))
    if not path.is_file():
        raise BadInput(f"{path}: {'a folder, not a trace' if path.is_dir() else 'no such file'}")
    folder = tempfile.TemporaryDirectory(prefix="opkit-")
    with contextlib.ExitStack() as on_error:
        on_error.callback(folder.cleanup)
        source = _as_sqlite(path, Path(folder.name))
        facts, columns = _read_facts(path, source)
        on_error.pop_all()
    return Export(facts, source, columns, Path(folder.name), folder)


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
        except (EOFError, gzip.BadGzipFile, OSError, zlib.error) as error:
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
    return _without_log(path_to_check, scratch)


def _without_log(source: Path, scratch: Path) -> Path:
    """The file itself, or a copy if it is in write-ahead-log mode: reading such a one would leave
    files beside it (SQLite file format, bytes 18 and 19)."""
    with source.open("rb") as file:
        modes = file.read(20)[18:]
    if 2 not in modes:
        return source
    copy = scratch / "copy.sqlite"
    shutil.copyfile(source, copy)
    log = source.with_name(source.name + "-wal")
    if log.is_file():
        shutil.copyfile(log, copy.with_name(copy.name + "-wal"))
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise BadInput(
            f"{source}: the SQLite file is damaged or truncated ({first_line(error)})",
            "export the report again with `nsys export --type sqlite`",
        ) from error
    return copy


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
    connection = sqlite3.connect(f"file:{quote(str(source))}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        yield connection
    finally:
        connection.close()


def _columns(source: Path) -> Columns:
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


def _read_facts(path: Path, source: Path) -> tuple[TraceFacts, Columns]:
    try:
        columns = _columns(source)
        with _sqlite(source) as connection:
            rows = _Rows(connection, columns)
            graphs, graphs_ns = rows.one(
                GRAPH_TABLE, "count(*), coalesce(sum(end - start), 0)", ("start", "end"), (0, 0)
            )
            facts = TraceFacts(
                path=path,
                gpus=_gpus(rows),
                nsys=rows.meta("META_DATA_EXPORT", "EXPORT_PRODUCT_VERSION")
                or rows.meta("META_DATA_CAPTURE", "%NSYS_VERSION%"),
                schema=rows.meta("META_DATA_EXPORT", "EXPORT_SCHEMA_VERSION")
                or rows.meta("EXPORT_META_DATA", "EXPORT_SCHEMA_VERSION"),
                graph_mode=rows.meta("META_DATA_CAPTURE", "%CUDA_GRAPH_TRACE_OPTIONS:MODE").lower(),
                warnings=_diagnostics(rows, REMARK_WORDS),
                losses=_diagnostics(rows, LOSS_WORDS),
                manifest=_manifest(rows),
                tables=frozenset(columns),
                epoch_ns=_epoch(rows),
                whole_graphs=int(graphs),
                whole_graphs_ns=int(graphs_ns),
            )
            _refuse_unusable(facts, rows)
            return facts, columns
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise BadInput(
            f"{path}: the SQLite file is damaged or truncated ({first_line(error)})",
            "export the report again with `nsys export --type sqlite`",
        ) from error


@dataclass(frozen=True)
class _Rows:
    """Small questions to an export whose tables and columns may be missing."""

    connection: sqlite3.Connection
    columns: Columns

    def all(self, table: str, what: str, needs: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """Rows of ``what``, none when the table lacks a needed column."""
        if not set(needs) <= self.columns.get(table, frozenset()):
            return []
        return self.connection.execute(f'SELECT {what} FROM "{table}"').fetchall()

    def one(
        self, table: str, what: str, needs: tuple[str, ...], otherwise: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """The first row, or ``otherwise``."""
        rows = self.all(table, what, needs)
        return rows[0] if rows else otherwise

    def meta(self, table: str, name: str) -> str:
        """The first value whose name is like ``name``, or empty."""
        if not {"name", "value"} <= self.columns.get(table, frozenset()):
            return ""
        row = self.connection.execute(
            f'SELECT value FROM "{table}" WHERE name LIKE ? ORDER BY name LIMIT 1', (name,)
        ).fetchone()
        return str(row[0]) if row and row[0] is not None else ""

    def count(self, table: str) -> int:
        """Rows of a table, 0 when it is missing."""
        return int(self.one(table, "count(*)", (), (0,))[0]) if table in self.columns else 0


def _gpus(rows: _Rows) -> tuple[str, ...]:
    """GPU names. On Windows other vendors' adapters are listed too, without multiprocessors."""
    for table in ("TARGET_INFO_GPU", "TARGET_INFO_CUDA_DEVICE"):
        counted = "smCount" if "smCount" in rows.columns.get(table, ()) else "NULL"
        found = rows.all(table, f"name, {counted}", ("name",))
        if found:
            return tuple(str(name) for name, count in found if name and count != 0)
    return ()


def _epoch(rows: _Rows) -> int | None:
    epoch = rows.one("TARGET_INFO_SESSION_START_TIME", "utcEpochNs", ("utcEpochNs",), (None,))[0]
    return epoch if isinstance(epoch, int) else None


# Diagnostics that report a loss. "Not all CUDA events might have been collected" is none: nsys
# writes it for every window that opens in a running process; what was cut shows as unlinked
# kernels.
LOSS_WORDS = ("lost", "dropped", "buffer full", "overflow", "exceeded")
REMARK_WORDS = (*LOSS_WORDS, "not all", "not supported", "might have not")


def _diagnostics(rows: _Rows, words: tuple[str, ...]) -> tuple[str, ...]:
    texts = {str(row[0]) for row in rows.all("DIAGNOSTIC_EVENT", "text", ("text",))}
    return tuple(sorted(t for t in texts if any(word in t.lower() for word in words)))


def _manifest(rows: _Rows) -> str:
    found = dict(rows.all(MANIFEST_TABLE, "key, value", ("key", "value")))
    return str(found.get("manifest") or "")


def _refuse_unusable(facts: TraceFacts, rows: _Rows) -> None:
    tables = facts.tables
    if not tables & {"StringIds", "META_DATA_EXPORT", "EXPORT_META_DATA", "TARGET_INFO_SYSTEM_ENV"}:
        raise BadInput(
            f"{facts.path}: an SQLite file, but not an nsys export (no table that nsys writes)"
            if tables
            else f"{facts.path}: an SQLite file without any table"
        )
    if rows.count(KERNEL_TABLE):
        missing = {"start", "end", "deviceId", "streamId", "correlationId"} - rows.columns[
            KERNEL_TABLE
        ]
        if missing:
            raise BadInput(
                f"{facts.path}: the kernel table lacks {', '.join(sorted(missing))}; no nsys known "
                "writes it so",
                "export the report again with `nsys export --type sqlite`",
            )
        if not rows.count("StringIds"):
            raise BadInput(
                f"{facts.path}: the export holds no names (StringIds), so no kernel can be told "
                "from another",
                "export the report again with `nsys export --type sqlite`",
            )
        return
    if facts.whole_graphs or (GRAPH_TABLE in tables and KERNEL_TABLE not in tables):
        raise BadInput(
            f"{facts.path}: recorded with --cuda-graph-trace=graph, so the kernels inside CUDA "
            f"graphs are not in it ({facts.whole_graphs:,} graph launches are)",
            "record again with --cuda-graph-trace=node",
        )
    copies = rows.count("CUPTI_ACTIVITY_KIND_MEMCPY") + rows.count("CUPTI_ACTIVITY_KIND_MEMSET")
    if copies:
        has = f"{copies:,} copies and fills only"
    elif ranges := rows.count("NVTX_EVENTS"):
        has = f"{ranges:,} NVTX events, but no GPU activity"
    else:
        has = "no GPU activity"
    empty = ": the kernel table is empty" if KERNEL_TABLE in tables else ""
    raise BadInput(
        f"{facts.path}: no GPU kernels in this export{empty} ({has})",
        "record with `-t cuda,nvtx` and make sure that the traced process is the one using the GPU",
    )


def connect(scratch: Path, memory: str = MEMORY_LIMIT) -> duckdb.DuckDBPyConnection:
    """DuckDB, in memory.

    Args:
        scratch: what does not fit into ``memory`` is spilled below this folder.
        memory: DuckDB's limit, as ``1GB`` or ``512MB``.

    Raises:
        BadInput: ``memory`` is not a size.
    """
    try:
        db = duckdb.connect(
            config={
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "memory_limit": memory,
                "temp_directory": str(scratch / "spill"),
                # Rows carry what orders them; keeping the file's order costs memory and time.
                "preserve_insertion_order": False,
            }
        )
    except duckdb.Error as error:
        raise BadInput(
            f"{memory!r} is no amount of memory ({first_line(error)})", "give it as 1GB or 512MB"
        ) from error
    return db


def attach(db: duckdb.DuckDBPyConnection, export: Export) -> None:
    """Make the export's tables readable as ``export.NAME``, by the SQLite scanner that the wheel
    brings: nothing is downloaded at run time.

    Raises:
        ToolMissing: the scanner's package holds no extension, or not of duckdb's version.
    """
    import duckdb_extension_sqlite_scanner as scanner

    extension = next(Path(scanner.__file__).parent.rglob("sqlite_scanner.duckdb_extension"), None)
    if extension is None:
        raise ToolMissing("the duckdb-extension-sqlite-scanner package holds no extension file")
    try:
        db.execute(f"LOAD '{quoted(extension)}'")
    except duckdb.Error as error:
        raise ToolMissing(
            f"duckdb does not load its SQLite scanner ({first_line(error)})",
            "install duckdb and duckdb-extension-sqlite-scanner of the same version",
        ) from error
    db.execute(f"ATTACH '{quoted(export.source)}' AS export (TYPE sqlite, READ_ONLY)")


def unreadable(path: Path, error: Exception) -> BadInput:
    """What to say when a table cannot be read to its end."""
    if isinstance(error, duckdb.OutOfMemoryException):
        return BadInput(
            f"{path}: reading it takes more memory than it may use ({first_line(error)})",
            "give it more by --memory",
        )
    return BadInput(
        f"{path}: the export cannot be read to its end ({first_line(error)})",
        "export the report again; a truncated copy or a full disk looks like this",
    )


def quoted(path: Path) -> str:
    """The path inside an SQL string."""
    return str(path).replace("'", "''")


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().split("\n", 1)[0]


def manifest_dict(facts: TraceFacts) -> dict[str, Any]:
    """The manifest as plain data, or an empty dict when the export carries none."""
    if not facts.manifest:
        return {}
    data = json.loads(facts.manifest)
    return data if isinstance(data, dict) else {}
