"""The kernel table: one row per kernel, copy and fill, joined to its launch and, in graphs, to its
node.

How the joins go wrong, and why they are as they are, is told in ``docs/nsys-joins.md``:
correlation ids repeat between processes, some launches began before the window, instantiated graph
nodes are clones of clones.
"""

from __future__ import annotations

import duckdb

from opkit.nsys_parsers.export import KERNEL_TABLE, Columns
from opkit.nsys_parsers.strings import load_strings

RUNTIME_TABLE = "CUPTI_ACTIVITY_KIND_RUNTIME"
NODE_TABLES = (
    "CUDA_GRAPH_NODE_EVENTS",
    "CUDA_GRAPH_EVENTS",
)  # up to 2023.4 nodes are in the second
# globalTid and globalPid are serialised ids; the low 24 bits are the thread's.
THREAD_BITS = 0xFFFFFF
# Clone chains measured are 1 or 2 long; a longer one is a cycle in a damaged file.
MAX_CLONES = 16

SIZES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")

UNNAMED = "<unnamed kernel>"
# Copies and fills have no name; theirs are negative so that they never meet an id of the export.
NO_NAME, MEMSET_NAME, MEMCPY_NAME = -1, -2, -100
COPY_KINDS = {1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}

COUNTS = """
SELECT count(*) FILTER (kind = 'kernel'), count(*) FILTER (kind <> 'kernel'),
       count(*) FILTER (launch_start IS NULL), count(*) FILTER (graph_node IS NOT NULL),
       count(*) FILTER (graph_node IS NOT NULL AND node_start IS NULL)
FROM kernel
"""


def _column(columns: Columns, table: str, name: str, otherwise: str = "NULL::BIGINT") -> str:
    return f'"{name}"' if name in columns.get(table, frozenset()) else otherwise


def pid_of_thread(columns: Columns, tid: str = '"globalTid"::BIGINT') -> str:
    """SQL for the process of a thread; one for all when kernels do not say theirs."""
    if "globalPid" not in columns.get(KERNEL_TABLE, frozenset()):
        return "0::BIGINT"
    return f"({tid}) - (({tid}) & {THREAD_BITS})"


def _process(columns: Columns, table: str) -> str:
    """SQL for the process of an execution; one for all when kernels do not say theirs."""
    if "globalPid" not in columns.get(KERNEL_TABLE, frozenset()):
        return "0::BIGINT"
    return f"{_column(columns, table, 'globalPid', '0')}::BIGINT"


