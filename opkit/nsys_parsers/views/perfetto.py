"""A trace to open in ui.perfetto.dev: what was selected, on rows of threads and streams.

The form is Chrome's JSON ("Trace Event Format", Google, 2016): an event of phase ``X`` is a slice,
``ts`` and ``dur`` in µs with three decimals, so that no ns is lost. Slices of one row may nest but
never cross (Perfetto v52 drops those that do), so what overlaps gets *lanes*, rows of their own.

DuckDB gathers and writes all of it; numpy sees what overlaps, about 150 bytes each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np

from opkit.errors import BadInput
from opkit.nsys_parsers.export import first_line, quoted
from opkit.nsys_parsers.kernels import SIZES, THREAD_BITS
from opkit.nsys_parsers.ranges import COUNTER_SQL, MODULE_SQL, STILL_OPEN
from opkit.nsys_parsers.stacks import NOWHERE, Int64, Stacks, write
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.view import Selection, literal, regex

# Arrows from launches to kernels: beyond so many they hide more than they show.
ARROWS = 50_000


def write_perfetto(
    table: KernelTable, selection: Selection, path: Path, arrows: int = ARROWS
) -> int:
    """Write the selected kernels, copies and fills, with the steps and ranges of host threads; put
    in place at once, gzipped if ``path`` ends in ``.gz``.

    Args:
        arrows: draw arrows if no more eager kernels than this are selected.

    Returns:
        How many kernels, copies and fills were written.

    Raises:
        BadInput: nothing was launched in the selection, or its times cannot be written.
        OSError: the file cannot be written.
    """
    where = selection.where(table)
    part = path.with_name(path.name + ".part")
    db = table.db
    ordered = db.execute("SELECT current_setting('preserve_insertion_order')").fetchall()[0][0]
    db.execute("CREATE SCHEMA perfetto")
    try:
        count = _gather_slices(table, where, arrows)
        if not count:
            raise BadInput(
                f"nothing was launched in {selection}",
                "`opkit trace steps` and `opkit trace modules` list what there is",
            )
        _gather_host(table, selection)
        _place(db, "slice", _OVERLAPPING, lanes)
        _place(db, "host", _HOST, nested_lanes)
        _describe(table)
        # A range must stand before those inside it, and the file has a beginning and an end.
        db.execute("SET preserve_insertion_order = true")
        db.execute(
            f"COPY ({_lines(table)}) TO '{quoted(part)}' (FORMAT csv, "
            "HEADER false, QUOTE '', ESCAPE '', USE_TMP_FILE false, "
            f"COMPRESSION {'gzip' if path.suffix == '.gz' else 'none'})"
        )
        part.replace(path)
    except duckdb.IOException as error:
        raise OSError(0, first_line(error).rpartition(": ")[2], str(path)) from error
    except duckdb.DataError as error:
        raise BadInput(f"times of this trace are damaged ({first_line(error)})") from error
    finally:
        part.unlink(missing_ok=True)
        db.execute(f"SET preserve_insertion_order = {bool(ordered)}")
        db.execute("DROP SCHEMA perfetto CASCADE")
    return count


def _gather_slices(table: KernelTable, where: str, arrows: int) -> int:
    """Tables ``stream(id, file, pid, rank, device, stream)`` and ``slice``, a row an execution;
    how many those are. ``launch_tid`` is null where no arrow is to be drawn."""
    launched = "k.kind = 'kernel' AND k.graph_node IS NULL AND k.launch_tid IS NOT NULL"
    table.db.execute(
        f"""
        CREATE TABLE perfetto.stream AS
        SELECT row_number() OVER (ORDER BY file, pid, device, stream)::INTEGER AS id, *
        FROM (SELECT file, coalesce(pid, 0) AS pid, coalesce(device, 0) AS device,
                     coalesce(stream, 0) AS stream, any_value(rank) AS rank,
                     count(*) AS executions, count(*) FILTER ({launched}) AS launches
              FROM kernel k WHERE {where} GROUP BY 1, 2, 3, 4)
        """
    )
    count, launches = table.rows(
        "SELECT coalesce(sum(executions), 0), coalesce(sum(launches), 0) FROM perfetto.stream"
    )[0]
    drawn = launched if launches <= arrows else "false"
    table.db.execute(
        f"""
        CREATE TABLE perfetto.slice AS
        SELECT s.id AS stream, k.start, greatest(k."end", k.start) AS "end", k.name_id, k.path_id,
               k.step, {", ".join(f"k.{size}" for size in SIZES)}, k.graph_node,
               CASE WHEN {drawn} THEN k.launch_start END AS launch_start,
               CASE WHEN {drawn} THEN k.launch_tid END AS launch_tid
        FROM kernel k JOIN perfetto.stream s ON s.file = k.file AND s.pid = coalesce(k.pid, 0)
             AND s.device = coalesce(k.device, 0) AND s.stream = coalesce(k.stream, 0)
        WHERE {where}
        """
    )
    return int(count)


def _gather_host(table: KernelTable, selection: Selection) -> None:
    """Table ``host(file, rank, pid, tid, thread, start, "end", name, category, args, slice)``:
    steps, ranges, and launches with the slice that an arrow leads to; ``thread`` is an id.

    A step is shown if anything selected ran in it. A range is shown if it is of the selected rank,
    its path matches, and it began in a selected step: all of these that are asked for.
    """
    of_rank = "true" if selection.rank is None else f"r.rank = {selection.rank}"
    ran = "(SELECT s.file, k.step FROM perfetto.slice k JOIN perfetto.stream s ON s.id = k.stream)"
    steps = f"(r.file, r.id) IN {ran}" if selection.step or selection.module else of_rank
    chosen, inside = [of_rank], ""
    if selection.module:
        chosen.append(regex(table, "p.path", selection.module))
    if selection.step:
        inside = (
            "ASOF JOIN shown_step t ON t.file = r.file AND t.tid = r.tid AND r.start >= t.start"
        )
        chosen.append('r.start <= t."end"')
    module = f"regexp_extract(r.text, {literal(MODULE_SQL)}, 1)"
    about = _json('{"path":<path>,"text":<text>}', path="to_json(p.path)", text="to_json(r.text)")
    pids = " ".join(f"WHEN {rank.rank} THEN {rank.pid}" for rank in table.ranks)
    table.db.execute(
        f"""
        CREATE TABLE perfetto.host AS
        WITH shown_step AS (SELECT * FROM step r WHERE {steps}),
        shown AS (
            SELECT file, rank, tid, start, "end", label AS name, 'step' AS category,
                   {_json('{"step":<number>}', number="number")} AS args, NULL::BIGINT AS slice
            FROM shown_step
            UNION ALL
            SELECT r.file, r.rank, r.tid, r.start, r."end",
                   if({module} = '', regexp_replace(r.text, {literal(COUNTER_SQL)}, ''),
                      regexp_extract({module}, '[^.]*$')),
                   if({module} = '', 'range', 'module'), {about}, NULL
            FROM range r JOIN path p ON p.id = r.path_id {inside} WHERE {" AND ".join(chosen)}
            UNION ALL
            SELECT s.file, s.rank, k.launch_tid, k.launch_start, k.launch_start, 'launch', 'launch',
                   '{{}}', k.rowid
            FROM perfetto.slice k JOIN perfetto.stream s ON s.id = k.stream
            WHERE k.launch_tid IS NOT NULL),
        last AS (SELECT max("end") AS moment FROM (
            SELECT "end" FROM perfetto.slice UNION ALL
            SELECT "end" FROM shown WHERE "end" < {STILL_OPEN})),
        placed AS (
            SELECT s.* EXCLUDE ("end"),
                   coalesce(CASE rank {pids} END, tid - (tid & {THREAD_BITS})) AS pid,
                   greatest(start, if("end" < {STILL_OPEN}, "end", last.moment)) AS "end"
            FROM shown s CROSS JOIN last)
        SELECT *, dense_rank() OVER (ORDER BY file, pid, tid)::INTEGER AS thread FROM placed
        """
    )


_HOST = """
SELECT rowid AS id, thread AS track, start, "end" FROM perfetto.host
ORDER BY track, start, "end" DESC
"""
_OVERLAPPING = """
WITH each AS (SELECT rowid AS id, stream AS track, start, greatest("end", start + 1) AS "end"
              FROM perfetto.slice),
