"""The kernel table of one trace, or of the ranks of one run, open for questions.

Each file is parsed once (``parse``) or found in its cache; here their parquet files become DuckDB
views with names, ranks and one clock.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from opkit.nsys_parsers import cache, ranks
from opkit.nsys_parsers.export import TraceFacts, connect, open_export, quoted, unreadable
from opkit.nsys_parsers.names import load_families, parse_name
from opkit.nsys_parsers.ranges import parse_step
from opkit.nsys_parsers.reading import Reading, utf8
from opkit.nsys_parsers.strings import write_texts


@dataclass
class KernelTable:
    """Use as a context manager. ``db`` holds these views, times in ns since the earliest session:

    ``kernel``: ``file, rank, kind, name_id, start, "end", pid, device, stream, correlation,
    grid_x … block_z, graph_node, launch_start, launch_tid, node_start, node_tid, step, step_via,
    range, path_id, via``; ``name(id, name, short, family, glue)``; ``path(id, path, module)``;
    ``step(file, rank, id, tid, start, "end", label, context_requests, context_tokens,
    generation_requests, generation_tokens, number)``, numbers counted in each rank from its first;
    ``range(file, rank, id, tid, start, "end", text, path_id)``.

    Attributes:
        facts: of each file.
        ranks: the processes that ran kernels, in order of rank.
        one_clock: whether times of different files can be compared.
    """

    db: duckdb.DuckDBPyConnection
    facts: tuple[TraceFacts, ...]
    ranks: tuple[ranks.Rank, ...]
    one_clock: bool
    _scratch: tempfile.TemporaryDirectory[str]

    def __enter__(self) -> KernelTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release DuckDB and what was parsed without a cache."""
        self.db.close()
        self._scratch.cleanup()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query over the views."""
        return self.db.execute(sql, list(parameters)).fetchall()


def open_table(paths: Sequence[Path], reading: Reading) -> KernelTable:
    """Open one trace, or all ranks of one run.

    Raises:
        BadInput: a file cannot be used (``export.open_export``), a rank is missing, or the files
            are not of one run.
        ToolMissing: a report was given and nsys is not there to export it.
    """
    for path in paths:
        utf8("the file", str(path))
    try:
        return _open(paths, reading)
    except duckdb.OutOfMemoryException as error:
        raise unreadable(paths[0], error) from error
    except duckdb.Error as error:
        if not reading.use_cache:
            raise unreadable(paths[0], error) from error
    # A cached file is of the right size, but damaged inside.
    for path in paths:
        cache.Cache(path).clear()
    try:
        return _open(paths, reading)
    except duckdb.Error as error:
        raise unreadable(paths[0], error) from error


def _open(paths: Sequence[Path], reading: Reading) -> KernelTable:
    scratch = tempfile.TemporaryDirectory(prefix="opkit-")
    with contextlib.ExitStack() as on_error:
        on_error.callback(scratch.cleanup)
        numbers = ranks.numbers(paths, partial=reading.partial)
        folders, facts = [], []
        for file, path in enumerate(paths):
            with ranks.told(numbers, file):
                folder, found = _parsed(path, Path(scratch.name) / str(file), reading)
            folders.append(folder)
            facts.append(found)
        db = connect(Path(scratch.name), reading.memory)
        on_error.callback(db.close)
        shifts, one_clock = ranks.clock(facts)
        found_ranks = ranks.find(db, folders, facts, shifts, numbers)
        _views(db, folders, shifts, found_ranks, reading.families)
        on_error.pop_all()
    return KernelTable(db, tuple(facts), found_ranks, one_clock, scratch)


def _parsed(path: Path, aside: Path, reading: Reading) -> tuple[Path, TraceFacts]:
    """The folder with this file's parsed table: from its cache, made there, or made ``aside``."""

    def fill(folder: Path) -> TraceFacts:
        # Imported when needed: numpy takes longer to import than a cached table to answer.
        from opkit.nsys_parsers.parse import parse

        reading.tell(f"{path.name}: opening", 0.0)
        with open_export(path) as export:
            parse(export, folder, reading.options, reading.memory, reading.tell)
            return export.facts

    if reading.use_cache and path.is_file():
        kept = cache.Cache(path)
        for _ in range(2):
            found = kept.find("table", reading.options)
            entry = found or kept.make("table", reading.options, fill)
            if entry is None:
                break
            try:
                return entry, cache.read_facts(entry, path)
            except (ValueError, TypeError, KeyError):
                kept.clear()  # damaged, though of the right size: made again
    aside.mkdir()
    return aside, fill(aside)


