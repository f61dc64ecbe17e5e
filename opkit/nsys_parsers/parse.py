"""The kernel table with step, module and graph node, as parquet files in a folder.

One pass over the export: what is large (kernels, API calls) streams through DuckDB, which spills to
disk beyond its memory; ranges are held in memory, about 100 bytes each.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import duckdb
import numpy as np

from opkit.errors import BadInput
from opkit.nsys_parsers import kernels, ranges
from opkit.nsys_parsers.attribution import Attribution, Placed
from opkit.nsys_parsers.export import (
    Columns,
    Export,
    attach,
    connect,
    first_line,
    quoted,
    unreadable,
)
from opkit.nsys_parsers.kernels import RUNTIME_TABLE
from opkit.nsys_parsers.reading import PARQUET, CannotWrite, Options, Tell, Via, silent
from opkit.nsys_parsers.stacks import Array, write
from opkit.nsys_parsers.strings import load_strings

CHUNK = 4_000_000  # API calls placed at a time: 130 MB of arrays


_KERNEL = """
SELECT a.kind, a.name_id, a.start, a."end", a.pid, a.device::INTEGER AS device, a.stream,
       a.correlation, {sizes}, a.graph_node,
       l.start AS launch_start, l.tid AS launch_tid, n.start AS node_start, n.tid AS node_tid,
       nullif(l.step, -1) AS step, coalesce(l.step_via, 0) AS step_via,
       -- Which code made a graph's kernel is told by its node; the launch tells when it ran.
       nullif(CASE WHEN n.path > 0 THEN n.range ELSE l.range END, -1) AS range,
       CASE WHEN n.path > 0 THEN n.path ELSE coalesce(l.path, 0) END AS path,
       CASE WHEN n.path > 0 THEN {node} ELSE coalesce(l.via, 0) END::TINYINT AS via
