"""What a region launched, in capture order: one module in one step, or a whole trace.

Capture order is the order of the launch calls and, within one graph launch, the order in which the
graph's nodes were created; GPU start order is another one as soon as two streams are in use.
"""

from __future__ import annotations

from opkit.errors import BadInput
from opkit.nsys_parsers.reading import Via
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, View, regex

ORDER = (
    "k.rank, coalesce(k.launch_start, k.start), k.node_start NULLS FIRST, "
    "k.graph_node NULLS FIRST, k.start"
)
_VIA = " ".join(f"WHEN {int(via)} THEN '{via.name.lower()}'" for via in Via if via)


def sequence_view(table: KernelTable, selection: Selection, everything: bool = False) -> View:
    """Kernels, copies and fills of the first region that ``selection`` finds, in capture order.

    Args:
        everything: all of what is selected, not the first region only.

    Raises:
        BadInput: nothing was launched there.
    """
    where = selection.where(table)
    about: dict[str, object] = {"region": str(selection), "regions": 1}
    if not everything:
        narrowed, regions = _first_region(table, selection, where)
        where = f"{where} AND {narrowed}"
        about["regions"] = regions
    count, unlinked = table.rows(
        f"SELECT count(*), count(*) FILTER (launch_start IS NULL) FROM kernel k WHERE {where}"
    )[0]
    if not count:
        raise BadInput(
            f"nothing was launched in {selection}",
            "`opkit trace steps` and `opkit trace modules` list what there is",
        )
    about["unattributed"] = {"launch": unlinked}
    first = table.rows(f"SELECT min(start) FROM kernel k WHERE {where}")[0][0]
    sql = f"""
        SELECT row_number() OVER (ORDER BY {ORDER}) - 1 AS position, k.rank, s.number AS step,
               p.path AS module, CASE k.via {_VIA} END AS module_by, k.kind, n.name, n.short,
               n.family, k.start - {first} AS start_ns, k."end" - k.start AS duration_ns,
               k.pid >> 24 & 16777215 AS process, k.device, k.stream,
               k.grid_x, k.grid_y, k.grid_z, k.block_x, k.block_y, k.block_z,
               CASE WHEN k.graph_node IS NULL THEN 'eager' ELSE 'graph' END AS mode,
               k.graph_node, k.launch_start - {first} AS launch_ns,
               k.node_start - {first} AS node_ns
        FROM kernel k JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id
        LEFT JOIN step s ON s.file = k.file AND s.id = k.step
        WHERE {where} ORDER BY position"""
    return View("sequence", sql, about)


def _first_region(table: KernelTable, selection: Selection, where: str) -> tuple[str, int]:
    """A condition that keeps the first region, and how many there are."""
    steps = table.rows(
        f"""SELECT k.file, k.rank, k.step FROM kernel k WHERE {where} AND k.step IS NOT NULL
        GROUP BY 1, 2, 3 ORDER BY min(k.start)"""
    )
    if steps:
        file, rank, step = steps[0]
        same_rank = f"k.rank = {rank}" if rank is not None else "k.rank IS NULL"
        return f"k.file = {file} AND {same_rank} AND k.step = {step}", len(steps)
    if selection.module:
        # No steps: one pass through the outermost range that matches.
        matching = (
            f"SELECT id FROM path WHERE path <> '' AND {regex(table, 'path', selection.module)}"
        )
        ranges = table.rows(
            f"""
            WITH matching AS (SELECT file, tid, start, "end",
                max("end") OVER (PARTITION BY file, tid ORDER BY start, "end" DESC
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
                FROM range WHERE path_id IN ({matching}))
            SELECT m.file, m.tid, m.start, m."end" FROM matching m
            WHERE (before IS NULL OR before < "end") AND EXISTS (
                SELECT 1 FROM kernel k WHERE k.file = m.file AND k.launch_tid = m.tid
                AND k.launch_start BETWEEN m.start AND m."end")
            ORDER BY m.start
            """
        )
        if ranges:
            file, tid, start, end = ranges[0]
            inside = f"k.file = {file} AND k.launch_tid = {tid}"
            return f"{inside} AND k.launch_start BETWEEN {start} AND {end}", len(ranges)
    return "true", 1
