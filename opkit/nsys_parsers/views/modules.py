"""Time per module path: of the module alone, and with all that lies below it."""

from __future__ import annotations

from opkit.nsys_parsers.reading import Via
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, View

# Of a longer path only so many beginnings are looked for: real ones have a dozen parts.
PARTS = 64


def modules_view(
    table: KernelTable, selection: Selection, fold: bool = False, depth: int | None = None
) -> View:
    """Module paths, longest total first; the empty path is what lies in no range.

    Args:
        fold: count paths that differ in numbers only as one: ``layers.*.self_attn``.
        depth: only paths of so many parts (``model.layers.3`` has three) or fewer.
    """
    name = "regexp_replace(a.path, '\\d+', '*', 'g')" if fold else "a.path"
    limit = f"WHERE parts <= {depth}" if depth is not None else ""
    # Executions of one path in one step are many: everything below works on a small table.
    table.db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE placed AS
        SELECT path_id, via, file, step, count(*) AS calls, sum("end" - start)::BIGINT AS ns
        FROM kernel k WHERE {selection.where(table)} GROUP BY 1, 2, 3, 4
        """
    )
    sql = f"""
        WITH own AS (
            SELECT path_id, sum(calls)::BIGINT AS calls, sum(ns)::BIGINT AS ns,
                   sum(calls) FILTER (via = {int(Via.THREAD)}) AS by_thread,
                   sum(calls) FILTER (via = {int(Via.NODE)}) AS by_node,
                   sum(calls) FILTER (via = {int(Via.TIME)}) AS by_time
            FROM placed GROUP BY 1),
        stepped AS (SELECT path_id, count(*) AS steps FROM (
            SELECT DISTINCT path_id, file, step FROM placed WHERE step IS NOT NULL) GROUP BY 1),
        pieces AS (
            SELECT id, path, regexp_extract_all(path, '[^./]+[./]*')[:{PARTS}] AS pieces FROM path
            WHERE id IN (SELECT path_id FROM own)),
        prefixes AS (
            SELECT id, unnest(list_transform(generate_series(1, len(pieces)),
                lambda i: rtrim(array_to_string(pieces[1:i], ''), './'))) AS path FROM pieces),
        -- Above a path stand those of its beginnings that are paths themselves.
        above AS (
            SELECT DISTINCT x.id, x.path FROM prefixes x JOIN path p ON p.path = x.path
            UNION SELECT id, path FROM pieces),
        named AS (
            SELECT a.id, {name} AS path, a.id = p.id AS itself
            FROM above a LEFT JOIN path p ON p.path = a.path),
        counted AS (SELECT DISTINCT id, path, max(itself) OVER (PARTITION BY id, path) AS itself
                    FROM named),
        summed AS (
            SELECT c.path, sum(o.ns)::BIGINT AS total_ns, sum(o.calls)::BIGINT AS calls,
                   coalesce(sum(o.ns) FILTER (c.itself), 0)::BIGINT AS self_ns,
                   coalesce(sum(o.calls) FILTER (c.itself), 0)::BIGINT AS self_calls,
                   coalesce(max(t.steps), 0) AS steps,
                   coalesce(sum(o.by_thread), 0)::BIGINT AS by_thread,
                   coalesce(sum(o.by_node), 0)::BIGINT AS by_node,
                   coalesce(sum(o.by_time), 0)::BIGINT AS by_time,
                   len(regexp_extract_all(c.path, '[^./]+')) AS parts
            FROM counted c JOIN own o ON o.path_id = c.id
            LEFT JOIN stepped t ON t.path_id = c.id GROUP BY 1)
        SELECT path, total_ns / greatest((SELECT sum(ns) FROM own), 1) AS share,
               * EXCLUDE (path, parts) FROM summed {limit} ORDER BY total_ns DESC, path"""
    found = {
        via: (int(calls), int(ns))
        for via, calls, ns in table.rows("SELECT via, sum(calls), sum(ns) FROM placed GROUP BY 1")
    }
    none, none_ns = found.get(Via.NONE, (0, 0))
    about = {
        "executions": sum(calls for calls, _ in found.values()),
        "total_ns": sum(ns for _, ns in found.values()),
        "unattributed": {"executions": none, "ns": none_ns},
        "attributed_ns": {
            word: found.get(via, (0, 0))[1]
            for word, via in (("thread", Via.THREAD), ("graph_node", Via.NODE), ("time", Via.TIME))
        },
    }
    return View("modules", sql, about)
