"""Time per module path: of the module alone, and with all that lies below it."""

from __future__ import annotations

from opkit.nsys_parsers.attribution import Via
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, View


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
    sql = f"""
        WITH own AS (
            SELECT path_id, count(*) AS calls, sum("end" - start)::BIGINT AS ns,
                   count(*) FILTER (via = {int(Via.THREAD)}) AS by_thread,
                   count(*) FILTER (via = {int(Via.NODE)}) AS by_node,
                   count(*) FILTER (via = {int(Via.TIME)}) AS by_time,
                   count(DISTINCT (file, step)) AS steps
            FROM kernel k WHERE {selection.where(table)} GROUP BY 1),
        pieces AS (
            SELECT id, path, regexp_extract_all(path, '[^./]+[./]*') AS pieces FROM path
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
                   max(o.steps) AS steps, sum(o.by_thread)::BIGINT AS by_thread,
                   sum(o.by_node)::BIGINT AS by_node, sum(o.by_time)::BIGINT AS by_time,
                   len(regexp_extract_all(c.path, '[^./]+')) AS parts
            FROM counted c JOIN own o ON o.path_id = c.id GROUP BY 1)
        SELECT path, total_ns / greatest((SELECT sum(ns) FROM own), 1) AS share,
               * EXCLUDE (path, parts) FROM summed {limit} ORDER BY total_ns DESC, path"""
    where = selection.where(table)
    total, total_ns, none, none_ns, *ways = table.rows(
        f"""
        SELECT count(*), coalesce(sum("end" - start), 0)::BIGINT, count(*) FILTER (via = 0),
               coalesce(sum("end" - start) FILTER (via = 0), 0)::BIGINT,
               {
            ", ".join(
                f'coalesce(sum("end" - start) FILTER (via = {int(via)}), 0)::BIGINT'
                for via in (Via.THREAD, Via.NODE, Via.TIME)
            )
        }
        FROM kernel k WHERE {where}
        """
    )[0]
    about = {
        "executions": total,
        "total_ns": total_ns,
        "unattributed": {"executions": none, "ns": none_ns},
        "attributed_ns": dict(zip(("thread", "graph_node", "time"), ways, strict=True)),
    }
    return View("modules", sql, about)