def build(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Create table ``kernel`` in ``db`` from the export attached as ``export``.

    Columns: ``id``, those of ``activities`` with ``name`` as text, ``launch_start, launch_tid,
    node_start, node_tid``. Times in ns since the session's start. ``launch_*`` is null when no
    launch row of the same process has the correlation id; ``node_*`` is the creation of the graph
    node that the kernel was replayed from, at the root of its clone chain.
    """
    load_strings(db, columns)
    _build_launches(db, columns)
    build_nodes(db, columns)
    db.execute(
        f"""
        CREATE TABLE kernel AS
        SELECT row_number() OVER () AS id, a.* EXCLUDE (name_id), {NAME_SQL} AS name,
               l.start AS launch_start, l.tid AS launch_tid,
               n.start AS node_start, n.tid AS node_tid
        FROM ({activities(columns)}) a
        LEFT JOIN string s ON s.id = a.name_id
        LEFT JOIN launch l ON l.pid = a.pid AND l.correlation = a.correlation
        LEFT JOIN node n ON n.pid = a.pid AND n.node = a.graph_node
        """
    )


# Every execution has its times; one without, or at times that no session has (146 years, or 104
# days of one execution), is damage and ends the reading. Differences of the others fit 64 bits.
_EARLIEST, _LATEST, _LONGEST = -(2**61), 2**62, 2**53
_TIMES = f"""
CASE WHEN start IS NULL OR "end" IS NULL THEN error('an execution without its times')
     WHEN start::BIGINT BETWEEN {_EARLIEST} AND {_LATEST} THEN start::BIGINT
     ELSE error('an execution at an impossible time') END AS start,
CASE WHEN "end"::BIGINT BETWEEN start::BIGINT - {_LONGEST} AND start::BIGINT + {_LONGEST}
     THEN "end"::BIGINT
     ELSE error('an execution at an impossible time') END AS "end"
"""

# The name of ``a.name_id``, beside ``string s``.
NAME_SQL = f"""CASE WHEN a.name_id = {MEMSET_NAME} THEN '[memset]' {
    " ".join(
        f"WHEN a.name_id = {MEMCPY_NAME - code} THEN '[memcpy {text}]'"
        for code, text in COPY_KINDS.items()
    )
} WHEN a.name_id <= {MEMCPY_NAME} THEN '[memcpy]' ELSE coalesce(s.value, '{UNNAMED}') END"""


def activities(columns: Columns) -> str:
    """SQL for all kernels, copies and fills of ``export``, streamed from the file.

    Columns: ``kind, name_id, start, "end", pid, device, stream, correlation, grid_x … block_z,
    graph_node``; the grid of a copy is null.
    """
    selects = [kernel_select(columns)]
    for table, kind in (("MEMCPY", "memcpy"), ("MEMSET", "memset")):
        name = f"CUPTI_ACTIVITY_KIND_{table}"
        if name in columns:
            selects.append(_copy_select(columns, name, kind))
    return " UNION ALL ".join(selects)


def kernel_select(columns: Columns) -> str:
    table = KERNEL_TABLE
    names = [_column(columns, table, f"{kind}Name") for kind in ("demangled", "short")]
    sizes = ", ".join(
        f"{_column(columns, table, size[:-2] + size[-1].upper())}::INTEGER AS {size}"
        for size in SIZES
    )
    return f"""
    SELECT 'kernel' AS kind, coalesce({", ".join(names)}, {NO_NAME})::BIGINT AS name_id, {_TIMES},
           {_process(columns, table)} AS pid, "deviceId"::BIGINT AS device,
           "streamId"::BIGINT AS stream, "correlationId"::BIGINT AS correlation, {sizes},
           nullif({_column(columns, table, "graphNodeId")}::BIGINT, 0) AS graph_node
    FROM export.{table}
    """


def _copy_select(columns: Columns, table: str, kind: str) -> str:
    name = str(MEMSET_NAME)
    if kind == "memcpy":
        # Kinds without a name of their own share one.
        code = _column(columns, table, "copyKind", "0")
        name = f"{MEMCPY_NAME} - CASE WHEN {code} BETWEEN 0 AND 99 THEN {code} ELSE 0 END"
    return f"""
    SELECT '{kind}', {name}, {_TIMES},
           {_process(columns, table)}, "deviceId"::BIGINT,
           "streamId"::BIGINT, "correlationId"::BIGINT, NULL, NULL, NULL, NULL, NULL, NULL,
           nullif({_column(columns, table, "graphNodeId")}::BIGINT, 0)
    FROM export.{table}
    """


def _build_launches(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Table ``launch``: the API call of each (process, correlation id); the outermost when calls
    nest."""
    if RUNTIME_TABLE not in columns:
        db.execute("CREATE TABLE launch (pid BIGINT, correlation BIGINT, tid BIGINT, start BIGINT)")
        return
    db.execute(
        f"""
        CREATE TABLE launch AS
        SELECT {pid_of_thread(columns)} AS pid, "correlationId"::BIGINT AS correlation,
               arg_min("globalTid"::BIGINT, start) AS tid, min(start::BIGINT) AS start
        FROM export.{RUNTIME_TABLE} GROUP BY 1, 2
        """
    )


def build_nodes(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Table ``node``: for every graph node the creation of the node at the root of its clone
    chain."""
    table = next((t for t in NODE_TABLES if "graphNodeId" in columns.get(t, frozenset())), None)
    if table is None:
        db.execute("CREATE TABLE node (pid BIGINT, node BIGINT, tid BIGINT, start BIGINT)")
        return
    parent = _column(columns, table, "originalGraphNodeId")
    db.execute(
        f"""
        CREATE TABLE node_event AS
        SELECT {pid_of_thread(columns)} AS pid, "graphNodeId"::BIGINT AS node,
               max(nullif({parent}::BIGINT, 0)) AS parent,
               arg_min("globalTid"::BIGINT, start) AS tid, min(start::BIGINT) AS start
        FROM export.{table} GROUP BY 1, 2
        """
    )
    db.execute("CREATE TABLE root AS SELECT pid, node, node AS root FROM node_event")
    for _ in range(MAX_CLONES):
        step = """
            FROM node_event e WHERE e.pid = root.pid AND e.node = root.root
            AND e.parent IS NOT NULL AND e.parent <> root.root"""
        moved = db.execute(f"UPDATE root SET root = e.parent {step}").fetchall()
        if moved[0][0] == 0:
            break
    db.execute(
        """
        CREATE TABLE node AS
        SELECT r.pid, r.node, e.tid, e.start
        FROM root r JOIN node_event e ON e.pid = r.pid AND e.node = r.root
        """
    )
    db.execute("DROP TABLE root")
    db.execute("DROP TABLE node_event")