def _views(
    db: duckdb.DuckDBPyConnection,
    folders: Sequence[Path],
    shifts: Sequence[int],
    found: Sequence[ranks.Rank],
    families: Path | None,
) -> None:
    # Two ids of one file may hold one name, where an export is damaged or lacks names.
    merged = len(folders) > 1 or bool(
        db.execute(
            f"SELECT count(*) <> count(DISTINCT name) FROM {_source(folders[0], 'name')}"
        ).fetchall()[0][0]
    )
    _names(db, folders, families, merged)
    _merge(db, folders, "path", ("path", "module"), merged)
    selects: dict[str, list[str]] = {"kernel": [], "range": [], "step": []}
    for file, (folder, shift) in enumerate(zip(folders, shifts, strict=True)):
        own = [r for r in found if r.file == file]
        # Ids are spelled out and joins left away where one file needs none: each join of millions
        # of rows is a tenth of an answer.
        which = " ".join(f"WHEN {r.pid} THEN {r.rank}" for r in own)
        about = f"{file} AS file, (CASE k.pid {which} END)::INTEGER AS rank"
        name = _translated("name", file, "k.name_id") if merged else ""
        path = _translated("path", file, "k.path") if merged else ""
        path_id = f"{'path_of.merged' if merged else 'k.path'} AS path_id"
        times = ("start", '"end"', "launch_start", "node_start")
        selects["kernel"].append(
            f"""SELECT {about}, k.* EXCLUDE (name_id, path, {", ".join(times)}),
            {", ".join(f"k.{t} + {shift} AS {t}" for t in times)},
            {"name_of.merged" if merged else "k.name_id"} AS name_id, {path_id}
            FROM {_source(folder, "kernel")} k {name} {path}"""
        )
        inside = f'k.tid, k.start + {shift} AS start, k."end" + {shift} AS "end"'
        selects["range"].append(
            f"""SELECT {about}, k.id, {inside}, k.text, {path_id}
            FROM {_source(folder, "range")} k {path}"""
        )
        selects["step"].append(
            f"SELECT {about}, k.id, {inside}, k.label FROM {_source(folder, 'step')} k"
        )
    db.execute(f"CREATE VIEW kernel AS {' UNION ALL '.join(selects['kernel'])}")
    db.execute(f"CREATE VIEW range AS {' UNION ALL '.join(selects['range'])}")
    db.execute(f"CREATE TABLE labelled AS {' UNION ALL '.join(selects['step'])}")
    _steps(db)


def _translated(name: str, file: int, key: str) -> str:
    return f"JOIN {name}_of ON {name}_of.file = {file} AND {name}_of.id = {key}"


def _source(folder: Path, name: str) -> str:
    return f"read_parquet('{quoted(folder / f'{name}.parquet')}')"


def _names(
    db: duckdb.DuckDBPyConnection,
    folders: Sequence[Path],
    families: Path | None,
    translate: bool,
) -> None:
    """Table ``name``: demangled, short, family."""
    _merge(db, folders, "name", ("name",), translate)
    rows = db.execute("SELECT id, name FROM name ORDER BY id").fetchall()
    table = load_families(families)
    parsed = [parse_name(name, table) for _, name in rows]
    write_texts(
        db, "name_parsed", [row[0] for row in rows],
        short=[p.short for p in parsed], family=[p.family for p in parsed],
        glue=["1" if p.glue else "" for p in parsed],
    )  # fmt: skip
    db.execute(
        "CREATE OR REPLACE TABLE name AS "
        "SELECT id, n.name, p.short, p.family, p.glue = '1' AS glue "
        "FROM name n JOIN name_parsed p USING (id)"
    )
    db.execute("DROP TABLE name_parsed")


def _merge(
    db: duckdb.DuckDBPyConnection,
    folders: Sequence[Path],
    name: str,
    columns: tuple[str, ...],
    translate: bool,
) -> None:
    """Table ``name(id, …)`` from the dictionaries of all files: ids are kept, or translated by
    ``{name}_of(file, id, merged)``. The empty path has id 0 in either."""
    listed = ", ".join(columns)
    if not translate:
        db.execute(f"CREATE TABLE {name} AS SELECT id, {listed} FROM {_source(folders[0], name)}")
        return
    each = " UNION ALL ".join(
        f"SELECT {file} AS file, id, {listed} FROM {_source(folder, name)}"
        for file, folder in enumerate(folders)
    )
    db.execute(f"CREATE TABLE {name}_each AS {each}")
    db.execute(
        f"CREATE TABLE {name} AS "
        f"SELECT (row_number() OVER (ORDER BY {listed}) - 1)::INTEGER AS id, {listed} "
        f"FROM (SELECT DISTINCT {listed} FROM {name}_each)"
    )
    db.execute(
        f"CREATE TABLE {name}_of AS SELECT e.file, e.id, m.id AS merged FROM {name}_each e "
        f"JOIN {name} m USING ({listed})"
    )
    db.execute(f"DROP TABLE {name}_each")


def _steps(db: duckdb.DuckDBPyConnection) -> None:
    """Table ``step``: labels read, each distinct one once."""
    labels = [row[0] for row in db.execute("SELECT DISTINCT label FROM labelled").fetchall()]
    db.execute(
        "CREATE TABLE step_label (label VARCHAR, context_requests BIGINT, context_tokens BIGINT, "
        "generation_requests BIGINT, generation_tokens BIGINT)"
    )
    said = [(label, parse_step(label)) for label in labels]
    rows = [
        (
            label, found.context_requests, found.context_tokens,
            found.generation_requests, found.generation_tokens,
        )
        for label, found in said if found is not None
    ]  # fmt: skip
    if rows:
        db.executemany("INSERT INTO step_label VALUES (?, ?, ?, ?, ?)", rows)
    db.execute(
        "CREATE TABLE step AS SELECT l.*, s.* EXCLUDE (label), "
        "row_number() OVER (PARTITION BY l.file, l.rank ORDER BY l.start, l.id) - 1 AS number "
        "FROM labelled l LEFT JOIN step_label s USING (label)"
    )
    db.execute("DROP TABLE labelled; DROP TABLE step_label")


def iterate(cursor: duckdb.DuckDBPyConnection, many: int = 10_000) -> Iterator[tuple[Any, ...]]:
    """Rows of a query that has run, without holding them all."""
    while rows := cursor.fetchmany(many):
        yield from rows