marked AS (
    SELECT *, start < max("end") OVER (PARTITION BY track ORDER BY start, "end"
                  ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS late,
           "end" > lead(start) OVER (PARTITION BY track ORDER BY start, "end") AS early
    FROM each)
SELECT id, track, start, "end" FROM marked WHERE late OR early
"""


def _place(
    db: duckdb.DuckDBPyConnection, table: str, sql: str, lane_of: Callable[..., Int64]
) -> None:
    """Table ``{table}_lane(id, lane)`` of the rows that are not on the first lane."""
    rows = db.execute(sql).fetchnumpy()
    ids, *places = (np.asarray(rows[name]) for name in ("id", "track", "start", "end"))
    lane = lane_of(*places)
    moved = np.flatnonzero(lane)
    write(db, f"perfetto.{table}_lane", {"id": ids[moved], "lane": lane[moved]})


def lanes(track: Int64, start: Int64, end: Int64) -> Int64:
    """Lanes from 0 up, such that slices of one track and lane do not overlap; no more lanes than
    slices that run at once.

    Where a slice begins after all earlier ones ended, lanes begin with 0 again. Between such
    moments, the n-th slice that can take a used lane takes the one that was freed n-th.

    Args:
        track, start, end: of shape (slices,), in any order; tracks from 0 up. A slice of no length
            takes 1 ns.
    """
    count = len(start)
    order = np.lexsort((end, start, track))
    track, start, end = track[order], start[order], np.maximum(end, start + 1)[order]
    fresh = np.diff(track, prepend=NOWHERE) != 0
    borders = np.append(np.flatnonzero(fresh), count)
    for first, last in itertools.pairwise(borders):
        before = np.maximum.accumulate(end[first : last - 1])
        fresh[first + 1 : last] = start[first + 1 : last] >= before
    group, head = np.cumsum(fresh) - 1, np.flatnonzero(fresh)
    is_start = np.repeat((False, True), count)
    events = np.lexsort((is_start, np.append(end, start), np.append(group, group)))
    began = is_start[events]
    running = np.cumsum(np.where(began, 1, -1))[began]
    # A slice opens a lane where more run than ever before in its group.
    most = np.maximum.accumulate(running + group * (count + 1))
    takes = np.diff(most, prepend=-1) == 0
    taken = np.cumsum(takes)
    # The ends of a group stand in order of time at the places of its slices.
    ended = events[~began]
    follows = np.arange(count)
    again = np.flatnonzero(takes)
    base = head[group[again]]
    follows[again] = ended[base + taken[again] - 1 - taken[base]]
    lane = np.empty(count, np.int64)
    lane[order] = (running - 1)[_ends_of(follows)]
    return lane


def nested_lanes(track: Int64, start: Int64, end: Int64) -> Int64:
    """Lanes from 0 up, such that of two slices of one track and lane that overlap one contains the
    other. A slice that crosses an earlier one leaves its lane, with all that lies in it.

    Args:
        track, start, end: as for ``lanes``, sorted by track, start, and longest first.
    """
    parent = Stacks(track, start, end).parent
    # The latest slice begun before and still open: the parent, unless that one is crossed.
    latest = np.arange(-1, len(start) - 1)
    latest[np.diff(track, prepend=NOWHERE) != 0] = NOWHERE
    pending = np.flatnonzero(latest >= 0)
    while len(pending):
        pending = pending[end[latest[pending]] <= start[pending]]
        latest[pending] = parent[latest[pending]]
        pending = pending[latest[pending] >= 0]
    leads = ((latest >= 0) & (end[latest] < end)) | (parent < 0)
    root = _ends_of(np.where(leads, np.arange(len(start)), parent))
    lane = np.zeros(len(start), np.int64)
    lane[leads] = lanes(track[leads], start[leads], end[leads])
    return lane[root]


def _ends_of(pointer: Int64) -> Int64:
    """Where following each pointer ends: at one that points to itself."""
    while True:
        further = pointer[pointer]
        if np.array_equal(further, pointer):
            return pointer
        pointer = further


def _describe(table: KernelTable) -> None:
    """Table ``row(rank, file, pid, device, number, lane, track, thread, process, id)``: each lane
    of a thread or stream, with ids of its process and of its own for the file. They count from 1:
    Perfetto takes 32 bits, and processes of several hosts may have the same."""
    table.db.execute(
        """
        CREATE TABLE perfetto.row AS
        WITH found AS (
            SELECT s.rank, s.file, s.pid, s.device, s.stream AS number, r.lane, s.id AS track
            FROM perfetto.stream s JOIN (
                SELECT DISTINCT k.stream AS id, coalesce(l.lane, 0) AS lane
                FROM perfetto.slice k LEFT JOIN perfetto.slice_lane l ON l.id = k.rowid
            ) r USING (id)
            UNION ALL
            SELECT DISTINCT h.rank, h.file, h.pid, NULL, h.tid, coalesce(l.lane, 0), h.thread
            FROM perfetto.host h LEFT JOIN perfetto.host_lane l ON l.id = h.rowid),
        -- Ranks before other processes, threads before streams.
        placed AS (
            SELECT *, dense_rank() OVER (ORDER BY rank NULLS LAST, file, pid) AS process,
                   row_number() OVER (ORDER BY rank NULLS LAST, file, pid, device NULLS FIRST,
                                      number, lane) AS place
            FROM found)
        -- A thread with the id of its process would be its main one: rows go on after those.
        SELECT *, device IS NULL AS thread, place + max(process) OVER () AS id FROM placed
        """
    )


def _names(table: KernelTable) -> str:
    """SQL for the events that name processes and rows, and tell their order."""
    thread = f"'thread ' || (number & {THREAD_BITS})"
    stream = "'GPU ' || device || ' · stream ' || number"
    files = " ".join(
        f"WHEN {file} THEN {literal(facts.path.name)}" for file, facts in enumerate(table.facts)
    )
    own_clock = "NULL" if table.one_clock else f"CASE file {files} END || ' (own clock)'"
    event = '{"ph":"M","pid":<process><tid>,"name":"<what>_'
    order = event + 'sort_index","args":{"sort_index":<id>}}'
    line = _json(
        event + 'name","args":{"name":<name>}},' + order,
        process="process", what="what", name="to_json(name)", id="id",
        tid=f"""if(what = 'thread', {_json(',"tid":<id>', id="id")}, '')""",
    )  # fmt: skip
    return f"""
    SELECT if(id = 1, '', ',') || {line} FROM (
        SELECT 'process' AS what, process, process AS id, concat_ws(' · ', 'rank ' || rank,
            'GPU ' || string_agg(DISTINCT device, ', ' ORDER BY device),
            'pid ' || nullif(pid >> 24 & {THREAD_BITS}, 0), {own_clock}) AS name
        FROM perfetto.row GROUP BY rank, file, pid, process
        UNION ALL SELECT 'thread', process, id, if(thread, {thread}, {stream})
            || if(lane > 0, ' (' || (lane + 1) || ')', '') FROM perfetto.row)
    ORDER BY id"""


def _lines(table: KernelTable) -> str:
    """SQL for the lines of the file; a comma stands before each event but the first."""
    zero = table.rows(
        "SELECT least((SELECT min(start) FROM perfetto.slice), "
        "(SELECT min(start) FROM perfetto.host))"
    )[0][0]
    event = ',{"ph":"X","pid":<pid>,"tid":<tid>,"ts":<ts>,"dur":<dur>,'
    arrow = '"bind_id":"0x<id>","flow_<way>":true,'
    common = {
        "pid": "r.process", "tid": "r.id", "ts": _us(f"k.start - {zero}"),
        "dur": _us('k."end" - k.start'),
    }  # fmt: skip
    host = _json(
        event + '<flow>"name":<name>,"cat":"<category>","args":<args>}',
        **common, name="to_json(k.name)", category="k.category", args="k.args",
        flow=f"coalesce({_json(arrow, id='k.slice', way=literal('out'))}, '')",
    )  # fmt: skip
    sizes = _json(
        ',"grid":"<grid_x>,<grid_y>,<grid_z>","block":"<block_x>,<block_y>,<block_z>"',
        **{size: f"k.{size}" for size in SIZES},
    )
    executed = _json(
        event + '<flow><names><module><step>"mode":"<mode>"<sizes>}}',
        **common,
        flow=f"if(k.launch_tid IS NULL, '', {_json(arrow, id='k.rowid', way=literal('in'))})",
        names="n.json", module="p.json", step="coalesce(s.json, '')",
        mode="if(k.graph_node IS NULL, 'eager', 'graph')",
        sizes=f"coalesce({sizes}, '')",
    )  # fmt: skip
    names = _json(
        '"name":<short>,"cat":<family>,"args":{"demangled":<name>,',
        **{part: f"to_json({part})" for part in ("short", "family", "name")},
    )
    module = _json('"module":<path>,', path="to_json(path)")
    step = _json('"step":<number>,"label":<label>,', number="number", label="to_json(label)")
    return f"""
    SELECT '{{"displayTimeUnit":"ns","traceEvents":['
    UNION ALL ({_names(table)})
    UNION ALL (SELECT {host} FROM perfetto.host k LEFT JOIN perfetto.host_lane l ON l.id = k.rowid
        JOIN perfetto.row r ON r.thread AND r.track = k.thread AND r.lane = coalesce(l.lane, 0)
        ORDER BY k.thread, k.start, k."end" DESC)
    UNION ALL (SELECT {executed}
        FROM perfetto.slice k LEFT JOIN perfetto.slice_lane l ON l.id = k.rowid
        JOIN perfetto.stream t ON t.id = k.stream
        JOIN perfetto.row r ON NOT r.thread AND r.track = k.stream AND r.lane = coalesce(l.lane, 0)
        JOIN (SELECT id, {names} AS json FROM name) n ON n.id = k.name_id
        JOIN (SELECT id, if(path = '', '', {module}) AS json FROM path) p ON p.id = k.path_id
        LEFT JOIN (SELECT file, id, {step} AS json FROM step) s
        ON s.file = t.file AND s.id = k.step)
    UNION ALL SELECT ']}}'"""


def _us(ns: str) -> str:
    """SQL for whole ns as µs, exactly."""
    return f"(({ns})::DECIMAL(18, 0) * 0.001::DECIMAL(4, 3))"


def _json(template: str, **values: str) -> str:
    """SQL for the template, each ``<NAME>`` in it replaced by an expression."""
    pieces = re.split(r"<(\w+)>", template)
    return " || ".join(
        values[piece] if index % 2 else literal(piece)
        for index, piece in enumerate(pieces)
        if piece
    )