FROM ({activities}) a
LEFT JOIN placed_launch l ON l.pid = a.pid AND l.correlation = a.correlation
LEFT JOIN placed_node n ON n.pid = a.pid AND n.node = a.graph_node
"""
_NAME = """
SELECT a.name_id AS id, {name} AS name FROM (SELECT DISTINCT name_id FROM '{kernels}') a
LEFT JOIN string s ON s.id = a.name_id
"""
_STEP = """
SELECT s.id, {pid} AS pid, s.tid, s.start, s."end", l.text AS label
FROM step s JOIN label l ON l.id = s.text
"""
_RANGE = """
SELECT r.id, {pid} AS pid, r.tid, r.start, r."end", l.text, r.path
FROM module_range r JOIN label l ON l.id = r.text
"""


def parse(export: Export, folder: Path, options: Options, memory: str, tell: Tell = silent) -> None:
    """Parse ``export`` into parquet files in ``folder``.

    ``kernel`` has one row a kernel, copy or fill; its ``name_id``, ``path``, ``step`` and ``range``
    are ids in ``name``, ``path``, ``step`` and ``range``. Times are ns since the session's start.

    Raises:
        BadInput: a table cannot be read to its end, or the step pattern is no expression.
    """
    columns, name = export.columns, export.facts.path.name
    db = connect(export.scratch, memory)
    try:
        attach(db, export)
        tell(f"{name}: NVTX ranges", 0.02)
        load_strings(db, columns)
        ranges.load(db, columns)
        try:
            attribution = Attribution(db, options.step_pattern, options.other_threads)
        except duckdb.InvalidInputException as error:
            raise BadInput(f"{options.step_pattern!r} is no regular expression") from error
        tell(f"{name}: API calls", 0.15)
        _place_launches(db, columns, attribution)
        tell(f"{name}: graph nodes", 0.4)
        _place_nodes(db, columns, attribution)
        tell(f"{name}: kernels", 0.45)
        sizes = ", ".join(f"a.{size}::INTEGER AS {size}" for size in kernels.SIZES)
        activities = kernels.activities(columns)
        kernel = _KERNEL.format(sizes=sizes, activities=activities, node=int(Via.NODE))
        _save(db, kernel, folder, "kernel")
        tell(f"{name}: names and ranges", 0.97)
        made = quoted(folder / "kernel.parquet")
        _save(db, _NAME.format(name=kernels.NAME_SQL, kernels=made), folder, "name")
        _save(db, _STEP.format(pid=kernels.pid_of_thread(columns, "s.tid")), folder, "step")
        _save(db, _RANGE.format(pid=kernels.pid_of_thread(columns, "r.tid")), folder, "range")
        _save(db, "SELECT * FROM path", folder, "path")
    except (duckdb.Error, UnicodeDecodeError) as error:  # the latter: of an error's own text
        raise unreadable(export.facts.path, error) from error
    finally:
        db.close()


def _place_launches(
    db: duckdb.DuckDBPyConnection, columns: Columns, attribution: Attribution
) -> None:
    """Table ``placed_launch``: the API call of each (process, correlation id), with its step and
    range; the outermost when calls nest."""
    db.execute(
        "CREATE TABLE placed_launch (pid BIGINT, correlation BIGINT, tid BIGINT, start BIGINT, "
        "range INTEGER, path INTEGER, step INTEGER, via TINYINT, step_via TINYINT)"
    )
    if RUNTIME_TABLE not in columns:
        return
    db.execute(
        f"""
        CREATE TABLE call AS
        SELECT {kernels.pid_of_thread(columns)} AS pid, "correlationId"::BIGINT AS correlation,
               "globalTid"::BIGINT AS tid, start::BIGINT AS start
        FROM export.{RUNTIME_TABLE}
        WHERE "correlationId" IS NOT NULL AND "globalTid" IS NOT NULL AND start IS NOT NULL
        """
    )
    nested = "SELECT 1 FROM call GROUP BY pid, correlation HAVING count(*) > 1 LIMIT 1"
    if db.execute(nested).fetchall():
        db.execute(
            """
            CREATE TABLE outermost AS SELECT pid, correlation, arg_min(tid, start) AS tid,
            min(start) AS start FROM call GROUP BY 1, 2
            """
        )
        db.execute("DROP TABLE call; ALTER TABLE outermost RENAME TO call")
    rows = db.execute("SELECT count(*) FROM call").fetchall()[0][0]
    for first in range(0, rows, CHUNK):
        chunk = db.execute(
            "SELECT * FROM call WHERE rowid >= ? AND rowid < ?", [first, first + CHUNK]
        ).fetchnumpy()
        calls = {name: np.asarray(column) for name, column in chunk.items()}
        placed = _columns(attribution.place(calls["tid"], calls["start"]))
        write(db, "placed_launch", calls | placed, into=True)
    db.execute("DROP TABLE call")


def _place_nodes(db: duckdb.DuckDBPyConnection, columns: Columns, attribution: Attribution) -> None:
    """Table ``placed_node``: each graph node's creation, with the range around it."""
    kernels.build_nodes(db, columns)
    rows = db.execute(
        "SELECT pid, node, tid, start FROM node WHERE tid IS NOT NULL AND start IS NOT NULL"
    ).fetchnumpy()
    nodes = {name: np.asarray(column) for name, column in rows.items()}
    placed = _columns(attribution.place(nodes["tid"], nodes["start"]))
    write(db, "placed_node", nodes | {name: placed[name] for name in ("range", "path")})


def _columns(placed: Placed) -> dict[str, Array]:
    """As columns, small; -1 stands for null."""
    types = {"via": np.int8, "step_via": np.int8}
    return {
        field.name: getattr(placed, field.name).astype(types.get(field.name, np.int32))
        for field in fields(placed)
    }


def _save(db: duckdb.DuckDBPyConnection, sql: str, folder: Path, name: str) -> None:
    path = folder / f"{name}.parquet"
    try:
        db.execute(f"COPY ({sql}) TO '{quoted(path)}' ({PARQUET})")
    except duckdb.IOException as error:
        if str(path) in str(error):  # else it is the export that cannot be read
            raise CannotWrite(0, first_line(error), str(path)) from error
        raise
