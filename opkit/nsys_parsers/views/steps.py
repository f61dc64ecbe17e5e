"""Forward steps: what was scheduled, when it ran, and how long the GPU worked on it."""

from __future__ import annotations

from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, View

_LABEL = "label, context_requests, context_tokens, generation_requests, generation_tokens"
_FIRST = "SELECT coalesce(min(start), 0) FROM kernel"


def steps_view(
    table: KernelTable,
    selection: Selection,
    per_rank: bool = False,
    gap_us: float | None = None,
) -> View:
    """Steps in their order. Ranks that label alike run one step together: then a row is a step, its
    times those of the slowest rank; with ``per_rank``, or where labels differ, a row is a rank's.

    Without labels a step is one launch of a graph, and ``about`` says so; with ``gap_us`` it is
    what runs between two pauses of a rank that are at least so long.
    """
    labelled = gap_us is None and bool(table.rows("SELECT 1 FROM step LIMIT 1"))
    where = selection.where(table)
    if gap_us is not None:
        each = _between_gaps(where, round(gap_us * 1000))
    else:
        each = _labelled(where) if labelled else _launched(where)
    if selection.module or not labelled:
        each = f"SELECT * FROM ({each}) WHERE launches > 0"
    if selection.rank is not None:
        each = f"SELECT * FROM ({each}) WHERE rank = {selection.rank}"
    if selection.step:
        each = f"SELECT * FROM ({each}) WHERE launches > 0"
    together = not per_rank and labelled and _alike(table)
    sql = _merged(each) if together else f"{each} ORDER BY step, rank"
    unplaced = "step IS NULL" if labelled else "graph_node IS NULL"
    outside, outside_ns = table.rows(
        f"""SELECT count(*), coalesce(sum("end" - start), 0)::BIGINT FROM kernel k
        WHERE {where} AND {unplaced if gap_us is None else "false"}"""
    )[0]
    by = "gap" if gap_us is not None else "label" if labelled else "graph launch"
    about = {
        "steps_by": by,
        "ranks_together": together,
        "unattributed": {"executions": outside, "ns": outside_ns},
    }
    return View("steps", sql, about)


def _labelled(where: str) -> str:
    return f"""
        WITH ran AS (
            SELECT file, step, count(*) AS launches, sum("end" - start)::BIGINT AS gpu_ns,
                   min(start) AS first, max("end") AS last,
                   count(*) FILTER (graph_node IS NOT NULL) AS graph_launches
            FROM kernel k WHERE {where} AND step IS NOT NULL GROUP BY 1, 2)
        SELECT s.number AS step, s.rank, {_LABEL}, r.first - ({_FIRST}) AS start_ns,
               r.last - r.first AS span_ns, coalesce(r.gpu_ns, 0) AS gpu_ns,
               coalesce(r.launches, 0) AS launches,
               coalesce(r.graph_launches, 0) AS graph_launches, s."end" - s.start AS host_ns
        FROM step s LEFT JOIN ran r ON r.file = s.file AND r.step = s.id"""


def _launched(where: str) -> str:
    """One launch of a graph is one (process, launch call)."""
    return f"""
        SELECT row_number() OVER (PARTITION BY file, rank ORDER BY launch_start) - 1 AS step, rank,
               'graph launch' AS label, NULL::BIGINT AS context_requests,
               NULL::BIGINT AS context_tokens, NULL::BIGINT AS generation_requests,
               NULL::BIGINT AS generation_tokens, min(start) - ({_FIRST}) AS start_ns,
               max("end") - min(start) AS span_ns, sum("end" - start)::BIGINT AS gpu_ns,
               count(*) AS launches, count(*) AS graph_launches, NULL::BIGINT AS host_ns
        FROM kernel k WHERE {where} AND graph_node IS NOT NULL AND launch_start IS NOT NULL
        GROUP BY file, rank, pid, launch_start"""


def _between_gaps(where: str, gap_ns: int) -> str:
    return f"""
        WITH ordered AS (
            SELECT file, rank, start, "end", graph_node, max("end") OVER (
                PARTITION BY file, rank ORDER BY start, "end"
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
            FROM kernel k WHERE {where}),
        numbered AS (
            SELECT *, count(*) FILTER (before IS NULL OR start - before >= {gap_ns}) OVER (
                PARTITION BY file, rank ORDER BY start, "end" ROWS UNBOUNDED PRECEDING) - 1 AS step
            FROM ordered)
        SELECT step, rank, 'after a pause' AS label, NULL::BIGINT AS context_requests,
               NULL::BIGINT AS context_tokens, NULL::BIGINT AS generation_requests,
               NULL::BIGINT AS generation_tokens, min(start) - ({_FIRST}) AS start_ns,
               max("end") - min(start) AS span_ns, sum("end" - start)::BIGINT AS gpu_ns,
               count(*) AS launches, count(*) FILTER (graph_node IS NOT NULL) AS graph_launches,
               NULL::BIGINT AS host_ns
        FROM numbered GROUP BY file, rank, step"""


def _merged(each: str) -> str:
    return f"""
        SELECT step, count(*) AS ranks, {_LABEL}, min(start_ns) AS start_ns,
               max(span_ns) AS span_ns, max(gpu_ns) AS gpu_ns, min(gpu_ns) AS least_gpu_ns,
               max(launches) AS launches, min(launches) AS least_launches,
               max(graph_launches) AS graph_launches, max(host_ns) AS host_ns
        FROM ({each}) GROUP BY step, {_LABEL} ORDER BY step"""


def _alike(table: KernelTable) -> bool:
    """Whether every rank that labels steps labels the same ones in the same order."""
    return not table.rows(
        """
        WITH each AS (SELECT file, rank, list(label ORDER BY number) AS labels FROM step
                      GROUP BY 1, 2)
        SELECT 1 FROM each WHERE labels <> (SELECT any_value(labels) FROM each) LIMIT 1
        """
    )
