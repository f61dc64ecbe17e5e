"""The kernel table of one trace, or of the ranks of one run, open for questions.

Each file is parsed once (``parse``) or found in its cache; here their parquet files become DuckDB
views with names, ranks and one clock.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from opkit.nsys_parsers import cache, ranks
from opkit.nsys_parsers.export import MEMORY_LIMIT, TraceFacts, connect, open_export, quoted
from opkit.nsys_parsers.names import load_families, parse_name
from opkit.nsys_parsers.parse import Options, Tell, parse, silent
from opkit.nsys_parsers.ranges import parse_step
from opkit.nsys_parsers.strings import write_texts


@dataclass(frozen=True)
class Reading:
    """How traces are read.

    Attributes:
        options: what the parsed table depends on.
        memory: DuckDB's limit before it spills to disk.
        use_cache: keep parsed tables beside the exports, and use those that are there.
        families: a user's table of kernel families, read before the built-in one.
        partial: the files need not be all ranks of a run.
        tell: is told what is read, and how much of that file is done, 0 to 1.
    """

    options: Options = field(default_factory=Options)
    memory: str = MEMORY_LIMIT
    use_cache: bool = True
    families: Path | None = None
    partial: bool = False
    tell: Tell = silent

    def told(self, tell: Tell) -> Reading:
        """The same, telling ``tell``."""
        return replace(self, tell=tell)


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
        reading.tell(f"{path.name}: opening", 0.0)
        with open_export(path) as export:
            parse(export, folder, reading.options, reading.memory, reading.tell)
            return export.facts

    if reading.use_cache and path.is_file():
        kept = cache.Cache(path)
        entry = kept.find("table", reading.options) or kept.make("table", reading.options, fill)
        if entry is not None:
            return entry, cache.read_facts(entry, path)
    aside.mkdir()
    return aside, fill(aside)


def _views(
    db: duckdb.DuckDBPyConnection,
    folders: Sequence[Path],
    shifts: Sequence[int],
    found: Sequence[ranks.Rank],
    families: Path | None,
) -> None:
    db.execute("CREATE TABLE rank_of (file INTEGER, pid BIGINT, rank INTEGER)")
    db.executemany("INSERT INTO rank_of VALUES (?, ?, ?)", [(r.file, r.pid, r.rank) for r in found])
    _names(db, folders, families)
    _paths(db, folders)
    times = ("start", '"end"', "launch_start", "node_start")
    moved = ", ".join(f"{t} + {{shift}} AS {t}" for t in times)
    kernels = _union(
        folders, shifts, "kernel",
        f"""SELECT {{file}} AS file, r.rank, k.* EXCLUDE (name_id, path, {", ".join(times)}),
        {moved}, n.merged AS name_id,
        p.merged AS path_id
        FROM {{source}} k
        LEFT JOIN rank_of r ON r.file = {{file}} AND r.pid = k.pid
        JOIN name_of n ON n.file = {{file}} AND n.id = k.name_id
        JOIN path_of p ON p.file = {{file}} AND p.id = k.path""",
    )  # fmt: skip
    db.execute(f"CREATE VIEW kernel AS {kernels}")
    in_file = 'tid, start + {shift} AS start, "end" + {shift} AS "end"'
    ranges = _union(
        folders, shifts, "range",
        f"""SELECT {{file}} AS file, r.rank, k.id, {in_file}, k.text, p.merged AS path_id
        FROM {{source}} k LEFT JOIN rank_of r ON r.file = {{file}} AND r.pid = k.pid
        JOIN path_of p ON p.file = {{file}} AND p.id = k.path""",
    )  # fmt: skip
    db.execute(f"CREATE VIEW range AS {ranges}")
    steps = _union(
        folders, shifts, "step",
        f"""SELECT {{file}} AS file, r.rank, k.id, {in_file}, k.label
        FROM {{source}} k LEFT JOIN rank_of r ON r.file = {{file}} AND r.pid = k.pid""",
    )  # fmt: skip
    db.execute(f"CREATE TABLE labelled AS {steps}")
    _steps(db)


def _union(folders: Sequence[Path], shifts: Sequence[int], name: str, select: str) -> str:
    """One select over the same parquet file of every folder."""
    return " UNION ALL ".join(
        select.format(
            file=file, shift=shift, source=f"read_parquet('{quoted(folder / f'{name}.parquet')}')"
        )
        for file, (folder, shift) in enumerate(zip(folders, shifts, strict=True))
    )


def _names(db: duckdb.DuckDBPyConnection, folders: Sequence[Path], families: Path | None) -> None:
    """Tables ``name`` and ``name_of``: one id for one demangled name, whichever file it is in."""
    _merge(db, folders, "name", ("name",))
    rows = db.execute("SELECT id, name FROM name_merged ORDER BY id").fetchall()
    table = load_families(families)
    parsed = [parse_name(name, table) for _, name in rows]
    write_texts(
        db, "name_parsed", [row[0] for row in rows],
        short=[p.short for p in parsed], family=[p.family for p in parsed],
        glue=["1" if p.glue else "" for p in parsed],
    )  # fmt: skip
    db.execute(
        "CREATE TABLE name AS SELECT id, m.name, p.short, p.family, p.glue = '1' AS glue "
        "FROM name_merged m JOIN name_parsed p USING (id)"
    )
    db.execute("DROP TABLE name_merged; DROP TABLE name_parsed")


def _paths(db: duckdb.DuckDBPyConnection, folders: Sequence[Path]) -> None:
    """Tables ``path`` and ``path_of``; the empty path has id 0."""
    _merge(db, folders, "path", ("path", "module"))
    db.execute("ALTER TABLE path_merged RENAME TO path")


def _merge(
    db: duckdb.DuckDBPyConnection, folders: Sequence[Path], name: str, columns: tuple[str, ...]
) -> None:
    """``{name}_merged(id, …)`` and ``{name}_of(file, id, merged)`` of the files' dictionaries."""
    listed = ", ".join(columns)
    select = f"SELECT {{file}} AS file, id, {listed} FROM {{source}}"
    each = _union(folders, [0] * len(folders), name, select)
    db.execute(f"CREATE TABLE {name}_each AS {each}")
    db.execute(
        f"CREATE TABLE {name}_merged AS "
        f"SELECT (row_number() OVER (ORDER BY {listed}) - 1)::INTEGER AS id, {listed} "
        f"FROM (SELECT DISTINCT {listed} FROM {name}_each)"
    )
    db.execute(
        f"CREATE TABLE {name}_of AS SELECT e.file, e.id, m.id AS merged FROM {name}_each e "
        f"JOIN {name}_merged m USING ({listed})"
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
