"""The kernel table: one row per kernel, copy and fill, joined to its launch and, in graphs, to its
node.

How the joins go wrong, and why they are as they are, is told in ``docs/nsys-joins.md``:
correlation ids repeat between processes, some launches began before the window, instantiated graph
nodes are clones of clones.
"""

from __future__ import annotations

import duckdb

KERNEL_TABLE = "CUPTI_ACTIVITY_KIND_KERNEL"
RUNTIME_TABLE = "CUPTI_ACTIVITY_KIND_RUNTIME"
NODE_TABLES = (
    "CUDA_GRAPH_NODE_EVENTS",
    "CUDA_GRAPH_EVENTS",
)  # up to 2023.4 nodes are in the second
# globalTid and globalPid are serialised ids; the low 24 bits are the thread's.
THREAD_BITS = 0xFFFFFF
# Clone chains measured are 1 or 2 long; a longer one is a cycle in a damaged file.
MAX_CLONES = 16

COPY_KINDS = {1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}

COUNTS = """
SELECT count(*) FILTER (kind = 'kernel'), count(*) FILTER (kind <> 'kernel'),
       count(*) FILTER (launch_start IS NULL), count(*) FILTER (graph_node IS NOT NULL),
       count(*) FILTER (graph_node IS NOT NULL AND node_start IS NULL)
FROM kernel
"""

Columns = dict[str, frozenset[str]]


def _column(columns: Columns, table: str, name: str, otherwise: str = "NULL::BIGINT") -> str:
    return f'"{name}"' if name in columns.get(table, frozenset()) else otherwise


def _pid(columns: Columns) -> str:
    """The process of a thread; one for all when kernels do not say theirs."""
    if "globalPid" not in columns.get(KERNEL_TABLE, frozenset()):
        return "0::BIGINT"
    return f'"globalTid" - ("globalTid" & {THREAD_BITS})'


def build(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Create table ``kernel`` in ``db`` from the export attached as ``export``.

    Columns: ``id, kind, name, start, "end", pid, device, stream, correlation, grid_x … block_z,
        graph_node,
    launch_start, launch_tid, node_start, node_tid``. Times in ns since the session's start.
    ``launch_*`` is null when no launch row of the same process has the correlation id; ``node_*``
    is the creation of the graph node that the kernel was replayed from, at the root of its clone
    chain.
    """
    _build_launches(db, columns)
    _build_nodes(db, columns)
    selects = [_kernel_select(columns)]
    for table, kind in (("MEMCPY", "memcpy"), ("MEMSET", "memset")):
        name = f"CUPTI_ACTIVITY_KIND_{table}"
        if name in columns:
            selects.append(_copy_select(columns, name, kind))
    db.execute(
        f"""
        CREATE TABLE activity AS
        SELECT row_number() OVER (ORDER BY start, stream, correlation) AS id, * FROM (
        {" UNION ALL ".join(selects)})
        """
    )
    db.execute(
        """
        CREATE TABLE kernel AS
        SELECT a.*, l.start AS launch_start, l.tid AS launch_tid,
               n.start AS node_start, n.tid AS node_tid
        FROM activity a
        LEFT JOIN launch l ON l.pid = a.pid AND l.correlation = a.correlation
        LEFT JOIN node n ON n.pid = a.pid AND n.node = a.graph_node
        """
    )
    db.execute("DROP TABLE activity")


def _kernel_select(columns: Columns) -> str:
    table = KERNEL_TABLE
    name = _column(columns, table, "demangledName", _column(columns, table, "shortName"))
    return f"""
    SELECT 'kernel' AS kind, coalesce(s.value, '<unnamed kernel>') AS name, k.start, k."end",
           {_column(columns, table, "globalPid", "0::BIGINT")} AS pid, k."deviceId" AS device,
           k."streamId" AS stream, k."correlationId" AS correlation,
           "gridX" AS grid_x, "gridY" AS grid_y, "gridZ" AS grid_z,
           "blockX" AS block_x, "blockY" AS block_y, "blockZ" AS block_z,
           nullif({_column(columns, table, "graphNodeId")}, 0) AS graph_node
    FROM export.{table} k LEFT JOIN export.StringIds s ON s.id = k.{name}
    """


def _copy_select(columns: Columns, table: str, kind: str) -> str:
    direction = "''"
    if kind == "memcpy" and "copyKind" in columns[table]:
        cases = " ".join(f"WHEN {code} THEN ' {text}'" for code, text in COPY_KINDS.items())
        direction = f"CASE \"copyKind\" {cases} ELSE '' END"
    return f"""
    SELECT '{kind}' AS kind, '[{kind}' || {direction} || ']' AS name, start, "end",
           {_column(columns, table, "globalPid", "0::BIGINT")}, "deviceId", "streamId",
           "correlationId", NULL, NULL, NULL, NULL, NULL, NULL,
           nullif({_column(columns, table, "graphNodeId")}, 0)
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
        SELECT {_pid(columns)} AS pid, "correlationId" AS correlation,
               arg_min("globalTid", start) AS tid, min(start) AS start
        FROM export.{RUNTIME_TABLE} GROUP BY 1, 2
        """
    )


def _build_nodes(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
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
        SELECT {_pid(columns)} AS pid, "graphNodeId" AS node,
               max(nullif({parent}, 0)) AS parent, arg_min("globalTid", start) AS tid,
               min(start) AS start
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
