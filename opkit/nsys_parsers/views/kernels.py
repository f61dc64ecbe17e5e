"""Which kernels ran, how often, how long: the columns of nsys' ``cuda_gpu_kern_sum`` and more.

A plain question about one trace needs no attribution: ``quick`` answers it from the export alone,
in less than half the time of a full parse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from opkit.nsys_parsers import cache, kernels
from opkit.nsys_parsers.export import (
    Export,
    TraceFacts,
    attach,
    connect,
    open_export,
    unreadable,
)
from opkit.nsys_parsers.kernels import RUNTIME_TABLE, UNNAMED
from opkit.nsys_parsers.names import load_families, parse_name
from opkit.nsys_parsers.reading import CannotWrite, Reading, utf8
from opkit.nsys_parsers.strings import load_strings
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, View, literal

LEVELS = ("demangled", "short", "family")
# Of ``ns``, the executions' durations. Standard deviation of the sample, as nsys has it; of a
# single execution 0. Sums of floating-point numbers depend on their order, so the last digits go.
STATISTICS = """
count(*) AS calls, sum(ns)::BIGINT AS total_ns, round(avg(ns), 3) AS mean_ns,
median(ns) AS median_ns, min(ns) AS min_ns, max(ns) AS max_ns,
round(coalesce(stddev_samp(ns), 0), 3) AS stddev_ns,
count(*) FILTER (in_graph) AS graph_calls"""
_UNATTRIBUTED = """
SELECT count(*) FILTER (launch_start IS NULL),
       count(*) FILTER (graph_node IS NOT NULL AND node_start IS NULL),
       count(*) FILTER (name_id IN (SELECT id FROM name WHERE name = {unnamed}))
FROM kernel k WHERE {where}"""


def kernels_view(
    table: KernelTable, selection: Selection, level: str = "demangled", copies: bool = False
) -> View:
    """Kernels (with ``copies`` also copies and fills) by name, longest total first.

    ``short`` and ``family`` of a row are those of its kernel with the most time.

    Args:
        level: the name to group by: ``demangled``, ``short`` or ``family``.
    """
    where = selection.where(table) + ("" if copies else " AND k.kind = 'kernel'")
    key = {"demangled": "n.name", "short": "n.short", "family": "n.family"}[level]
    sql = f"""
        WITH grouped AS (
            SELECT name_id, "end" - start AS ns, graph_node IS NOT NULL AS in_graph
            FROM kernel k WHERE {where}),
        named AS (SELECT {key} AS name, g.*, n.short, n.family
                  FROM grouped g JOIN name n ON n.id = g.name_id),
        summed AS (SELECT name, {STATISTICS}, count(DISTINCT name_id) AS names
                   FROM named GROUP BY 1),
        parts AS (SELECT name, short, family, sum(ns) AS part_ns FROM named GROUP BY 1, 2, 3),
        most AS (SELECT name, first(short ORDER BY part_ns DESC, short, family) AS short,
                        first(family ORDER BY part_ns DESC, short, family) AS family
                 FROM parts GROUP BY 1)
        SELECT name, total_ns / greatest(sum(total_ns) OVER (), 1) AS share,
               * EXCLUDE (name, names), names
        FROM summed JOIN most USING (name) ORDER BY total_ns DESC, calls, name"""
    counted = _UNATTRIBUTED.format(where=where, unnamed=literal(UNNAMED))
    launch, node, name = table.rows(counted)[0]
    return View("kernels", sql, _about(table.facts, launch, node, name))


@dataclass(frozen=True)
class Quick:
    """Rows of ``kernels_view`` of a whole trace, by demangled name."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    about: dict[str, Any]


def quick(path: Path, reading: Reading) -> Quick:
    """Kernels of one trace by demangled name, without a kernel table.

    Raises:
        BadInput: as ``export.open_export``.
        ToolMissing: a report was given and nsys is not there to export it.
    """
    made: list[dict[str, Any]] = []
    utf8("the file", str(path))

    def fill(folder: Path) -> TraceFacts:
        with open_export(path) as export:
            made.append(_summed(export, reading.memory))
            try:
                (folder / "kernels.json").write_text(json.dumps(made[0]), "utf-8")
            except OSError as error:
                raise CannotWrite(*error.args) from error
            return export.facts

    if reading.use_cache and path.is_file():
        kept = cache.Cache(path)
        entry = kept.find("kernels", ()) or kept.make("kernels", (), fill)
        if entry is not None and not made:
            try:
                made.append(json.loads((entry / "kernels.json").read_text("utf-8")))
            except ValueError:  # damaged, though of the right size
                kept.clear()
                kept.make("kernels", (), fill)
    if not made:
        with open_export(path) as export:
            made.append(_summed(export, reading.memory))
    return _quick(made[0], reading)


