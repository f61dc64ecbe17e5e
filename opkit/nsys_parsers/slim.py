"""Make a recording small and clean enough to be kept in a repository.

An export holds what ran on the GPU, and beside it the environment, command lines, hosts and users
of the machine. ``slim`` copies what alignment reads, by table and column name, scrubs free text,
and leaves the rest behind: what is not listed here is dropped, also a table of a future nsys.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from opkit.errors import BadInput
from opkit.nsys_parsers.keep import Keep, Range, Windows, holds, matters, overlaps, windows_of
from opkit.nsys_parsers.private import (
    MANIFEST,
    decode,
    find_private,
    machine_names,
    reading,
    table_columns,
    unpacked,
)
from opkit.nsys_parsers.scrub import Scrubber

__all__ = ["Keep", "SlimReport", "find_private", "slim"]

PROCESS_BITS = -0x1000000  # ~0xFFFFFF: what a globalTid shares with its globalPid
RANGE_EVENTS = (59, 60)  # push/pop and start/end ranges
MARK_EVENT = 34
NVTX, RUNTIME = "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_RUNTIME"

# What ran on the GPU, each with a correlation id and a process.
ACTIVITIES = tuple(
    f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")
)
# Up to nsys 2023.4 the second held nodes; since then it holds graphs, which are few.
NODE_TABLES = ("CUDA_GRAPH_NODE_EVENTS", "CUDA_GRAPH_EVENTS")
META_TABLES = ("META_DATA_EXPORT", "EXPORT_META_DATA", "META_DATA_CAPTURE")
WHOLE_TABLES = (
    "TARGET_INFO_GPU",
    "TARGET_INFO_SESSION_START_TIME",
    "DIAGNOSTIC_EVENT",
    MANIFEST,
    "ENUM_NSYS_EVENT_TYPE",
    "ENUM_NSYS_EVENT_CLASS",
    "ENUM_CUDA_MEMCPY_OPER",
    "ENUM_CUDA_MEM_KIND",
    "ENUM_CUDA_KERNEL_LAUNCH_TYPE",
    "ENUM_CUDA_SHARED_MEM_LIMIT_CONFIG",
    "ENUM_CUDA_UNIF_MEM_MIGRATION",
    "ENUM_CUDA_FUNC_CACHE_CONFIG",
    "ENUM_DIAGNOSTIC_SEVERITY_LEVEL",
    "ENUM_DIAGNOSTIC_SOURCE_TYPE",
    "ENUM_DIAGNOSTIC_TIMESTAMP_SOURCE",
)
META_KEYS = re.compile(
    r"EXPORT_(?:PRODUCT_\w+|SCHEMA_VERSION\w*|PLATFORM|ARCH|PARAM_LAZY|LAZY)|\w*NSYS_VERSION\w*"
    r"|(?:PROCESS_\d+:)?(?:CUDA_GRAPH_TRACE_OPTIONS:\w+|COLLECT_(?:NVTX|CUDA)_TRACE|CUDA_\w+)"
    r"|CAPTURE_EVENT_TYPE|START_TRIGGER|STOP_TRIGGER|RUN_DURATION_MS|DEVICE_TYPE"
)
# Cells that identify a machine, or serve nobody here, by table.
BLANK_COLUMNS = {
    "TARGET_INFO_GPU": ("uuid", "busLocation", "luid", "ctxswDevPath", "ctrlDevPath"),
    RUNTIME: ("callchainId",),
    "CUPTI_ACTIVITY_KIND_MEMCPY": ("virtualAddress",),
    NVTX: ("binaryData",),
}
TEXT_COLUMNS = {NVTX: ("text", "jsonText"), "DIAGNOSTIC_EVENT": ("text",)}
STRING_COLUMNS = ("demangledName", "shortName", "mangledName", "nameId", "textId", "jsonTextId")


@dataclass(frozen=True)
class SlimReport:
    """What ``slim`` did.

    Attributes:
        rows: per kept table, rows before and after.
        dropped: tables with rows that were left behind.
        scrubbed: replacements made in free text, by kind.
        source_bytes, target_bytes: sizes of the files as they lie on the disk.
    """

    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    scrubbed: dict[str, int] = field(default_factory=dict)
    source_bytes: int = 0
    target_bytes: int = 0


def slim(source: Path, target: Path, *, keep: Keep | None = None) -> SlimReport:
    """Copy what alignment needs of an nsys SQLite export, scrubbed and packed.

    Args:
        source: a ``.sqlite`` export, or the same gzipped (told by its content).
        target: the file to write; gzipped when its name ends in ``.gz``. Replaced when it exists.
        keep: which ranges and which part of the recording stay.

    Raises:
        BadInput: the source is not a readable SQLite export or is the target itself, or ``keep``
            limits steps or iterations and the source labels none.
    """
    if target.exists() and target.samefile(source):
        raise BadInput(f"{target}: source and target are the same file")
    keep = keep or Keep()
    with tempfile.TemporaryDirectory(prefix="opkit-slim-") as scratch:
        made = Path(scratch) / "slim.sqlite"
        with reading(source):
            export = unpacked(source, Path(scratch))
            db = sqlite3.connect(made, isolation_level=None, uri=True)
            with contextlib.closing(db):
                db.execute("ATTACH ? AS src", (f"{export.as_uri()}?mode=ro",))
                copier = _Copier(db, source, keep)
                copier.copy()
                db.execute("DETACH src")
                db.execute("VACUUM")
        _publish(made, target)
    return SlimReport(
        rows=copier.rows,
        dropped=tuple(sorted(copier.dropped)),
        scrubbed=dict(sorted(copier.scrubber.counts.items())),
        source_bytes=source.stat().st_size,
        target_bytes=target.stat().st_size,
    )


class _Copier:
    """One run of ``slim``: an open target with the source attached as ``src``."""

    def __init__(self, db: sqlite3.Connection, source: Path, keep: Keep) -> None:
        db.text_factory = decode
        self.db, self.source, self.keep = db, source, keep
        self.tables = table_columns(db, "src")
        self.scrubber = Scrubber(machine_names(db, "src", self.tables))
        self.rows: dict[str, tuple[int, int]] = {}
        self.dropped = {t for t in self.tables if self._count("src", t)}
        for name in ("text", "code", "json"):
            db.create_function(f"scrub_{name}", 1, _over_bytes(getattr(self.scrubber, name)))
        db.create_function("is_meta_key", 1, lambda key: bool(META_KEYS.fullmatch(str(key))))

    def copy(self) -> None:
        """All of it, in the order of what depends on what."""
        self.db.execute("BEGIN")
        ranges = self._ranges()
        windows = windows_of(ranges, self.keep, str(self.source))
        self._copy_activities(windows)
        self._copy_launches_and_nodes()
        self._copy_ranges(ranges, windows)
        for table in META_TABLES:
            self._copy(table, "WHERE is_meta_key(name)")
        for table in WHOLE_TABLES:
            self._copy(table)
        self._copy("PROCESSES", "WHERE globalPid IN (SELECT pid FROM launched)")
        if "PROCESSES" in self.rows:
            self.db.execute("UPDATE PROCESSES SET name = 'process'")
        self._scrub()
        self._copy_strings()
        self.db.execute("COMMIT")

    def _copy(self, table: str, where: str = "") -> None:
        """Create ``table`` as the source has it; copy what ``where`` selects, in order."""
        if table not in self.tables:
            return
        sql = self.db.execute(
            "SELECT sql FROM src.sqlite_master WHERE type = 'table' AND name = ?", (table,)
        ).fetchone()[0]
        self.db.execute(sql)
        names = ", ".join(f'"{c}"' for c in self.tables[table])
        self.db.execute(
            f'INSERT INTO main."{table}" SELECT {names} FROM src."{table}" AS s {where} '
            "ORDER BY s.rowid"
        )
        self.rows[table] = (self._count("src", table), self._count("main", table))
        self.dropped.discard(table)

    def _count(self, schema: str, table: str) -> int:
        return int(self.db.execute(f'SELECT count(*) FROM {schema}."{table}"').fetchone()[0])

    def _pid(self, table: str, alias: str) -> str:
        """SQL for the process of a row; 0 in exports that do not say it."""
        columns = self.tables[table]
        if "globalPid" in columns:
            return f"coalesce({alias}.globalPid, 0)"
        return f"({alias}.globalTid & {PROCESS_BITS})" if "globalTid" in columns else "0"

    def _ranges(self) -> list[Range]:
        """NVTX ranges and marks in order of their start."""
        if NVTX not in self.tables:
            return []
        registered = "textId" in self.tables[NVTX] and "StringIds" in self.tables
        text = "coalesce(n.text, i.value)" if registered else "n.text"
        join = "LEFT JOIN src.StringIds i ON i.id = n.textId" if registered else ""
        rows = self.db.execute(
            f"SELECT n.rowid, n.start, coalesce(n.end, n.start), {self._pid(NVTX, 'n')}, "
            f"coalesce({text}, '') "
            f"FROM src.{NVTX} n {join} "
            f"WHERE n.eventType IN {(*RANGE_EVENTS, MARK_EVENT)} ORDER BY n.start, n.rowid"
        )
        return [Range(*row) for row in rows]

    def _copy_activities(self, windows: Windows) -> None:
        """Kernels, copies and fills: all, or those launched within the windows.

        One without a launch row is judged by its own start. The tables ``launched`` and
        ``node_used`` remember what the kept ones refer to.
        """
        run = self.db.execute
        self.db.create_function("in_window", 2, lambda pid, at: overlaps(windows, pid, at, at))
        # Typed columns: SQLite leaves an index unused where an untyped column meets an INTEGER one.
        key = "pid INTEGER, id INTEGER, PRIMARY KEY (pid, id)"
        for table in ("launched", "node_used"):
            run(f"CREATE TEMP TABLE {table} ({key}) WITHOUT ROWID")
        run(f"CREATE TEMP TABLE launch (start INTEGER, {key}) WITHOUT ROWID")
        if windows and RUNTIME in self.tables:
            run(
                f"INSERT INTO launch (pid, id, start) SELECT {self._pid(RUNTIME, 'r')}, "
                f"r.correlationId, min(r.start) FROM src.{RUNTIME} r "
                "WHERE r.correlationId IS NOT NULL GROUP BY 1, 2"
            )
        for table in (t for t in ACTIVITIES if t in self.tables):
            pid = self._pid(table, "s")
            launch = f"SELECT l.start FROM launch l WHERE l.pid = {pid} AND l.id = s.correlationId"
            inside = f"WHERE in_window({pid}, coalesce(({launch}), s.start))"
            self._copy(table, inside if windows else "")
            run(
                f"INSERT OR IGNORE INTO launched SELECT {pid}, s.correlationId FROM main.{table} s "
                "WHERE s.correlationId IS NOT NULL"
            )
            if "graphNodeId" in self.tables[table]:
                run(
                    f"INSERT OR IGNORE INTO node_used SELECT {pid}, s.graphNodeId "
                    f"FROM main.{table} s WHERE s.graphNodeId IS NOT NULL"
                )

    def _copy_launches_and_nodes(self) -> None:
        """The launches of what was kept, and the graph nodes it came from, to their origin."""
        if RUNTIME in self.tables:
            call = f"({self._pid(RUNTIME, 's')}, s.correlationId)"
            self._copy(RUNTIME, f"WHERE {call} IN (SELECT pid, id FROM launched)")
        for table in (t for t in NODE_TABLES if t in self.tables):
            if "graphNodeId" not in self.tables[table]:
                self._copy(table)
                continue
            pid = self._pid(table, "s")
            if "originalGraphNodeId" in self.tables[table]:
                # UNION, not UNION ALL: a cycle in a damaged file ends by itself.
                self.db.execute("CREATE TEMP TABLE node (pid INTEGER, id INTEGER, origin INTEGER)")
                self.db.execute(
                    f"INSERT INTO node SELECT DISTINCT {pid}, s.graphNodeId, s.originalGraphNodeId "
                    f"FROM src.{table} s WHERE s.originalGraphNodeId IS NOT NULL"
                )
                self.db.execute("CREATE INDEX temp.node_id ON node (pid, id)")
                self.db.execute(
                    "WITH RECURSIVE used(pid, id) AS (SELECT pid, id FROM node_used UNION "
                    "SELECT n.pid, n.origin FROM used u "
                    "JOIN node n ON n.pid = u.pid AND n.id = u.id) "
                    "INSERT OR IGNORE INTO node_used SELECT pid, id FROM used"
                )
            self._copy(table, f"WHERE ({pid}, s.graphNodeId) IN (SELECT pid, id FROM node_used)")

    def _copy_ranges(self, ranges: list[Range], windows: Windows) -> None:
        """NVTX rows that matter by text, and lie in a window or where a kept node was made."""
        if NVTX not in self.tables:
            return
        made = self._node_creations()
        chosen = [
            (each.row,)
            for each in ranges
            if matters(each.text, self.keep)
            and (
                not windows
                or overlaps(windows, each.pid, each.start, each.end)
                or holds(made, each)
            )
        ]
        self.db.execute("CREATE TEMP TABLE range_kept (id INTEGER PRIMARY KEY)")
        self.db.executemany("INSERT INTO range_kept VALUES (?)", chosen)
        # Rows that are no range name domains and categories; they are few.
        self._copy(
            NVTX,
            "WHERE s.rowid IN (SELECT id FROM range_kept) "
            f"OR s.eventType NOT IN {(*RANGE_EVENTS, MARK_EVENT)}",
        )

    def _node_creations(self) -> dict[int, list[int]]:
        """Per process the sorted times at which the kept graph nodes were made."""
        made: dict[int, list[int]] = {}
        for table in NODE_TABLES:
            if table in self.rows and "graphNodeId" in self.tables[table]:
                for pid, start in self.db.execute(
                    f"SELECT {self._pid(table, 's')}, s.start FROM main.{table} s ORDER BY 2"
                ):
                    made.setdefault(pid, []).append(start)
        return {pid: sorted(times) for pid, times in made.items()}

    def _scrub(self) -> None:
        """Blank what identifies a machine and scrub free text, in the copied tables."""
        for table in self.rows:
            columns = self.tables[table]
            required = {
                row[1]: "''" if row[2] == "TEXT" else "0"
                for row in self.db.execute(f'PRAGMA main.table_info("{table}")')
                if row[3]
            }
            changes = [
                f'"{c}" = {required.get(c, "NULL")}'
                for c in BLANK_COLUMNS.get(table, ())
                if c in columns
            ]
            changes += [
                f'"{c}" = scrub_text(CAST("{c}" AS BLOB))'
                for c in TEXT_COLUMNS.get(table, ())
                if c in columns
            ]
            if table == MANIFEST:
                changes = [f'"{c}" = scrub_json(CAST("{c}" AS BLOB))' for c in columns]
            if changes:
                self.db.execute(f'UPDATE main."{table}" SET {", ".join(changes)}')

    def _copy_strings(self) -> None:
        """The strings that kept rows refer to, scrubbed; in names of code no hosts are sought."""
        if "StringIds" not in self.tables:
            return
        self.db.execute("CREATE TEMP TABLE string_used (id INTEGER PRIMARY KEY, code INTEGER)")
        for table in self.rows:
            for column in (c for c in STRING_COLUMNS if c in self.tables[table]):
                self.db.execute(
                    f"INSERT INTO string_used SELECT DISTINCT {column}, {int(table != NVTX)} "
                    f'FROM main."{table}" WHERE {column} IS NOT NULL '
                    "ON CONFLICT (id) DO UPDATE SET code = max(code, excluded.code)"
                )
        self._copy("StringIds", "WHERE s.id IN (SELECT id FROM string_used)")
        self.db.execute(
            "UPDATE main.StringIds AS t SET value = CASE WHEN u.code "
            "THEN scrub_code(CAST(t.value AS BLOB)) ELSE scrub_text(CAST(t.value AS BLOB)) END "
            "FROM string_used u WHERE u.id = t.id"
        )


def _over_bytes(scrub: Callable[[str], str]) -> Callable[[bytes | None], str | None]:
    """A scrubber for SQL. It takes bytes: SQLite refuses to hand over a text that is no UTF-8."""
    return lambda raw: None if raw is None else scrub(decode(raw))


def _publish(made: Path, target: Path) -> None:
    """Put the finished file in its place at once, so that a crash leaves no half of one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        if target.suffix == ".gz":
            # No name and no time in the header: the same input gives the same bytes.
            with (
                made.open("rb") as plain,
                part.open("wb") as file,
                gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,
            ):
                shutil.copyfileobj(plain, packed)
        else:
            shutil.copyfile(made, part)
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