def _quick(found: dict[str, Any], reading: Reading) -> Quick:
    """With short names and families, which depend on the user's table."""
    table = load_families(reading.families)
    total = max(sum(row[2] for row in found["rows"]), 1)
    rows = []
    for name, *numbers in found["rows"]:
        parsed = parse_name(name, table)
        rows.append((name, numbers[1] / total, *numbers, parsed.short, parsed.family, 1))
    columns = ["name", "share", *found["columns"][1:], "short", "family", "names"]
    return Quick(columns, rows, found["about"])


def _summed(export: Export, memory: str) -> dict[str, Any]:
    """Rows, columns and counts, as plain data."""
    db = connect(export.scratch, memory)
    try:
        attach(db, export)
        load_strings(db, export.columns)
        db.execute(
            f"""
            CREATE TABLE k AS
            SELECT name_id, ("end" - start)::BIGINT AS ns, pid, correlation, graph_node
            FROM ({kernels.kernel_select(export.columns)})
            """
        )
        # Two ids may hold one text, so ids are mapped to the first of their text; grouping by
        # numbers takes half the time of grouping by texts.
        cursor = db.execute(
            f"""
            WITH used AS (SELECT DISTINCT name_id FROM k),
            named AS (SELECT a.name_id, {kernels.NAME_SQL} AS name
                      FROM used a LEFT JOIN string s ON s.id = a.name_id),
            first AS (SELECT name_id, name, min(name_id) OVER (PARTITION BY name) AS id FROM named),
            summed AS (SELECT f.id, {STATISTICS}
                       FROM (SELECT name_id, ns, graph_node IS NOT NULL AS in_graph FROM k) k
                       JOIN first f USING (name_id) GROUP BY 1)
            SELECT n.name, s.* EXCLUDE (id) FROM summed s JOIN named n ON n.name_id = s.id
            ORDER BY total_ns DESC, calls, name
            """
        )
        columns = [column[0] for column in cursor.description]
        rows = cursor.fetchall()
        unnamed = sum(row[1] for row in rows if row[0] == UNNAMED)
        about = _about((export.facts,), *_unlinked(db, export), unnamed)
        return {"columns": columns, "rows": rows, "about": about}
    except (duckdb.Error, UnicodeDecodeError) as error:
        raise unreadable(export.facts.path, error) from error
    finally:
        db.close()


def _unlinked(db: duckdb.DuckDBPyConnection, export: Export) -> tuple[int, int]:
    """Kernels without a launch, and kernels of graphs without their node's creation."""
    launch = "SELECT count(*) FROM k"
    if RUNTIME_TABLE in export.columns:
        pid = kernels.pid_of_thread(export.columns)
        launch += (
            f' ANTI JOIN (SELECT {pid} AS pid, "correlationId" AS correlation '
            f"FROM export.{RUNTIME_TABLE}) l ON l.pid = k.pid AND l.correlation = k.correlation"
        )
    kernels.build_nodes(db, export.columns)
    nodes = (
        "SELECT coalesce(sum(calls), 0) FROM (SELECT pid, graph_node, count(*) AS calls FROM k "
        "WHERE graph_node IS NOT NULL GROUP BY 1, 2) g "
        "ANTI JOIN node n ON n.pid = g.pid AND n.node = g.graph_node"
    )
    return int(db.execute(launch).fetchall()[0][0]), int(db.execute(nodes).fetchall()[0][0])


def _about(facts: tuple[TraceFacts, ...], launch: int, node: int, name: int) -> dict[str, Any]:
    return {
        "unattributed": {
            "launch": launch,
            "graph_node": node,
            "name": name,
            "whole_graphs": sum(each.whole_graphs for each in facts),
            "whole_graphs_ns": sum(each.whole_graphs_ns for each in facts),
        },
        "losses": sorted({loss for each in facts for loss in each.losses}),
    }
